"""`make wheels` finds what it needs and says what is missing; building is left to the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import build_wheels
import numpy as np
import pytest
import try_wheel
import wheel_marginals
from build_wheels import COMPILER, older, pythons_to_build_for
from release_check import ReleaseError


def test_this_python_builds_a_wheel_of_its_kind():
    expected = "cp311" if sys.version_info < build_wheels.FIRST_OF_STABLE_ABI else "cp312-abi3"
    assert pythons_to_build_for([Path(sys.executable)]) == {expected: Path(sys.executable)}


def test_a_python_that_does_not_run_is_named(tmp_path):
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\necho no such version >&2\nexit 127\n", encoding="utf-8")
    broken.chmod(0o755)
    with pytest.raises(ReleaseError, match=r"python3\.11 does not run: no such version"):
        pythons_to_build_for([broken])


@pytest.mark.parametrize(
    ("description", "header"),
    [
        ("[[3, 10], false, '{}']", "SIZEOF_LONG"),
        ("[[3, 13], true, '{}']", "SIZEOF_LONG"),
        ("[[3, 12], false, '{}']", "include <x86_64-linux-gnu/x>"),
    ],
    ids=["too old", "without the lock", "header of one processor"],
)
def test_a_python_that_cannot_build_is_refused(tmp_path, description, header):
    (tmp_path / "pyconfig.h").write_text(header, encoding="utf-8")
    python = tmp_path / "python"
    said = description.format(tmp_path / "pyconfig.h").replace("'", '"')
    python.write_text(f"#!/bin/sh\necho '{said}'\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(ReleaseError, match=r"expected CPython 3\.11 or later"):
        pythons_to_build_for([python])


def test_the_compiler_gets_its_own_names_of_processors(tmp_path):
    """Words with blanks stay one word."""
    zig, script = tmp_path / "zig", tmp_path / "x86_64-c++"
    zig.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    script.write_text(COMPILER.format(zig=zig, arch="x86_64", glibc="2.28"), encoding="utf-8")
    for file in (zig, script):
        file.chmod(0o755)
    done = subprocess.run([script, "-march=x86-64-v3", "-DX=a b", "a.cpp"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["c++", "-target", "x86_64-linux-gnu.2.28", "-march=x86_64_v3", "-DX=a b", "a.cpp"]


@pytest.mark.parametrize(("found", "runs"), [("2_17", True), ("2_28", True), ("2_34", False)])
def test_tags_of_newer_systems_are_no_older_ones(found, runs):
    assert older([f"manylinux_{found}_aarch64"], "manylinux_2_28_aarch64") is runs


V3 = "fpu sse2 ssse3 sse4_1 sse4_2 popcnt movbe f16c fma avx avx2 bmi1 bmi2 abm"
V4 = f"{V3} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (V4, "avx512"),
        (V3, "avx2"),
        (V4.replace(" avx512vl", ""), "avx2"),
        (V4.replace(" fma", ""), "baseline"),
        (V3.replace(" avx2", " avx2_else"), "baseline"),
        ("fpu sse2", "baseline"),
    ],
)
def test_a_processor_has_a_level(flags, level):
    """Each processor has lines of its own; the first one's count."""
    text = f"processor\t: 0\nvmx flags\t: ept\nflags\t\t: {flags}\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: {V4}\n"
    assert try_wheel.level_of(text) == level


def test_wheels_for_other_processors_have_one_engine():
    assert try_wheel.expected_level(Path("crfrefine-1.2.3-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl")) == "baseline"


def test_an_engine_at_another_level_fails_a_trial(capsys):
    report = json.dumps({"engine": {"level": "baseline", "best_level": "baseline"}})
    with pytest.raises(try_wheel.TrialError, match="runs as baseline; expected avx512"):
        try_wheel.check_level(report, "avx512")
    try_wheel.check_level(report, "baseline")
    assert "as expected" in capsys.readouterr().out


def test_what_emulation_needs_is_named(tmp_path, monkeypatch):
    python, aarch64 = Path("/usr/bin/python3"), Path("crfrefine-1.2.3-cp311-cp311-manylinux_2_17_aarch64.whl")
    with pytest.raises(try_wheel.TrialError, match="expected a wheel for one of x86_64, aarch64"):
        try_wheel.emulated(Path("crfrefine-1.2.3-cp311-cp311-linux_riscv64.whl"), python, tmp_path, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(try_wheel.TrialError, match="install qemu-user"):
        try_wheel.emulated(aarch64, python, tmp_path, tmp_path)
    (tmp_path / "qemu-aarch64").touch(mode=0o755)
    with pytest.raises(try_wheel.TrialError, match="has no /usr/bin/python3"):
        try_wheel.emulated(aarch64, python, tmp_path, tmp_path)


def test_marginals_that_differ_are_seen(tmp_path, monkeypatch):
    """With one case: a file against itself, against a change beyond the tolerance, and against other inputs."""
    monkeypatch.setattr(wheel_marginals, "CASES", {"grid": {"mean_field.filter": "grid"}})
    monkeypatch.setattr(wheel_marginals, "LABELS", (3,))
    ours, theirs, strange = tmp_path / "ours.npz", tmp_path / "theirs.npz", tmp_path / "strange.npz"
    wheel_marginals.write(ours)
    with np.load(ours) as file:
        arrays = dict(file)
    np.testing.assert_allclose(arrays["grid, 3 labels"].sum(0), 1, atol=1e-5)  # sums of three float32, each rounded once
    arrays["grid, 3 labels"][2, 5, 3, 1] += 0.25
    np.savez(theirs, **arrays)
    np.savez(strange, **{**arrays, "inputs": np.array("others")})
    assert wheel_marginals.compare(ours, ours, 1e-6) == 0
    assert wheel_marginals.compare(ours, theirs, 1e-6) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(SystemExit, match="different cases"):
        wheel_marginals.compare(ours, strange, 1e-6)
