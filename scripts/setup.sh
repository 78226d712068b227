#!/usr/bin/env bash
# Make .venv with the pinned versions of constraints.txt: scripts/setup.sh cpu|cuda
# CPU machines get PyTorch's CPU build where its index can be reached (200 MB instead of several GB);
# otherwise, and for cuda, torch comes from the default package index.
set -euo pipefail
device=${1:-cpu}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

case $device in cpu | cuda) ;; *) echo "error: device is '$device'; known: cpu, cuda" >&2; exit 2 ;; esac
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version 2>&1) found, Candor needs Python 3.11 or newer. Set PYTHON=/path/to/python3.11." >&2
  exit 2
fi
if [[ ! -x .venv/bin/pip ]]; then
  if ! "$python" -m venv .venv; then
    echo "error: '$python -m venv .venv' failed. On Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 2
  fi
fi

index=https://download.pytorch.org/whl/cpu
extra=()
if [[ $device == cpu ]] && .venv/bin/python - "$index/torch/" 2>/dev/null <<'PY'; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).read(1)
PY
  extra=(--extra-index-url "$index")
fi
groups=dev
[[ $device == cuda ]] && groups=dev,gpu
# torch==X is satisfied by the CPU build X+cpu, so for cuda one that was made without a GPU goes first
has_gpu_build() { .venv/bin/python -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))'; }
if [[ $device == cuda ]] && .venv/bin/pip show torch >/dev/null 2>&1 && ! has_gpu_build; then
  echo "the torch in .venv is a build without CUDA; the one with it takes its place (several GB)" >&2
  .venv/bin/pip uninstall --quiet --yes torch
fi
echo "installing the pinned packages into .venv (a few minutes the first time)" >&2
# ${extra[@]+...}: in bash 3.2 (macOS) an empty array is unset
# torch first and alone: what comes after finds it satisfied and fetches no other build
.venv/bin/pip install --quiet --constraint constraints.txt ${extra[@]+"${extra[@]}"} torch
.venv/bin/pip install --quiet --constraint constraints.txt ${extra[@]+"${extra[@]}"} --editable ".[$groups]"
if [[ $device == cuda ]] && ! has_gpu_build; then
  echo "error: the package index gave a torch without CUDA (see .venv/bin/pip config list); install a build for your GPU" \
    "into .venv and run this again" >&2
  exit 2
fi
touch ".venv/installed-$device"
