# The commands a person needs. `make nano` and `make test` set everything up by themselves.
#
#   make nano               the whole study on nano models: train, sample, judge, report (CPU)
#   make nano DEVICE=cuda   the same on one GPU
#   make nano-full          the paper's counts, three seeds, all controls
#   make test               the tests (8 minutes at most on 2 cores)
#   make test-full          kills, resumes and other slow faults
#   make check              ruff and mypy
#   make organism           train the nano organism's models from scratch again

PYTHON ?= python3
DEVICE ?= cpu
PY := .venv/bin/python
ORGANISMS := full mini nano impersonal judge

.PHONY: nano nano-full test test-full check organism setup
.DELETE_ON_ERROR:

nano: .venv/installed-$(DEVICE)
	$(PY) -m evaluate.experiment configs/experiments/nano.yaml device=$(DEVICE)

nano-full: .venv/installed-$(DEVICE)
	$(PY) -m evaluate.experiment configs/experiments/nano_full.yaml device=$(DEVICE)

test: .venv/installed-$(DEVICE)
	$(PY) -m pytest -m "not full and not gpu"

test-full: .venv/installed-$(DEVICE)
	$(PY) -m pytest -m "full and not gpu"

check: .venv/installed-$(DEVICE)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

organism: .venv/installed-$(DEVICE)
	for name in $(ORGANISMS); do \
	  $(PY) -m train.organism.pretrain configs/organism/$$name.yaml output=train/organism/weights/$$name || exit 1; \
	done

setup: .venv/installed-$(DEVICE)

.venv/installed-$(DEVICE): constraints.txt pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" scripts/setup.sh "$(DEVICE)"
