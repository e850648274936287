#!/usr/bin/env bash
# Checks and measures on a GPU machine that has neither Rust nor a network: everything is built here and carried there.
#
# usage: deploy/gpu.sh pack [DIR]     builds with the feature cuda (CUDA_HOME) and fills DIR, by default target/gpu
#        DIR/gpu.sh run [RESULTS]     on the GPU machine: tests, questions of bits, times of the kernels, the engine in one
#                                     process and in several, beside transformers; RESULTS, by default DIR/results, gets a log
#                                     of each step and results.json, written anew after each
#        deploy/gpu.sh try [RESULTS]  the same in small on this machine's processor, with what make built
#   SECONDS_TOTAL=480                  longest time of a run: what is left then is skipped
#   MODEL=DIR                          a checkpoint to measure with; by default V2-Lite's layers, six of them, made there
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# More is not carried.
most_mib=64

pack() {
    local out=${1:-target/gpu} build=target/gpu-build features=cuda,cuda-shim name path
    cd "$here/.." || exit 1
    : "${CUDA_HOME:?names the CUDA compiler (deploy/install-cuda-compiler.sh installs it)}"
    mkdir -p "$out/tests"
    # In a folder of its own: target/release keeps the binary that make built.
    cargo build --release --locked --target-dir $build -p conclave --features cuda || exit 1
    install -s $build/release/conclave "$out/conclave"
    cargo build --release --locked --target-dir $build -p conclave-kernels --features $features --example gpu || exit 1
    install -s $build/release/examples/gpu "$out/kernels"
    # name and path of each test's binary
    cargo test --release --locked --target-dir $build -p conclave-kernels --features $features --no-run \
        --message-format=json --test cuda --test sm90 --test devices 2>"$build/tests.log" |
        python3 -c 'import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["kind"] == ["test"]:
        print(artifact["target"]["name"], artifact["executable"])' >$build/tests
    [ -s $build/tests ] || { cat "$build/tests.log" >&2; exit 1; }
    while read -r name path; do install -s "$path" "$out/tests/$name"; done <$build/tests
    install -m 644 deploy/gpu/*.py "$out"
    install deploy/gpu.sh "$out/gpu.sh"
    carry_etcd "$out"
    size "$out"
}

carry_etcd() { # carry_etcd DIR: the cluster's etcd, if this machine has one
    local etcd
    etcd=$(command -v etcd) || { echo "no etcd to carry: install it with deploy/install-etcd.sh; steps with several processes will be skipped"; return; }
    gzip -9 --stdout "$etcd" >"$1/etcd.gz"
}

size() { # size DIR: of all that is carried
    local mib
    mib=$(find "$1" -path "$1/results" -prune -o -type f -printf '%s\n' | awk '{ sum += $1 } END { printf "%.1f", sum / 1048576 }')
    echo "$1: $mib MiB of at most $most_mib"
    awk -v mib="$mib" -v most=$most_mib 'BEGIN { exit mib >= most }'
}

case ${1:-} in
    pack) pack "${2:-}" ;;
    run)
        [ -f "$here/run.py" ] || { echo "$here: found no run.py, expected a folder that pack filled (without a GPU: try)" >&2; exit 2; }
        exec python3 "$here/run.py" --package "$here" ${2:+--results "$2"} ;;
    try) cd "$here/.." && exec python3 deploy/gpu/run.py --cpu --package target/release --results "${2:-target/gpu-try}" ;;
    *) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0" >&2; exit 2 ;;
esac
