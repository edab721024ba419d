# Statewise needs Python 3.11 or 3.12, pip and git; the targets make everything else in .venv.
#
#   make demo    an answer of the embedded demo model, streamed
#   make test    the whole test suite
#   make lint    ruff, mypy (strict) and the import contracts
#   make eval    the demo model's score per skill and distance
#   make bench   speed of the demo model
#   make clean   remove what the targets made
#
# PYTHON=python3.12            use another interpreter for .venv
# TORCH_INDEX=URL              look for torch in this package index too (the CPU builds have their own)
# ARGS="-k tokenizer -x"       more arguments for the tool that the target runs

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGE := $(VENV)/.made-package
DEV := $(VENV)/.made-dev
PROMPT ?= What is 27 + 45?

.DEFAULT_GOAL := help
.PHONY: help environment demo test lint format eval bench clean

help:
	@sed -n '3,13s/^# \{0,1\}//p' Makefile

environment: $(DEV)

demo: $(PACKAGE)
	@echo 'statewise generate demo --chat --temperature 0 --prompt "$(PROMPT)"'
	@$(BIN)/statewise generate demo --chat --temperature 0 --prompt "$(PROMPT)" $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

eval: $(PACKAGE)
	$(BIN)/statewise eval demo $(ARGS)

bench: $(PACKAGE)
	$(BIN)/statewise bench demo $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip; there the environment's pip is installed by the system's.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo 'Statewise needs Python 3.11 or 3.12: run make PYTHON=python3.12 (or similar).' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
		{ rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
		  $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }

$(VENV)/.made-torch: constraints.txt | $(BIN)/python
	@echo 'Installing $(TORCH) into $(VENV) …'
	@$(PIP) install -qq --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

# The build backend is pinned like everything else, hence no isolated build.
$(VENV)/.made-backend: constraints.txt $(VENV)/.made-torch
	@$(PIP) install -qq --constraint constraints.txt hatchling editables
	@touch $@

$(PACKAGE): pyproject.toml constraints.txt $(VENV)/.made-backend
	@echo 'Installing Statewise …'
	@$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt $(VENV)/.made-backend
	@echo 'Installing Statewise and the tools for its tests …'
	@$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@ $(PACKAGE)
