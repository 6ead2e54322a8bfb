"""`make wheels` finds what it needs and says what is missing; building is left to the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import try_wheel
from build_wheels import older


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
