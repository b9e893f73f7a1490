# Everything from one command on a bare Debian 12: `make demo`, `make test`. `make` alone prints this.
#
#   make demo     trains, packs, saves and runs a ternary network; checks every claim; draws demo-output/demo.png
#
# Three lanes of tests; times on two idle cores, after the build:
#
#   make check      the quick C++ and Python tests, for every change: about 75 seconds
#   make test       all C++ and Python tests: about 6 minutes
#   make test-slow  sanitizers, fuzzing, emulated CPUs, the wheel, the guide's kernel: about 15 minutes
#
#   make setup    .venv with all that is needed, and the build
#   make build    compiles what has changed
#   make lint     ruff, mypy, clang-format       make format   rewrites the sources
#   make docs     the C++ reference as HTML in build/docs/html
#   make wheel    a wheel in dist/               make clean    removes all that was made, but .venv

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
BUILD := build
DIST := dist
JOBS ?= $(shell nproc)
CONFIGURE = cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DBITLAB_TORCH=ON \
  -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cc' '*.h')

.PHONY: help demo check test test-slow setup build lint format docs wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# Installs and builds what the demo needs, and no more.
demo: $(DONE)/package
	test -e $(BUILD)/build.ninja || $(CONFIGURE) -DBITLAB_TESTS=OFF
	cmake --build $(BUILD) --target bitcore_torch bitlab run_bitmlp
	$(BIN)/bitlab demo --output demo-output

# run_tests(options of ctest, options of pytest): both suites run, even if the first one fails.
define run_tests
@status=0; \
ctest --test-dir $(BUILD) --parallel $(JOBS) --output-on-failure $(1) || status=1; \
$(BIN)/python -m pytest $(2) || status=1; \
exit $$status
endef
WORKERS = --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal

check: setup
	$(call run_tests,--label-exclude 'medium|slow',-m 'not medium and not slow' $(WORKERS))

test: setup
	$(call run_tests,--label-exclude slow,-m 'not slow' $(WORKERS))

# One process of pytest: its tests build, and a build takes all cores.
test-slow: setup
	$(call run_tests,--label-regex slow,-m slow)

setup: $(DONE)/package build

build: $(DONE)/requirements $(BUILD)/.configured
	cmake --build $(BUILD)

# With the tests, which the demo does without.
$(BUILD)/.configured: $(DONE)/debian $(DONE)/torch
	$(CONFIGURE) -DBITLAB_TESTS=ON
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	clang-format --dry-run --Werror $(CPP_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	clang-format -i $(CPP_FILES)

docs: setup
	cmake --build $(BUILD) --target docs

wheel: setup
	scripts/build-wheel.sh $(BIN)/python $(DIST)

clean:
	rm -rf $(BUILD) $(DIST) demo-output python/bitcore/lib python/bitlab/lib

# --- what is installed, each step once -------------------------------------------------------------------------------

# What compiling needs.
$(DONE)/tools: scripts/install-debian-packages.sh
	scripts/install-debian-packages.sh build $(PYTHON)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# What the tests and the tools of developers need as well.
$(DONE)/debian: $(DONE)/tools
	scripts/install-debian-packages.sh development $(PYTHON)
	@touch $@

$(DONE)/torch: $(DONE)/tools
	$(BIN)/pip install torch==$(TORCH_VERSION)
	@touch $@

$(DONE)/requirements-demo: requirements-demo.txt $(DONE)/torch
	$(BIN)/pip install -r requirements-demo.txt
	@touch $@

$(DONE)/requirements: requirements-dev.txt $(DONE)/requirements-demo $(DONE)/debian
	$(BIN)/pip install -r requirements-dev.txt
	@touch $@

# Editable, and without compiling: the shared object lies in the tree, where `make build` writes it.
$(DONE)/package: pyproject.toml $(DONE)/requirements-demo
	$(BIN)/pip install --no-build-isolation --no-deps --config-settings=wheel.cmake=false -e .
	@touch $@
