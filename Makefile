# `make demo` and `make test` do all the set-up: they need Python 3.11 or later, a C++20 compiler
# and make; everything else comes from the package index into .venv. `make help` lists the targets.

PYTHON ?= python3
# Two processes with half of the files each; the one that is done first takes tests of the other.
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
STUDY_ARGS ?=
# ON: compiler warnings are errors. Off for users, whose compiler may know other warnings than ours.
STRICT ?= OFF

VENV := .venv
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported; pip would compile every file beforehand, on one core.
INSTALL := $(PIP) install --quiet --no-compile -c constraints.txt
GROUPS := .ci/print_groups.py
# Levels of the engine: native is this machine's and the baseline. The long tests and the
# benchmarks need all of them, and from then on everything has them.
NEEDS_ALL := $(filter test-long check-long bench,$(MAKECMDGOALS))
LEVELS := $(if $(NEEDS_ALL)$(wildcard $(VENV)/package-all.stamp),all,native)
PACKAGE := $(VENV)/package-$(LEVELS).stamp
SOURCES := $(shell find crfrefine configs kernels -type f ! -path '*/__pycache__/*' ! -name '*.so')
CPP_SOURCES := $(filter %.cpp %.h %.cu,$(SOURCES))

# Tests start hundreds of interpreters. They keep what they have compiled in one folder, even where
# the environment forbids it.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode
# Threads of PyTorch and OpenBLAS would wait for each other where two processes share two cores.
# PYTHONSAFEPATH keeps the source tree off the import path: tests meet the installed wheel.
RUN_TESTS = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CRFREFINE_TEST_INSTALLED=1 PYTHONSAFEPATH=1 \
  $(BIN)/pytest $(PYTEST_ARGS)

.PHONY: help demo setup test lint check format docs bench accuracy study browser clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /make \1\t/' \
	  | expand -t 26

demo: $(PACKAGE)  ## refine a phantom: masks, a picture and a table in demo/
	$(BIN)/crfrefine demo -o demo

setup: $(PACKAGE) $(VENV)/tools.stamp  ## .venv with the package and the tools of the tests

test: lint check  ## formatting, lint, types, and the tests of every room: minutes

lint: setup $(VENV)/train.stamp  ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	@# Of JavaScript, by what is installed: npm install --global typescript@5 eslint@9
	if command -v tsc; then tsc -p jsconfig.json; fi
	if command -v eslint; then eslint; fi

check: setup $(VENV)/train.stamp browser  ## the tests of make test; PYTEST_ARGS="-k lattice -x"
	$(RUN_TESTS) -m 'not long'

format: setup  ## rewrite the sources as the formatters want them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Not --quiet: what is not shown is not counted as an error either.
docs: $(DOCS_VENV)/docs.stamp  ## the site in build/docs; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(ASIDE) $(DOCS_VENV)/bin/mkdocs build --strict
	@echo 'Its search needs a server: $(PYTHON) -m http.server --directory build/docs'

bench: setup  ## speed beside other libraries (BENCH_ARGS="--quick" for a taste)
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

accuracy: setup  ## errors of the filters beside exact sums
	$(BIN)/python benchmarks/accuracy.py

study: setup $(VENV)/train.stamp  ## results on the cases of CRFREFINE_DATA (STUDY_ARGS="--quick")
	@$(BIN)/python $(GROUPS) study | $(INSTALL) -r /dev/stdin
	$(BIN)/python benchmarks/study.py $(STUDY_ARGS)

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) $(NNUNET_VENV) $(DOCS_VENV) build dist demo .bench .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- Environments, one installation after the other, also with `make -j`.

# What builds the package, pinned; anew when the list of tools changes.
$(VENV)/build.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'crfrefine needs Python 3.11 or later: make PYTHON=...'; exit 1; }
	@echo 'setting up $(VENV): a few seconds'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(GROUPS) build | $(INSTALL) -r /dev/stdin
	@touch $@

# The package, as users get it. build/ is kept, so that only changed C++ is compiled again.
$(VENV)/wheel-$(LEVELS).stamp: $(VENV)/build.stamp $(SOURCES) CMakeLists.txt README.md LICENSE
	@echo 'compiling what has changed of the engine: up to two minutes on two cores'
	@rm -rf dist
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
	  --config-settings=cmake.define.CRFREFINE_STRICT=$(STRICT) \
	  --config-settings=cmake.define.CRFREFINE_LEVELS=$(LEVELS) .
	@touch $@

$(PACKAGE): $(VENV)/wheel-$(LEVELS).stamp
	@echo 'installing the package and what it needs: some seconds'
	@$(PIP) uninstall --quiet --quiet --yes crfrefine
	@$(INSTALL) dist/*.whl
	@touch $@

$(VENV)/tools.stamp: $(VENV)/build.stamp | $(PACKAGE)
	@echo 'installing the tools of the tests: a minute or two'
	@$(BIN)/python $(GROUPS) test lint | $(INSTALL) -r /dev/stdin
	@touch $@

# torch, which training and its tests need and the demo does not.
$(VENV)/train.stamp: $(PACKAGE) | $(VENV)/tools.stamp
	@$(INSTALL) "$$(ls dist/*.whl)[train]"
	@touch $@

# The tools of the site read the package as text: an environment of their own.
$(DOCS_VENV)/docs.stamp: pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(GROUPS) docs | $(DOCS_VENV)/bin/python -m pip install --quiet \
	  --disable-pip-version-check -c constraints.txt -r /dev/stdin
	touch $@

# A browser for the tests of the page of `tune`, which are skipped without one.
browser:
	@sh tests/helpers/find_browser.sh

include .ci/long.mk
