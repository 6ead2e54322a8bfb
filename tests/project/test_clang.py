"""clang, which builds the wheels, takes the engine's sources without a warning; the tests' own engine is built by gcc."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

FLAGS = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fno-math-errno", "-ffp-contract=fast"]


def compiler(level: str) -> list[str]:
    """clang for a level of x86-64; skip the test where there is none."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1))):
        if (found := shutil.which(name)) is not None:
            return [found, f"-march={level}"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu", f"-mcpu={level.replace('-', '_')}"]
    pytest.skip("needs clang: clang++, or the package ziglang, which `make wheels` installs in an environment of its own")


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="compiles for x86-64 and Linux")
@pytest.mark.parametrize(
    ("source", "level"),
    [("lattice_geometry", "v2"), ("tile_set", "v3"), ("truncated", "v3"), ("window_moments", "v4"), ("spatial", "v4")],
)
def test_clang_compiles_the_engine_without_a_warning(source, level, tmp_path):
    """Sources that together take every part of simd.h and lane_types.h. What they compute is tested with the wheels."""
    command = [*compiler(f"x86-64-{level}"), *FLAGS, "-I", str(KERNELS), "-c", str(KERNELS / "cpu" / f"{source}.cpp")]
    done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
