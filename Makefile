# All that a contributor runs. `make train` and `make test` need nothing but Python 3.11 to 3.13 and the package index:
# each makes the environment first, installs what is missing, and does so again only when pyproject.toml or
# constraints.txt has changed.
#
#   make train              train a small language model          ARGS="--devices 8 --layout batch:data"
#   make test               lint, types, then the tests           ARGS="-k einsum" goes to pytest
#   make test-all           the same with the tests marked slow, and new examples drawn
#   make docs               run the code in README.md, docs/ and the docstrings
#   make lint types format  one of the parts
#   make constraints        pin the newest versions that pyproject.toml allows
#   make clean              remove the environment and every cache

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Python for a new environment: the first of these that is 3.11 to 3.13 and can make one.
PYTHON ?= python3
PYTHONS := $(PYTHON) python3 python3.13 python3.12 python3.11
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Two processes on two cores: half of a test's time is JAX tracing in one thread.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-all lint types tests docs format constraints clean

help:
	@sed -n 's/^#   //p' Makefile

train: $(VENV)/installed
	$(BIN)/mw train $(ARGS)

test: lint types tests

test-all: lint types $(VENV)/installed-dev
	$(PYTEST) -m "" --hypothesis-profile=default $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/installed-dev
	$(BIN)/basedpyright

tests: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

docs: $(VENV)/installed-dev
	$(BIN)/pytest tests/test_docs.py $(ARGS)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/python:
	@for python in $(PYTHONS); do \
	    if "$$python" -c '$(FITS)' 2>/dev/null; then \
	        echo "Making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo "Meshwright needs Python 3.11 to 3.13 with venv (Debian: apt-get install python3-venv)." >&2; \
	echo "None of these is one: $(PYTHONS). Name another: make PYTHON=/path/to/python3.12" >&2; exit 1

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Meshwright into $(VENV)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

constraints: $(BIN)/python
	@$(PIP) install uv
	$(BIN)/uv pip compile --universal --upgrade --python-version 3.11 --extra dev --no-header --no-annotate \
	    --no-emit-index-url --quiet --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
