#!/usr/bin/env bash
# Checks and measures on a GPU machine that has neither Rust nor a network: everything is built here and carried there.
#
# usage: deploy/gpu.sh pack [DIR]     builds with the feature cuda (CUDA_HOME) and fills DIR, by default target/gpu
#        DIR/gpu.sh run [RESULTS]     on the GPU machine: all tests that need a GPU, compute-sanitizer on the kernels' tests,
#                                     the benchmark; RESULTS, by default DIR/results, gets logs, a table and results.json
#   SECONDS_EACH=240                  longest time of each check
#   MODEL=DIR                         a checkpoint to measure with; by default V2-Lite's layers, six of them, made there
#   CONTEXT=128 BATCH=1,32            of the benchmark
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

pack() {
    local out=${1:-target/gpu} features=cuda,cuda-shim name path
    cd "$here/.." || exit 1
    : "${CUDA_HOME:?names the CUDA compiler (deploy/install-cuda-compiler.sh installs it)}"
    mkdir -p "$out/tests"
    cargo build --release --locked -p conclave --features cuda || exit 1
    install -s target/release/conclave "$out/conclave"
    # name and path of each test's binary
    cargo test --release --locked -p conclave-kernels --features "$features" --no-run --message-format=json \
        --test cuda --test sm90 --test devices 2>"$out/build.log" |
        python3 -c 'import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["kind"] == ["test"]:
        print(artifact["target"]["name"], artifact["executable"])' >"$out/built" || { cat "$out/build.log" >&2; exit 1; }
    while read -r name path; do install -s "$path" "$out/tests/$name"; done <"$out/built"
    [ -s "$out/built" ] || { cat "$out/build.log" >&2; exit 1; }
    rm "$out/built" "$out/build.log"
    install deploy/gpu.sh "$out/gpu.sh"
    du -sh "$out"
}

check() { # check NAME COMMAND...: runs it, and notes how it ended
    local name=$1 log begun=$SECONDS state=passed
    log=$results/${name// /-}.log
    shift
    printf '%-28s ' "$name"
    REQUIRE_GPU=1 timeout "${SECONDS_EACH:-240}" "$@" >"$log" 2>&1 || state=failed
    printf '%s in %d s\n' "$state" $((SECONDS - begun))
    [ $state = passed ] || { failed=1; tail -n 20 "$log" | sed 's/^/    /'; }
    printf '{"name": "%s", "state": "%s", "seconds": %d}\n' "$name" $state $((SECONDS - begun)) >>"$results/checks"
}

skip() { # skip NAME WHY
    echo "SKIP $1: $2"
    printf '{"name": "%s", "state": "skipped", "why": "%s"}\n' "$1" "$2" >>"$results/checks"
}

run() {
    results=${1:-$here/results} failed=0
    local gpu sanitizer test name
    mkdir -p "$results"
    : >"$results/checks"
    rm -f "$results/bench.json"
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1) ||
        { echo "no GPU here: nvidia-smi: $gpu" >&2; exit 1; }
    echo "$gpu"
    for test in "$here"/tests/*; do
        check "test ${test##*/}" "$test" --nocapture --test-threads=1
    done
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
    for name in memcheck racecheck synccheck; do
        if [ -n "$sanitizer" ]; then
            check "$name sm90" "$sanitizer" --tool $name --error-exitcode 1 "$here/tests/sm90" --test-threads=1
        else
            skip "$name sm90" "no compute-sanitizer"
        fi
    done
    measure
    python3 - "$results" "$gpu" <<'END'
import json, pathlib, sys
results = pathlib.Path(sys.argv[1])
checks = [json.loads(line) for line in (results / "checks").read_text().splitlines()]
bench = results / "bench.json"
found = {"gpu": sys.argv[2], "checks": checks, "bench": json.loads(bench.read_text()) if bench.exists() else None}
(results / "results.json").write_text(json.dumps(found, indent=1) + "\n")
print(f"{results / 'results.json'}")
END
    exit $failed
}

measure() {
    local model=${MODEL:-$here/lite6}
    if [ ! -e "$model/config.json" ]; then
        check "make a checkpoint" "$here/conclave" synth --preset v2-lite --layers 6 --vocab 32000 --out "$model"
    fi
    check "bench" "$here/conclave" bench --device cuda --model "$model" --profile --json "$results/bench.json" \
        --prefill 512 --batch "${BATCH:-1,32}" --context "${CONTEXT:-128}" --long-context 0 --tokens 16
    [ ! -e "$results/bench.json" ] || cat "$results/bench.log"
}

case ${1:-} in
    pack) pack "${2:-}" ;;
    run) run "${2:-}" ;;
    *) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0" >&2; exit 2 ;;
esac
