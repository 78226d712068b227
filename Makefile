# The commands a person needs. `make nano` and `make test` set everything up by themselves.
#
#   make nano               the whole study on nano models: train, sample, judge, report (CPU)
#   make nano DEVICE=cuda   the same on one GPU
#   make nano-full          the paper's counts, three seeds, all controls
#   make test               the tests (8 minutes at most on 2 cores)
#   make test-full          kills, resumes and other slow faults; the report in a real browser
#   make gpu-test           the compiled kernels at full sizes, on a CUDA machine
#   make check              ruff and mypy
#   make organism           train the nano organism's models from scratch again

PYTHON ?= python3
DEVICE ?= cpu
PY := .venv/bin/python
VLLM_TESTS := tests/serve/test_vllm_engine.py tests/serve/test_vllm_plugin.py tests/serve/test_api.py \
  tests/evaluate/test_export_inspect.py tests/evaluate/test_engines.py tests/evaluate/test_two_judges.py
ORGANISMS := full mini nano impersonal judge quality topic

.PHONY: nano nano-full test test-full gpu-test check organism setup vllm slurm
.DELETE_ON_ERROR:

# on a GPU, where the stages of such models share it, so many at once as it takes, not one for each core
SHARING := $(if $(filter cuda,$(DEVICE)),workers=4)

nano: .venv/installed-$(DEVICE)
	$(PY) -m evaluate.experiment configs/experiments/nano.yaml device=$(DEVICE) $(SHARING)

nano-full: .venv/installed-$(DEVICE)
	$(PY) -m evaluate.experiment configs/experiments/nano_full.yaml device=$(DEVICE) $(SHARING)

# a process per core with one thread each; a file's tests stay together, because they share what they set up
test: .venv/installed-$(DEVICE)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile -m "not full and not gpu and not slow"

# Slurm's tests one by one: they share a cluster
test-full: .venv/installed-$(DEVICE) .venv/browser .venv/training vllm slurm
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile -m "full and not gpu and not slow" \
	  --ignore tests/slurm
	$(PY) -m pytest -m "full and not gpu and not slow" tests/slurm
	if [ -e .venv-vllm/installed ]; then .venv-vllm/bin/python -m pytest -m "full and not slow" $(VLLM_TESTS); fi

# not in the interpreter that the other tests run Triton's kernels in
gpu-test: .venv/installed-cuda
	TRITON_INTERPRET=0 $(PY) -m pytest -m gpu tests/serve/ops tests/serve/test_slots.py

# vLLM has an environment of its own; where it cannot be made its tests are left out, and that is said
vllm:
	[ .venv-vllm/installed -nt constraints.txt ] || PYTHON="$(PYTHON)" scripts/setup_vllm_cpu.sh \
	  || echo "vLLM could not be installed; its tests are skipped" >&2

# Debian's Slurm, for the tests that start a cluster; where it cannot be installed they are skipped, and that is said
slurm:
	scripts/setup_slurm.sh

check: .venv/installed-$(DEVICE)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

organism: .venv/installed-$(DEVICE)
	for name in $(ORGANISMS); do \
	  $(PY) -m train.organism.pretrain configs/organism/$$name.yaml output=train/organism/weights/$$name || exit 1; \
	done

setup: .venv/installed-$(DEVICE)

.venv/installed-%: constraints.txt pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" scripts/setup.sh "$*"

.venv/browser: constraints.txt scripts/setup_browser.sh | .venv/installed-$(DEVICE)
	scripts/setup_browser.sh

.venv/training: constraints.txt scripts/setup_training.sh | .venv/installed-$(DEVICE)
	scripts/setup_training.sh
