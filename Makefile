# Everything runs from a fresh clone: the first `make demo` or `make test` makes .venv and installs into it, once.
#
#   make demo PYTHON=python3 VENV=     use the interpreter as it is and install nothing (a GPU host without pip)
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"     another torch wheel
#
# VENV is a folder name without spaces; the path of the clone may have some.

PYTHON ?= python3
VENV ?= .venv
HOST_VENV ?= .host

# Without a GPU one exact version, alone: a range lets pip choose a build that brings gigabytes of CUDA libraries.
ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
TORCH ?= torch
else
TORCH ?= torch==2.13.0
endif

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
HOST_PACKAGES := 'submitit>=1.5.4' pyyaml
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help setup host demo test test-slow test-gpu check clean

help:
	@echo "make demo        train a tiny model, stop it, resume it, export it: runs/demo (minutes, no GPU needed)"
	@echo "make test        the fast tests"
	@echo "make test-slow   the long tests, and every model family"
	@echo "make test-gpu    the tests that need a CUDA GPU"
	@echo "make check       formatting, lint, import directions, types"
	@echo "make host        the Slurm side without torch, under 100 MB, into .host: for login nodes and batch hosts"
	@echo "make setup       only make .venv and install into it; the others do it when they need it"
	@echo "make clean       remove .venv, .host, runs/demo, runs/demo-data and caches"
	@echo "With PYTHON=python3 VENV= nothing is installed and that interpreter is used as it is."

setup: $(READY)

ifneq ($(READY),)
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	@touch $@
endif

# The host side of a Slurm job: submitit, PyYAML and this package, without what trains. The folder must be the same on
# login nodes and batch hosts: the clone itself on a shared file system, or HOST_VENV=/shared/path.
host: $(HOST_VENV)/.ready

$(HOST_VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; name another: make host PYTHON=python3.12" >&2; exit 1; }
	@test -x $(HOST_VENV)/bin/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(HOST_VENV)/bin/python || $(PYTHON) -m venv $(HOST_VENV)
	$(HOST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input $(HOST_PACKAGES)
	$(HOST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps -e .
	@touch $@
	@echo "ready: $(abspath $(HOST_VENV))/bin/moe-recipes; next: moe-recipes cluster init"

demo: $(READY)
	$(PY) -m moe_recipes.launch.demo

test: $(READY)
	$(PY) -m pytest -m "not slow and not gpu"

# pytest ends with 5 where it finds no test of a tier; only the fast tier must have some.
test-slow: $(READY)
	$(PY) -m pytest -m "slow and not gpu" || [ $$? -eq 5 ]

test-gpu: $(READY)
	$(PY) -m pytest -m gpu || [ $$? -eq 5 ]

check: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PY) -m mypy

clean:
	rm -rf .venv .host runs/demo runs/demo-data .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find moe_recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
