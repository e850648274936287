#!/usr/bin/env bash
# Installs the CUDA compiler that the kernels are built with into a directory (about 109 MB from the Python package index)
# and prints the value for CUDA_HOME. Versions are pinned together: a newer part of one breaks the others.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIRECTORY" >&2
    exit 2
fi
home=$1/nvidia/cu13
if [ ! -x "$home/bin/nvcc" ]; then
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --root-user-action ignore \
        --no-deps --target "$1" \
        nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
fi
"$home/bin/nvcc" --version >&2
(cd "$home" && pwd)
