#!/bin/sh
# Runs the protobuf compiler that cargo unpacked with the crate protoc-bin-vendored: a build dependency of
# conclave-proto, so that a fresh clone builds without a system protoc. A system protoc is the fallback.
set -eu
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=linux-x86_64 ;;
    Linux-aarch64) platform=linux-aarch_64 ;;
    Darwin-x86_64) platform=macos-x86_64 ;;
    Darwin-arm64) platform=macos-aarch_64 ;;
    *) platform=none ;;
esac
for found in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/protoc-bin-vendored-"$platform"-*/bin/protoc; do
    [ -x "$found" ] && exec "$found" "$@"
done
exec protoc "$@"
