"""The engine takes the best instruction level, or names the one that is missing; lower levels pass their tests, too."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crfrefine
from crfrefine.engines.compiled import ASKED_LEVEL, LEVELS, find_levels

ROOT = Path(__file__).resolve().parents[2]

# What Linux says of each level beyond the one before, of x86-64-v3 and x86-64-v4.
NEEDED = {
    "avx2": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
# Short tests of each filter, forward and backward, of tiles and of shared channels.
CHOSEN = "(brute_force or threads or documented or transcribed or zeros) and not cuda and not torch"


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs x86-64 and Linux")
def test_the_level_is_what_the_system_says_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    expected = "baseline"
    for level, needed in NEEDED.items():
        if not needed <= flags:
            break
        expected = level
    assert find_levels().processor == expected
    supported = LEVELS[: LEVELS.index(expected) + 1]
    assert find_levels().best == max(set(supported) & set(find_levels().built), key=LEVELS.index)


@pytest.mark.skipif(find_levels().best == "baseline", reason="needs an engine above the baseline, and a processor that runs it")
def test_without_the_best_engine_the_next_one_runs_and_it_cannot_be_asked_for(tmp_path):
    """In a copy of the package from which it is taken away; the message names the option that compiles it."""
    best = find_levels().best
    ignored = shutil.ignore_patterns(f"_engine_{best}.*", "__pycache__")
    shutil.copytree(Path(crfrefine.__file__).parent, tmp_path / "crfrefine", ignore=ignored)
    code = "from crfrefine.engines import compiled; print(compiled.load_engine().__name__, *compiled.find_levels().built)"
    plain = {name: value for name, value in os.environ.items() if name != ASKED_LEVEL} | {"PYTHONPATH": str(tmp_path)}
    done, asked = (
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain | more, capture_output=True, text=True, check=False)
        for more in ({}, {ASKED_LEVEL: best})
    )
    rest = [level for level in find_levels().built if level != best]
    lower = [level for level in rest if LEVELS.index(level) < LEVELS.index(best)]
    assert done.stdout.split() == [f"crfrefine._engine_{lower[-1]}", *rest], done.stderr
    assert f"{ASKED_LEVEL} asks for {best}, but the engine was compiled for {' and '.join(rest)}; unset it" in asked.stderr
    assert "--config-settings=cmake.define.CRFREFINE_LEVELS=all" in asked.stderr


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_engine_of_a_lower_level_passes_its_tests(level):
    """As a process of its own, because the level is chosen when the engine is first loaded."""
    best = find_levels().best
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"the best level of this processor and its engines is {best}: its own tests, or none")
    if level not in find_levels().built:
        pytest.skip(f"the engine was not compiled for {level}: CRFREFINE_LEVELS=all of CMakeLists.txt, as `make test-long` has it")
    if os.environ.get(ASKED_LEVEL) == level:
        pytest.skip(f"{ASKED_LEVEL} has all tests run on {level}")
    options = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not long", "-k", CHOSEN]
    command = [sys.executable, *options, "tests/engines", "tests/refinement"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {ASKED_LEVEL: level}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
