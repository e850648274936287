#!/usr/bin/env bash
# Runs the tests of the kernels under AddressSanitizer: kernels, buffers and shared arrays. Arguments go to the tests.
set -euo pipefail
cd "$(dirname "$0")/../../.."

target=$(rustc -vV | sed -n 's/^host: //p')
upper=$(echo "$target" | tr 'a-z-' 'A-Z_')
export CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer"
# Only the tests are linked with its library and have it first, not what runs while building.
library=$("${CXX:-g++}" -print-file-name=libasan.so)
export "CARGO_TARGET_${upper}_RUSTFLAGS=-Clink-arg=$library"
export "CARGO_TARGET_${upper}_RUNNER=env LD_PRELOAD=$library"
# Fibres have stacks of their own.
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0:halt_on_error=1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/asan

run() {
    cargo test --release --locked --target "$target" -p conclave-kernels --features cuda-shim --test cuda -- "$@"
}

# All tests, but for the one that needs the guards which AddressSanitizer takes the place of.
run --skip a_write_past_a_buffer_is_found_when_it_is_freed "$@"
# What it must find.
for planted in overrun_of_a_buffer overrun_of_a_shared_array; do
    if found=$(run --ignored --exact "shim::$planted" 2>&1) || ! grep -q heap-buffer-overflow <<<"$found"; then
        printf '%s\n' "$found" "AddressSanitizer did not find shim::$planted" >&2
        exit 1
    fi
done
