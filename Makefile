# Needs Python >= 3.10 and make, nothing else. `make help` lists what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test test-slow test-triton-3.6 check docs clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet

help: ## List the targets
	@grep -E '^[a-z0-9.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9.-]+):.*## /  make \1\t/' | expand -t 24

setup: $(VENV)/.ready ## Make .venv with llmkit in it, reusing an installed torch

demo: $(VENV)/.ready ## From raw pages through all stages, each scored: 12 minutes at most on 2 cores
	@$(MAKE) --no-print-directory -C examples/tinyworld OUT=$(CURDIR)/demo \
	  LLMKIT=$(CURDIR)/$(BIN)/llmkit PYTHON=$(CURDIR)/$(BIN)/python

smoke: $(VENV)/.ready-test ## Run every recipe of examples/ at its smallest, without a network: 4 CPU minutes
	@$(MAKE) --no-print-directory -C examples OUT=$(CURDIR)/smoke \
	  LLMKIT=$(CURDIR)/$(BIN)/llmkit PYTHON=$(CURDIR)/$(BIN)/python

# One thread a process: the models of the tests are too small for two.
test: $(VENV)/.ready-test ## Run the tests, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.ready-test ## Run the long tests too
	$(BIN)/python -m pytest

# For every night: one source serves the Triton of torch 2.11 and the newest. The interpreter of 3.6 takes an array of
# one number for a number, which NumPy 2.4 refuses.
test-triton-3.6: $(VENV)/.ready-test ## Test the kernels, compiled and interpreted, on Triton 3.6
	@test -d .triton-3.6/triton || $(PIP) --no-deps --target .triton-3.6 triton==3.6.0 'numpy<2.4'
	PYTHONPATH=$(CURDIR)/.triton-3.6 $(BIN)/python -m pytest tests/kernels -m "not slow"
	PYTHONPATH=$(CURDIR)/.triton-3.6 $(BIN)/python -m pytest tests/kernels/test_compiled.py -m slow

check: $(VENV)/.ready-check ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(VENV)/.ready-docs ## Write what is generated in the documentation, and build it into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove what make has made
	rm -rf $(VENV) .triton-3.6 demo smoke site build *.egg-info .ruff_cache .hypothesis

# torch comes first and by its exact name: as somebody's dependency it may bring gigabytes that nobody asked for
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llmkit needs Python 3.10 or later: make PYTHON=...")'
	@echo "setting up $(VENV) (once)"
	@shared=$$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages || true); \
	  $(PYTHON) -m venv $$shared $(VENV) || \
	  { echo "make: no virtual environment: install your system's python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' \
	  2>/dev/null || $(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.ready-check: $(VENV)/.ready-test
	@$(PIP) --editable '.[test,check]'
	@# where pyright finds llmkit.kernels
	@mkdir -p $(VENV)/typings/llmkit && ln -sfn ../../../kernels $(VENV)/typings/llmkit/kernels
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@$(PIP) --editable '.[docs]'
	@touch $@
