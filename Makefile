# Python 3.11 or later with venv and pip, and a network, are all that a machine needs.
# Other Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# Last thing made of an environment, so one that was interrupted or is of another Python starts anew.
READY := $(VENV)/ready-$(VERSION)
TORCH := $(VENV)/torch-$(VERSION)
TPU := $(VENV)/tpu-$(VERSION)

.PHONY: help test test-all style demo clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

# Processes of up to 3 GB each; with more cores: make test PROCESSES=8. The tests of a file stay
# together, since they share what one of them has trained. Where a process of the tests dies,
# pytest-xdist 3.8 would start another one and then wait for ever.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0

test: style  ## make the environment, check style and types, run all tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: style  ## the same with the slow ones: whole runs, several processes, large compilations
	$(PYTEST)

style: $(TORCH) $(TPU)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(READY)  ## make the environment, a data set of videos, train, evaluate, draw; about 10 minutes
	$(BIN)/python -m benchmarks.demo --out=demo

clean:  ## remove the environment, the demo and caches
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo '$(PYTHON) is no Python 3.11 or later: name one, as in make test PYTHON=python3.12'; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) lacks venv: on Debian and Ubuntu, apt install python3-venv'; exit 1; }
	@echo 'Making the environment $(VENV): some minutes and 1.5 GB, once.'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(TORCH): $(READY) requirements-torch.txt
	@echo 'Adding PyTorch and ONNX to $(VENV), for the tests: some minutes, once.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@touch $@

$(TPU): $(READY) requirements-tpu.txt
	@echo 'Adding the TPU compiler to $(VENV), for the tests: a minute, once.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.txt
	@touch $@
