# Two commands for a start: `make demo` and `make test`. Each makes .venv, installs what it needs, and runs.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo

.PHONY: demo test test-all lint format clean help

help:
	@echo "make demo      toy videos -> shards -> training -> sampled video and report, on this machine"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with the full grids"
	@echo "make lint      style, types, import direction"
	@echo "make format    rewrite the code in the house style"
	@echo "make clean     remove what these commands made"

demo: $(VENV)/.demo
	$(BIN)/opensora-dist demo $(DEMO_DIR)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_DIR) build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -e '.[prepare]'
	touch $@

$(VENV)/.dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -e '.[prepare,hf,track,dev]'
	touch $@
