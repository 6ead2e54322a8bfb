"""CMake chooses the instruction sets that the engine is compiled for; here it configures, and compiles nothing of the engine."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crfrefine.engines.compiled import LEVELS, processor_level

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=Path(sys.executable).parent)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CMAKE is None or importlib.util.find_spec("nanobind") is None or platform.machine() != "x86_64",
        reason="needs CMake and nanobind beside Python, and an x86-64 processor",
    ),
]


def configure(folder, *definitions):
    assert CMAKE is not None
    options = [f"-D{definition}" for definition in (f"Python_EXECUTABLE={sys.executable}", *definitions)]
    return subprocess.run([CMAKE, "-S", ROOT, "-B", folder, *options], capture_output=True, text=True, check=False)


def levels_of(done):
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "The engine is compiled for" in line)
    return line.partition(": ")[2].split(";")


def test_a_build_has_this_machines_level_and_the_baseline(tmp_path):
    assert levels_of(configure(tmp_path)) == list(dict.fromkeys(["baseline", processor_level()]))
    assert levels_of(configure(tmp_path, "CRFREFINE_LEVELS=all")) == list(LEVELS), "the other levels are added in the same folder"
    assert levels_of(configure(tmp_path, "CRFREFINE_LEVELS=avx2")) == ["baseline", "avx2"], "the baseline tells what the processor runs"
    assert levels_of(configure(tmp_path / "b", "CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=aarch64")) == ["baseline"]
    done = configure(tmp_path / "c", "CRFREFINE_LEVELS=avx2;sse2")
    assert done.returncode != 0
    assert "CRFREFINE_LEVELS has sse2; expected native, all, or some of: baseline;avx2;avx512" in " ".join(done.stderr.split())
