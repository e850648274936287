#!/usr/bin/env bash
# A cluster of real processes on this machine: etcd, one router, one attention service and expert shards, by default four
# that hold each cell twice. Runs until Ctrl-C; every process writes its log under the folder it prints.
#
# usage: deploy/local-cluster.sh [MODEL]
#   HTTP=127.0.0.1:8000 GRPC=127.0.0.1:50051 ETCD_PORT=23790   where things listen
#   DEVICE=cpu DISPATCH=router THREADS=1 EXPERT_THREADS=1      how they run
#   SHARDS="1/2 2/2 1/2 2/2"                                    what each expert shard holds
#   READY_SECONDS=30                                            longest wait until they serve
#   CONCLAVE=target/release/conclave                            the binary
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-tests/fixtures/demo-model}
http=${HTTP:-127.0.0.1:8000}
grpc=${GRPC:-127.0.0.1:50051}
etcd_port=${ETCD_PORT:-23790}
etcd_url=http://127.0.0.1:$etcd_port
conclave=${CONCLAVE:-target/release/conclave}
logs=$(mktemp -d -t conclave-cluster.XXXXXX)
common=(--model "$model" --etcd "$etcd_url" --device "${DEVICE:-cpu}")
threads=${THREADS:-1}
wait_seconds=${READY_SECONDS:-30}
pids=()
names=()

start() { # start NAME COMMAND...
    local name=$1
    shift
    "$@" >"$logs/$name.log" 2>&1 &
    pids+=($!)
    names+=("$name")
    echo "  $name: pid $!, log $logs/$name.log"
}

wait_for() { # wait_for URL WHAT: until URL answers well, every process still running
    local i
    while [ "$SECONDS" -lt "$wait_seconds" ]; do
        curl --silent --fail "$1" >/dev/null && return
        for i in "${!pids[@]}"; do
            kill -0 "${pids[$i]}" 2>/dev/null && continue
            echo "${names[$i]} ended early; the end of $logs/${names[$i]}.log:" >&2
            tail -n 20 "$logs/${names[$i]}.log" >&2
            exit 1
        done
        sleep 0.2
    done
    echo "$2 not ready after $wait_seconds s; logs in $logs" >&2
    exit 1
}

stop() {
    trap - EXIT
    echo "stopping"
    # Routers first, etcd last: nobody is left without the one it needs.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        kill -TERM "${pids[$i]}" 2>/dev/null || true
        wait "${pids[$i]}" 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 0' INT TERM

start etcd etcd --name local --data-dir "$logs/etcd" --log-level warn \
    --listen-client-urls "$etcd_url" --advertise-client-urls "$etcd_url" \
    --listen-peer-urls "http://127.0.0.1:$((etcd_port + 1))" \
    --initial-advertise-peer-urls "http://127.0.0.1:$((etcd_port + 1))" \
    --initial-cluster "local=http://127.0.0.1:$((etcd_port + 1))"
# Members wait for it.
for shard in ${SHARDS:-1/2 2/2 1/2 2/2}; do
    start "expert-${#pids[@]}" $conclave expert "${common[@]}" --threads "${EXPERT_THREADS:-$threads}" --shard $shard \
        --grpc 127.0.0.1:0 --admin 127.0.0.1:0
done
start attention $conclave attention "${common[@]}" --threads "$threads" --dispatch "${DISPATCH:-router}" \
    --grpc 127.0.0.1:0 --admin 127.0.0.1:0
start router $conclave router --model "$model" --etcd "$etcd_url" --http "$http" --grpc "$grpc"
wait_for "http://$http/readyz" "the cluster"

cat <<TEXT
ready after $SECONDS s
  ask:      curl http://$http/v1/chat/completions -H 'content-type: application/json' -d '{"messages":[{"role":"user","content":"What is the capital of France?"}]}'
  chat:     $conclave chat --url http://$http/v1
  members:  $conclave inspect --cluster http://$grpc
Ctrl-C stops it all.
TEXT
# One that is killed does not end the others.
wait
