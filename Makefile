# Two commands need nothing but Python >= 3.11 and this folder:
#     make demo    the quick benchmark with one model and one seed, and its report
#     make test    the default test suite
# Each builds .venv on its first run; it is renewed when pyproject.toml or constraints.txt change.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo
# More flags for pip, such as the --extra-index-url of PyTorch's CPU builds.
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto
# The workers of pytest and of the benchmark fill the cores; threads inside each would only contend.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)
PYTHON ?= $(or $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,\
            $(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null))),python3)

.PHONY: help demo test test-slow lint format types docs reference tables wheel clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.bench  ## one model, one seed of the quick benchmark; the last line says where the report is
	@$(BIN)/python -m benchmarks run quick --models vae --seeds 1 --budget demo --out $(RUNS)

test: $(VENV)/.dev  ## the default test suite
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(VENV)/.dev  ## the tests marked slow
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

lint: $(VENV)/.dev  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy on the files listed in pyproject.toml
	@$(BIN)/mypy

docs: $(VENV)/.dev  ## run every code block of the README and docs/, and every doctest
	@$(BIN)/python docs/tables.py --check
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/test_docs.py

reference: $(VENV)/.dev  ## the API reference from the docstrings, into build/reference/
	@$(BIN)/python docs/reference.py build/reference

tables: $(VENV)/.dev  ## write the generated tables again, from the registries, the committed records and the capture suite
	@$(BIN)/python docs/tables.py

wheel: $(VENV)/.dev  ## build the wheel into dist/
	@$(BIN)/python -m build --wheel

clean:  ## remove what these commands made, runs/ excepted
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pyro-zoo needs Python 3.11 or newer, but %s is %s. Name another: make PYTHON=/path/to/python3.11" % (sys.executable, sys.version.split()[0]))'
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 12) or print("note: the versions in constraints.txt were tested on Python 3.11; this is %d.%d." % sys.version_info[:2])'
	@test "$$(uname -s)" != Linux || echo "note: where pip finds no CPU build of torch it takes the default one, which on Linux carries gigabytes of CUDA (see Install in README.md)."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One pip call each; what the stamp depends on decides when it is made again.
$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing pyro-zoo[bench] into $(VENV): minutes when pip's cache is empty"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing pyro-zoo[dev] into $(VENV): minutes when pip's cache is empty"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.bench
