# `make help` lists the targets. A bare machine needs Python >= 3.11 and make, nothing else.

PYTHON ?= python3
STUDY ?= hexagon
OUT ?=
ARGS ?=
PYTEST ?= -n auto --maxprocesses 4

VENV := .venv
RUN := $(VENV)/bin/python
ISA_FLAG := --xla_cpu_max_isa=AVX

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup peers sweep figures test test-all test-isa lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  variables: PYTHON=$(PYTHON) STUDY=$(STUDY) OUT=$(OUT) ARGS='$(ARGS)' PYTEST='$(PYTEST)'"

setup: $(VENV)/.dev ## create .venv with everything: runtime, studies, tests and tools

peers: $(VENV)/.dev ## install the real kernels that recipes are compared with, what can be
	$(RUN) -m sweeps.peers install

sweep: $(VENV)/.sweeps ## run a study and draw its figure (STUDY=, OUT=, ARGS=--quick)
	$(RUN) -m sweeps run $(STUDY) $(if $(OUT),--out $(OUT)) $(ARGS)

figures: $(VENV)/.sweeps ## draw the figure of the rows in OUT again
	$(RUN) -m plots $(or $(OUT),results/$(STUDY))

test: $(VENV)/.dev ## run the quick tests
	$(RUN) -m pytest -m "not slow" $(PYTEST)

test-all: $(VENV)/.dev ## run every test
	$(RUN) -m pytest $(PYTEST)

test-isa: $(VENV)/.dev ## run the bit-for-bit tests again without fused multiply-add (x86)
	XLA_FLAGS="$$XLA_FLAGS $(ISA_FLAG)" $(RUN) -m pytest -m isa $(PYTEST)

lint: $(VENV)/.dev ## ruff
	$(RUN) -m ruff check .

types: $(VENV)/.dev ## mypy
	$(RUN) -m mypy jaxattn sweeps plots

clean: ## remove .venv, caches and build output; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find jaxattn sweeps plots tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, so that an interrupted installation starts again.
$(VENV)/.pip:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "jaxattn needs Python 3.11 or newer: '$(PYTHON)' was not found." \
	       "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxattn needs Python 3.11 or newer: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." \
	       "Install a newer one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV) (the first time only; a few minutes) ..."
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.sweeps: pyproject.toml $(VENV)/.pip
	$(RUN) -m pip install --quiet --editable . --group sweeps
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.pip
	$(RUN) -m pip install --quiet --editable . --group dev
	@touch $(VENV)/.sweeps $@
