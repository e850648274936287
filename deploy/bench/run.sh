#!/usr/bin/env bash
# Measures Conclave on this machine, engine after engine, several rounds of all of them: in one process; as clusters of real
# processes with dispatch embedded in attention or in a router, over the sockets of members of one host or over loopback
# TCP; the hops between such processes; and other engines with the same weights. Ends with one table (table.py).
#
# usage: deploy/bench/run.sh [MODEL] [FLAGS OF conclave bench...]
#   MODEL: a checkpoint; by default target/bench/lite6 (V2-Lite's layers, six of them, 6.3 GB), made if it is missing
#   ROUNDS=3                                                    how many times each is measured, taking turns
#   ENGINES="in-process embedded embedded-tcp router router-tcp hops hops-tcp"
#   PEERS=1                                                     also "llama.cpp transformers vllm vllm-eager" (compiled
#                                                               and not), where they are installed
#   SHARDS="1/4 2/4 3/4 4/4" EXPERT_THREADS=1                   the clusters' expert processes
#   CONCLAVE=target/release/conclave OUT=target/bench           the binary; where results go
#   PEERS_HOME=~/peers                                          where the other engines are; one by one:
#   LLAMA_CPP=DIR GGUF=FILE TRANSFORMERS_PYTHON=FILE VLLM_PYTHON=FILE
set -euo pipefail
cd "$(dirname "$0")/../.."

conclave=${CONCLAVE:-target/release/conclave}
out=${OUT:-target/bench}
model=${1:-target/bench/lite6}
shift || true
engines=${ENGINES:-in-process embedded embedded-tcp router router-tcp hops hops-tcp}
[ "${PEERS:-0}" = 1 ] && engines+=" llama.cpp transformers vllm vllm-eager"
found=$out/rounds
tiny=target/bench/tiny
peers=${PEERS_HOME:-$HOME/peers}
cluster=

made() { # made MODEL SYNTH-FLAGS...: makes a checkpoint if it is missing
    local dir=$1
    shift
    [ -e "$dir/config.json" ] || "$conclave" synth "$@" --out "$dir"
}

free_port() { # one with nobody on it or on the next
    local port
    for port in $(shuf -i 20000-30000 -n 100); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue
        (exec 3<>"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null && continue
        echo "$port"
        return
    done
}

stop_cluster() {
    [ -z "$cluster" ] || { kill -TERM "$cluster" 2>/dev/null && wait "$cluster"; } || true
    cluster=
}
trap stop_cluster EXIT

start_cluster() { # start_cluster MODEL SHARDS DISPATCH SAME-HOST: sets grpc and pids
    local log=$out/cluster.log
    : >"$log"
    grpc=127.0.0.1:$(free_port)
    HTTP=127.0.0.1:$(free_port) GRPC=$grpc ETCD_PORT=$(free_port) CONCLAVE=$conclave DISPATCH=$3 THREADS=$(nproc) \
        SHARDS=$2 EXPERT_THREADS=${EXPERT_THREADS:-1} READY_SECONDS=600 \
        CONCLAVE_DRAIN_TIMEOUT=2 CONCLAVE_SAME_HOST=$4 \
        deploy/local-cluster.sh "$1" >"$log" 2>&1 &
    cluster=$!
    until grep -q '^ready' "$log"; do
        kill -0 "$cluster" 2>/dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.2
    done
    grep '^ready' "$log"
    # etcd is not one of ours.
    pids=$(sed -n '/^  etcd:/d; s/^  .*: pid \([0-9]*\),.*/\1/p' "$log" | paste -sd,)
}

of_cluster() { # of_cluster ENGINE MODEL SHARDS FLAGS...: measures one, by the way that the engine's name says
    local engine=$1 same_host=auto dispatch=embedded
    [[ $engine == *-tcp ]] && same_host=off
    [[ $engine == embedded* ]] || dispatch=router
    start_cluster "$2" "$3" $dispatch $same_host
    "$conclave" bench --url "http://$grpc" --model "$2" --pids "$pids" --repeat 1 --json "$json" "${@:4}"
    stop_cluster
}

peer() { # peer SCRIPT PYTHON NEEDED FLAGS...: measures another engine, unless what it needs is missing
    local script=deploy/bench/$1 python=$2 needed=$3 file
    for file in "$python" "$needed"; do
        [ -e "$(command -v "$file" || echo "$file")" ] || { echo "SKIP: no $file"; return; }
    done
    "$python" "$script" --threads "$(nproc)" --json "$json" "${@:4}" 2>"$out/peer.log" ||
        { echo "FAILED; the end of $out/peer.log:"; tail -n 5 "$out/peer.log"; }
}

measure() { # measure ENGINE FLAGS...
    case $1 in
        in-process) "$conclave" bench --model "$model" --repeat 1 --json "$json" $profile "${@:2}" ;;
        embedded* | router*) of_cluster "$1" "$model" "${SHARDS:-1/4 2/4 3/4 4/4}" "${@:2}" ;;
        hops*) of_cluster "$1" $tiny 1/1 --prefill 1 --batch 1 --context 1 --long-context 0 --tokens 32 ;;
        llama.cpp)
            peer llama_cpp.py python3 "${LLAMA_CPP:-$peers/build-llama/bin}/llama-bench" "${@:2}" \
                --programs "${LLAMA_CPP:-$peers/build-llama/bin}" \
                --model "${GGUF:-$peers/gguf/$(basename "$model")-bf16.gguf}" ;;
        transformers) peer transformers_cpu.py "${TRANSFORMERS_PYTHON:-$peers/venv/bin/python}" "$model" --model "$model" "${@:2}" ;;
        vllm*)
            [[ $1 == *-eager ]] && set -- "$@" --eager
            local python=${VLLM_PYTHON:-$peers/venv-vllm/bin/python} preload
            # The threads that it is meant to run on.
            preload=$(realpath -qe "$(dirname "$python")/../lib/libiomp5.so") || preload=
            LD_PRELOAD=$preload peer vllm_cpu.py "$python" "$model" --model "$model" "${@:2}" ;;
        *) echo "ENGINES: found $1, expected in-process, embedded, router, hops, llama.cpp, transformers, vllm, vllm-eager" >&2; exit 2 ;;
    esac
}

[ "$model" != target/bench/lite6 ] || made "$model" --preset v2-lite --layers 6 --vocab 32000
made $tiny --preset tiny
mkdir -p "$found"
rm -f "$found"/*.json
for round in $(seq "${ROUNDS:-3}"); do
    profile=$([ "$round" != 1 ] || echo --profile)
    for engine in $engines; do
        printf '\n=== %s, round %d\n' "$engine" "$round"
        json=$found/$engine.$round.json
        measure "$engine" "$@"
    done
done
printf '\n=== all rounds\n'
python3 deploy/bench/table.py "$found" "$out/bench.json"
