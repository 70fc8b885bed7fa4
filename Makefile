# Two commands for a start: `make demo` and `make test`. Each makes .venv, installs what it needs, and runs.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo
COLOSSALAI_VENV := .venv-colossalai
POOLS_VENV := .venv-pools

.PHONY: demo test test-all test-colossalai test-pools test-docker test-gpu test-hosts test-slurm lint format clean help

help:
	@echo "make demo      toy videos -> shards -> training -> sampled video and report, on this machine"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with the full grids"
	@echo "make test-colossalai  Colossal-AI's suite, in an environment of its own"
	@echo "make test-pools  manifests for Kubernetes and SkyPilot, held to their real schemas, in an environment of its own"
	@echo "make test-docker  the image built from a bare Debian, and its entry point run (as root)"
	@echo "make test-gpu  what only a GPU shows, on a machine that has one"
	@echo "make test-hosts   torchrun over two modelled hosts (as root)"
	@echo "make test-slurm   what befalls a training, on a real Slurm of four modelled nodes (as root, Debian)"
	@echo "make lint      style, types, import direction"
	@echo "make format    rewrite the code in the house style"
	@echo "make clean     remove what these commands made"

demo: $(VENV)/.demo
	$(BIN)/opensora-dist demo $(DEMO_DIR)

# Two of pytest's processes, each with ranks of its own: for much of its time a test waits, for another rank or for a program to start.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

# Outside this environment the suite isn't collected; here, without the package, pytest finds no test and fails.
test-colossalai: $(COLOSSALAI_VENV)/.installed
	$(COLOSSALAI_VENV)/bin/python -m pytest tests/colossal_ai

# Reads golden files alone, so it installs neither this project nor torch, and leaves out the conftest of all other tests.
test-pools: $(POOLS_VENV)/.installed
	$(POOLS_VENV)/bin/python -m pytest -c tests/pools/pytest.ini --confcutdir tests/pools tests/pools

# These need root and programs that they install themselves; elsewhere they skip, and say why.
test-docker: $(VENV)/.dev
	$(BIN)/python -m pytest -rsP --timeout 1800 tests/docker

# By itself: in the suite's own process Triton interprets.
test-gpu: $(VENV)/.dev
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make test-gpu needs a GPU, and torch sees none")'
	$(BIN)/python -m pytest -p no:cacheprovider tests/gpu

test-hosts: $(VENV)/.dev
	$(BIN)/python -m pytest tests/hosts

# Each of pytest's processes has a cluster of its own: most of the time a test waits for Slurm's own limits, and others can wait beside it.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist worksteal --timeout 400 tests/slurm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck benchmarks/gpu.sh launch/*.sh launch/docker/*.sh launch/slurm/bench.sbatch \
		launch/slurm/network.sh launch/slurm/node.sh launch/slurm/rank.sh

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(COLOSSALAI_VENV) $(POOLS_VENV) $(DEMO_DIR) build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -e '.[prepare]'
	touch $@

# DeepSpeed compiles nothing here: what it needs is compiled where it is first used, and the tests use none of that.
$(VENV)/.dev: setup.py | $(BIN)/python
	DS_BUILD_OPS=0 $(BIN)/python -m pip install $(PIP_ARGS) --quiet -e '.[prepare,hf,track,deepspeed,safety,remote,ray,dev]'
	touch $@

# Two steps: colossalai 0.5.0 asks for torch<=2.5.1 and much that it never imports here, so it is installed with no look at what it
# asks for, after what it does import. Built with the environment's own setuptools, since its build imports torch.
$(COLOSSALAI_VENV)/.installed: setup.py requirements/colossalai.txt
	$(PYTHON) -m venv $(COLOSSALAI_VENV)
	$(COLOSSALAI_VENV)/bin/python -m pip install $(PIP_ARGS) --quiet -e '.[dev]' -r requirements/colossalai.txt
	$(COLOSSALAI_VENV)/bin/python -m pip install $(PIP_ARGS) --quiet --no-deps --no-build-isolation colossalai==0.5.0
	touch $@

$(POOLS_VENV)/.installed: requirements/pools.txt
	$(PYTHON) -m venv $(POOLS_VENV)
	$(POOLS_VENV)/bin/python -m pip install $(PIP_ARGS) --quiet -r requirements/pools.txt
	touch $@
