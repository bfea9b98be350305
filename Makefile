# make demo    train a tiny model for a few minutes on real photos and look at what it does
# make test    everything that must hold, on a machine without a GPU
# make bench-gpu    every figure that needs a GPU, under 9 minutes; goes on where it stopped (GPU_ARGS=--dry: on the CPU)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
EXTRAS ?= train,export,tensorrt-rtx,openvino,dev

export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo test test-all bench-gpu lint clean
help:
	@sed -n 's/^# //p' Makefile

# One constraints file pins every version; left to itself pip would take a CUDA build of torch on any machine.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is too old; Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
setup: $(VENV)/.ready

demo: setup
	$(BIN)/python examples/demo.py

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

test-all: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# No set-up: on a GPU machine the torch that is there has CUDA. benchmarks/gpu.py says what else it needs.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
