#!/usr/bin/env bash
# What the slow tests of training need (`make test-full`): TensorBoard in .venv (30 MB), and bitsandbytes for QLoRA in
# .venv/four-bits (125 MB). Not among the other packages: PEFT would import it in every process there. On a CUDA machine
# `quantize: nf4` has it from the extra `gpu`; on a CPU put that folder on PYTHONPATH.
# What cannot be installed is said, and its tests are skipped; that is no reason for this script to fail.
set -euo pipefail
cd "$(dirname "$0")/.."

install=(.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt)
"${install[@]}" tensorboard || echo "tensorboard could not be installed; its test will be skipped" >&2
"${install[@]}" --no-deps --upgrade --target .venv/four-bits bitsandbytes \
  || echo "bitsandbytes could not be installed; the tests of QLoRA will be skipped" >&2
touch .venv/training
