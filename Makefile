# Every target works on a fresh clone. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CARGO   ?= cargo
VENV    := .venv
PYTHON  ?= python3
MODEL   ?= tests/fixtures/demo-model
BENCH_MODEL ?= target/bench/lite6
# The CUDA compiler: CUDA_HOME if that is set, else one installed under target/; empty where that fails.
CUDA_COMPILER = $${CUDA_HOME:-$$(deploy/install-cuda-compiler.sh target/cuda-compiler)}

# One build serves all tests: it has the shim that runs CUDA kernels on the processor.
TESTED = --release --locked --workspace --features conclave-kernels/cuda-shim,conclave-expert/cuda-shim,conclave-tests/cuda-shim

.PHONY: help run build tested-build test unit kernels gpu e2e check bench cluster golden deps clean

help: ## what each target does
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-10s %s\n", $$1, $$2 }'

run: ## serve a model in one process (MODEL=dir, default: the demo checkpoint)
	$(CARGO) run --release -- serve --model $(MODEL)

build:
	$(CARGO) build --release --locked --workspace

test: deps tested-build ## all tests: unit, kernels, golden and end to end (installs etcd, Python clients, CUDA compiler if missing)
	CUDA_HOME="$(CUDA_COMPILER)" CONCLAVE_REQUIRE_CLIENTS=1 $(CARGO) test $(TESTED)

tested-build:
	$(CARGO) build $(TESTED)

unit: ## unit tests only
	$(CARGO) test --release --locked --workspace --exclude conclave-tests --features conclave-kernels/cuda-shim,conclave-expert/cuda-shim

kernels: ## tests of the CUDA kernels, on the processor and with the CUDA compiler (REQUIRE_NVCC=1: fail without it)
	CUDA_HOME="$(CUDA_COMPILER)" $(CARGO) test $(TESTED) \
		--test cuda --test cubins --test devices --test sm90 --test cuda_sass --example gpu
	$(CARGO) test $(TESTED) --test golden -- cuda tiled

gpu: ## what a GPU machine without Rust needs to check and measure the CUDA device, into target/gpu (run target/gpu/gpu.sh run there)
	CUDA_HOME="$(CUDA_COMPILER)" deploy/gpu.sh pack target/gpu

e2e: deps tested-build ## end-to-end tests only
	CONCLAVE_REQUIRE_CLIENTS=1 $(CARGO) test $(TESTED) $(patsubst tests/tests/%,--test %,$(basename $(wildcard tests/tests/*)))

deps: $(VENV)/.installed ## what the tests need: etcd from the distribution, Python clients in a virtual environment
	@command -v etcd >/dev/null || deploy/install-etcd.sh

$(VENV)/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement $<
	touch $@

check: ## formatting, lints, licences, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets --features conclave-kernels/cuda-shim,conclave-expert/cuda-shim -- -D warnings
	@home="$(CUDA_COMPILER)"; if [ -z "$$home" ]; then echo "SKIP lints of feature cuda: no CUDA compiler"; else \
		CUDA_HOME="$$home" $(CARGO) clippy --release --locked -p conclave-kernels --features cuda,cuda-shim --lib --examples \
		-- -D warnings; fi
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --workspace --no-deps
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check licenses bans sources

bench: build deps ## tokens a second beside the machine's limits, in process, as clusters, and of other engines (BENCH_MODEL=dir, ROUNDS=3, PEERS=1)
	deploy/bench/run.sh $(BENCH_MODEL) $(BENCH_FLAGS)

cluster: build ## a local cluster of real processes: etcd, a router, an attention service and four expert shards
	deploy/local-cluster.sh $(MODEL)

golden: ## make the golden files again, with Hugging Face transformers
	tests/golden/run.sh

clean: ## remove build results and the virtual environment
	$(CARGO) clean
	rm -rf $(VENV)
