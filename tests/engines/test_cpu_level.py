"""The instruction level that the engine finds: by it the best of the compiled modules is chosen."""

import platform
from pathlib import Path

import pytest

from crfrefine.engines.compiled import LEVELS, best_level

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
    assert best_level() == expected
    assert expected in LEVELS
