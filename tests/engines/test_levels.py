"""The engine of every instruction level below this processor's: the other tests run on the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crfrefine.engines.compiled import ASKED_LEVEL, LEVELS, best_level, built_levels

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]

# Short tests of each filter, forward and backward, of tiles and of shared channels.
CHOSEN = "(brute_force or threads or documented or transcribed or zeros) and not cuda and not torch"


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_engine_of_a_lower_level_passes_its_tests(level):
    """As a process of its own, because the level is chosen when the engine is first loaded."""
    best = best_level()
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"the best level of this processor and its engines is {best}: its own tests, or none")
    if level not in built_levels():
        pytest.skip(f"the engine was not compiled for {level}: CRFREFINE_LEVELS=all of CMakeLists.txt, as `make test-long` has it")
    if os.environ.get(ASKED_LEVEL) == level:
        pytest.skip(f"{ASKED_LEVEL} has all tests run on {level}")
    options = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not long", "-k", CHOSEN]
    command = [sys.executable, *options, "tests/engines", "tests/refinement"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {ASKED_LEVEL: level}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
