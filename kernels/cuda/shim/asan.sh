#!/usr/bin/env bash
# Runs the tests of the kernels under AddressSanitizer: kernels, buffers and shared arrays. Arguments go to cargo test.
set -euo pipefail
cd "$(dirname "$0")/../../.."

target=$(rustc -vV | sed -n 's/^host: //p')
upper=$(echo "$target" | tr 'a-z-' 'A-Z_')
export CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer"
# Only what runs is linked with it, not what runs while building.
export "CARGO_TARGET_${upper}_RUSTFLAGS=-Clink-arg=-fsanitize=address"
# Fibres have stacks of their own.
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0:halt_on_error=1
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/asan exec cargo test --release --locked --target "$target" \
    -p conclave-kernels --features cuda-shim --test cuda "$@"
