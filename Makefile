# Every target sets up what it needs; Python 3.10 or newer and make are enough. The first set-up
# downloads PyTorch with CUDA, several GB; later runs reuse it.
#
#   make test    lint, types and tests       PYTEST_ARGS="-k maxsim", WORKERS=0 for one process
#   make demo    fine-tune on photographs    DEMO_ARGS="--help"
#   make bench   the benchmark sweep         BENCH_ARGS="--help"
#   make lint, types, format                 ruff and pyrefly
#   make docs    the documentation site      written to site/
#   make lock    renew requirements/         LOCK_ARGS="--upgrade"
#   make clean, distclean                    remove caches and builds; environments too
#
# PYTHON=python3.12 names the interpreter of a new environment; run distclean when you change it.

PYTHON ?= python3
VENV ?= .venv
VENV_TRITON36 ?= .venv-triton36
WORKERS ?= auto
# Seconds that the installer waits for a slow network.
export UV_HTTP_TIMEOUT ?= 300
# Compiled while installing, on all cores: importing PyTorch and open_clip would otherwise compile
# them, and again in every process of the tests where the environment forbids to keep it.
export UV_COMPILE_BYTECODE ?= 1

BIN := $(VENV)/bin
BIN_TRITON36 := $(VENV_TRITON36)/bin
# The installer. Bounded here, as it is there before anything that requirements/ could pin.
UV := uv>=0.13,<0.14

# An environment is ready when it holds a stamp named after what defines it. The stamp is written
# last, and an environment without it is built anew, so that an interrupted set-up leaves nothing
# half-installed. The installer's cache makes that quick.
DEFINITION := $(shell cat pyproject.toml setup.py requirements/*.txt | cksum | tr ' ' -)
READY := $(VENV)/.ready-$(DEFINITION)
READY_TRITON36 := $(VENV_TRITON36)/.ready-$(DEFINITION)

.PHONY: help setup triton36 test lint format types demo bench docs lock clean distclean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("FastGOAL needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0]
             + ". Name another: make PYTHON=python3.12 ...")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("$(PYTHON) can not make virtual environments (" + str(error) + "). On Debian and "
             "Ubuntu: apt install python3-venv. Or name another: make PYTHON=python3.12 ...")
endef
export CHECK_PYTHON

define NEW_ENVIRONMENT
@command -v "$(PYTHON)" >/dev/null || { \
	echo "No $(PYTHON) here. Name a Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
@"$(PYTHON)" -c "$$CHECK_PYTHON"
"$(PYTHON)" -m venv --clear $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(UV)"
endef

setup: $(READY)

$(READY):
	$(NEW_ENVIRONMENT)
	$(BIN)/uv pip install --python $(BIN)/python -r requirements/tested.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	@touch $@

# For compile checks only: Triton 3.6 in front of everything else that the main environment has,
# which is borrowed through a .pth file. (Its own torch would be another few GB.)
triton36: $(READY_TRITON36)

SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

$(READY_TRITON36): $(READY)
	$(BIN)/uv venv --clear --python $(BIN)/python $(VENV_TRITON36)
	$(BIN)/uv pip install --python $(BIN_TRITON36)/python -r requirements/triton36.txt
	@$(BIN)/python $(SITE_PACKAGES) >"$$($(BIN_TRITON36)/python $(SITE_PACKAGES))/borrowed.pth"
	@touch $@

# Triton exists for Linux only; elsewhere the tests that need it are skipped, and say so.
ifeq ($(shell uname -s),Linux)
test: triton36
test: export FASTGOAL_TRITON36_PYTHON = $(abspath $(BIN_TRITON36)/python)
endif
# Several test processes, each with one thread: more threads than cores would wait for each other.
ifneq ($(WORKERS),0)
test: export OMP_NUM_THREADS ?= 1
TEST_WORKERS := -n $(WORKERS) --maxprocesses 4
endif

test: lint types
	$(BIN)/python -m pytest $(TEST_WORKERS) $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

demo: $(READY)
	$(BIN)/fastgoal demo $(DEMO_ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.device $(BENCH_ARGS)

# Not in requirements/: tests need none of it. What is pinned there stays as it is.
READY_DOCS := $(VENV)/.docs-$(DEFINITION)

$(READY_DOCS): $(READY)
	$(BIN)/uv pip install --python $(BIN)/python --constraint requirements/tested.txt \
		-r pyproject.toml --extra docs
	@touch $@

docs: $(READY_DOCS)
	$(BIN)/mkdocs build --strict --clean

# Pins for every supported Python. Stays with the versions that are there as far as it can.
$(BIN)/uv:
	$(NEW_ENVIRONMENT)

lock: $(BIN)/uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate \
		--custom-compile-command "make lock" $(LOCK_ARGS) pyproject.toml -o requirements/tested.txt

clean:
	rm -rf .benchmarks .cache .hypothesis .pytest_cache .ruff_cache build dist site *.egg-info
	find fastgoal_kernels fastgoal_models benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_TRITON36)
