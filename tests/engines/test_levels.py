"""The engine of every instruction level below this processor's: the other tests run on the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crfrefine.engines.compiled import ASKED_LEVEL, LEVELS, best_level, built_levels

ROOT = Path(__file__).resolve().parents[2]

# Chosen by what they cover: nearly all branches of kernels/cpu in few seconds (CONTRIBUTING.md, sanitizers).
TESTS = ROOT / "tests" / "helpers" / "sanitized_thread.txt"


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_engine_of_a_lower_level_passes_its_tests(level):
    """As a process of its own, because the level is chosen when the engine is first loaded."""
    best = best_level()
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"the best level of this processor and its engines is {best}: its own tests, or none")
    if level not in built_levels():
        pytest.skip(f"the engine was not compiled for {level}: CRFREFINE_LEVELS=all of CMakeLists.txt, as `make test` has it")
    if os.environ.get(ASKED_LEVEL) == level:
        pytest.skip(f"{ASKED_LEVEL} has all tests run on {level}")
    arguments = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", f"@{TESTS}"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {ASKED_LEVEL: level}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
