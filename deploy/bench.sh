#!/usr/bin/env bash
# Measures Conclave on this machine: in one process, then as a cluster of real processes with dispatch in a router and
# embedded in attention, over the sockets of members of one host and over loopback TCP, each beside its ratio to the one
# process. Results are written to target/bench as JSON.
#
# usage: deploy/bench.sh [MODEL] [FLAGS OF conclave bench...]
#   MODEL: a checkpoint; by default target/bench/lite6 (V2-Lite's layers, six of them, 6.3 GB), made if it is missing
#   SHARDS="1/4 2/4 3/4 4/4" EXPERT_THREADS=1                   the cluster's expert processes
#   CONCLAVE=target/release/conclave                            the binary
#   PEERS=1 PEERS_DIR=DIR [PEERS_HOME=~/peers]                  then run DIR/run_all.sh for other engines, installed there
set -euo pipefail
cd "$(dirname "$0")/.."

conclave=${CONCLAVE:-target/release/conclave}
out=target/bench
model=${1:-$out/lite6}
shift || true
mkdir -p "$out"
cluster=
declare -A transport=([auto]=same-host [off]=tcp)

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

start_cluster() { # start_cluster MODEL DISPATCH SAME-HOST: sets grpc and pids
    local log=$out/cluster.log
    : >"$log"
    grpc=127.0.0.1:$(free_port)
    HTTP=127.0.0.1:$(free_port) GRPC=$grpc ETCD_PORT=$(free_port) CONCLAVE=$conclave DISPATCH=$2 THREADS=$(nproc) \
        SHARDS=${SHARDS:-1/4 2/4 3/4 4/4} EXPERT_THREADS=${EXPERT_THREADS:-1} READY_SECONDS=600 \
        CONCLAVE_DRAIN_TIMEOUT=2 CONCLAVE_SAME_HOST=$3 \
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

title() { printf '\n=== %s\n' "$*"; }

[ "$model" != "$out/lite6" ] || made "$model" --preset v2-lite --layers 6 --vocab 32000
made "$out/tiny" --preset tiny

title "in process"
"$conclave" bench --model "$model" --profile --json "$out/in-process.json" "$@"

for dispatch in embedded router; do
    for same_host in auto off; do
        title "cluster of real processes, dispatch: $dispatch, ${transport[$same_host]}"
        start_cluster "$model" $dispatch $same_host
        "$conclave" bench --url "http://$grpc" --model "$model" --pids "$pids" \
            --baseline "$out/in-process.json" --json "$out/cluster-$dispatch-${transport[$same_host]}.json" "$@"
        stop_cluster
    done
done

for same_host in auto off; do
    title "hops between real processes, ${transport[$same_host]}: layer calls of a tiny model"
    SHARDS=1/1 start_cluster "$out/tiny" router $same_host
    "$conclave" bench --url "http://$grpc" --model "$out/tiny" --pids "$pids" \
        --json "$out/hops-${transport[$same_host]}.json" \
        --prefill 1 --batch 1 --context 1 --long-context 0 --tokens 32
    stop_cluster
done

[ "${PEERS:-0}" = 1 ] || exit 0
title "other engines"
home=${PEERS_HOME:-$HOME/peers}
if [ ! -f "${PEERS_DIR:-}/run_all.sh" ]; then
    echo "SKIP: PEERS_DIR=${PEERS_DIR:-}: no run_all.sh there"
elif [ ! -d "$home/models/lite6" ]; then
    echo "SKIP: $home/models/lite6: missing; install the engines first, as $PEERS_DIR/README.md says"
else
    PEERS=$home bash "$PEERS_DIR/run_all.sh"
    grep -hE 'tok/s|GB/s|TOPS|peak rss' "$home"/logs/*.log
fi
