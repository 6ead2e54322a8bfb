"""The instruction level that the engine finds: by it the best of the compiled modules is chosen, or it is said which one is missing."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crfrefine
from crfrefine.engines.compiled import ASKED_LEVEL, LEVELS, best_level, built_levels, processor_level

# What Linux says of each level beyond the one before, of x86-64-v3 and x86-64-v4.
NEEDED = {
    "avx2": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs x86-64 and Linux")
def test_the_level_is_what_the_system_says_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    expected = "baseline"
    for level, needed in NEEDED.items():
        if not needed <= flags:
            break
        expected = level
    assert processor_level() == expected
    supported = LEVELS[: LEVELS.index(expected) + 1]
    assert best_level() == max(set(supported) & set(built_levels()), key=LEVELS.index)


def run_without(level, folder, code, **environment):
    """Run Python with a copy of the package from which an engine is taken away."""
    ignored = shutil.ignore_patterns(f"_engine_{level}.*", "__pycache__")
    shutil.copytree(Path(crfrefine.__file__).parent, folder / "crfrefine", ignore=ignored)
    own = {name: value for name, value in os.environ.items() if name != ASKED_LEVEL} | {"PYTHONPATH": str(folder)} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.skipif(best_level() == "baseline", reason="needs an engine above the baseline, and a processor that runs it")
def test_without_the_best_engine_the_next_one_runs_and_it_cannot_be_asked_for(tmp_path):
    """The message names the option that compiles it."""
    code = "from crfrefine.engines import compiled; print(compiled.load_engine().__name__, *compiled.built_levels())"
    done = run_without(best_level(), tmp_path / "next", code)
    rest = [level for level in built_levels() if level != best_level()]
    lower = [level for level in rest if LEVELS.index(level) < LEVELS.index(best_level())]
    assert done.stdout.split() == [f"crfrefine._engine_{lower[-1]}", *rest], done.stderr
    done = run_without(best_level(), tmp_path / "asked", code, **{ASKED_LEVEL: best_level()})
    assert f"{ASKED_LEVEL} asks for {best_level()}, but the engine was compiled for {' and '.join(rest)}; unset it" in done.stderr
    assert "--config-settings=cmake.define.CRFREFINE_LEVELS=all" in done.stderr
