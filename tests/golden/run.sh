#!/usr/bin/env bash
# Makes the golden files anew with Hugging Face transformers, then checks them against our own float64 model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${GOLDEN_VENV:-$root/target/golden-venv}

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$venv/bin/python" "$here/generate.py"
"$venv/bin/python" "$here/demo.py"
"$venv/bin/python" "$here/check.py"
