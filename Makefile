# Everything a fresh machine needs is Python 3.11 or newer and GNU make. `make help` lists the commands.

VENV := .venv
BIN := $(VENV)/bin
# Two marks: what a run needs, and what tests need beside it.
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
ARGS ?=

# The user's own python3 first; where it is too old, a newer one beside it.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-cluster check style lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." adds arguments to demo and the tests; PYTHON=... names the Python to use.'

setup: $(DEV) ## the virtual environment with locked dependencies (the others call it; demo takes a part of it)

demo: $(READY) ## the whole recipe on the demonstration world, in minutes; ends with a table and report.html
	@$(BIN)/umarvel demo $(ARGS)

# Two sessions of Ray on two cores starve each other, so only what is not slow is spread over processes. With
# ARGS one of the halves may have nothing to do: exit status 5.
FAST := $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not cluster"
SLOW := $(BIN)/python -m pytest -m "slow and not gpu and not cluster"

test: $(DEV) ## all tests but those of whole clusters and those that need a GPU
	@$(FAST) $(ARGS) || [ $$? -eq 5 ]
	@$(SLOW) $(ARGS) || [ $$? -eq 5 ]

test-cluster: $(DEV) ## whole runs on clusters of several nodes and on object storage, minutes each
	@$(BIN)/python -m pytest -m cluster $(ARGS)

test-fast: $(DEV) ## the tests that take no Ray and no whole run, in a minute and a half
	@$(FAST) $(ARGS)

check: style test-fast ## what a change must pass: format, lint, types, fast tests

style: $(DEV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

lock: $(DEV) ## write constraints.txt from .venv (first `.venv/bin/pip install -U PACKAGE` and `make test`)
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[^+]*)\+.*/\1/' | LC_ALL=C sort -f; } \
	   > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@touch $(READY) $(DEV)

clean: ## remove .venv and caches; runs and data stay
	@rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info build dist
	@find umarvel_ray tests jobs -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made .venv (an interrupted first call) has no working pip and is made anew.
$(READY): EXTRA := compiled
$(DEV): EXTRA := dev
$(READY) $(DEV): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	   echo "make: no Python 3.11 or newer found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	   exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	   echo "make: $(PYTHON) is older than Python 3.11 or does not start. Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	   exit 2; }
	@echo "setting up $(VENV) (once, about 2 minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	@touch $(READY) $@
