#!/usr/bin/env bash
# Installs etcd from the distribution's packages (Debian, Ubuntu); elsewhere says what to do.
set -euo pipefail

if ! command -v apt-get >/dev/null; then
    echo "etcd is not installed and this system has no apt-get: install etcd 3.4 or newer and put it on PATH" >&2
    exit 1
fi
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends etcd-server
etcd --version | head -n 1
