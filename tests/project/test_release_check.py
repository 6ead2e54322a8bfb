"""`make release-check` finds what is missing for a release; building is left to the command itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import release_check
from release_check import ReleaseError, dated_section, missing_wheels, sdist_problem, wheel_problem

SECTION = "# Changelog\n\nText.\n\n## [1.2.3] - 2026-11-21\n\n### Added\n\n- Something.\n\n## [1.2.2] - 2026-10-01\n\n- Older.\n"
WHEEL = [
    "crfrefine/__init__.py",
    "crfrefine/py.typed",
    "crfrefine/configs/default.toml",
    "crfrefine/_engine_baseline.cpython-311-x86_64-linux-gnu.so",
    "crfrefine/report/assets/brainsprite-license.txt",
    "crfrefine-1.2.3.dist-info/METADATA",
    "crfrefine-1.2.3.dist-info/licenses/LICENSE",
]
SDIST = ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "pyproject.toml", "kernels/cpu/module.cpp"]


def test_a_section_with_a_date_is_right():
    assert dated_section(SECTION, "1.2.3") == "[1.2.3] - 2026-11-21"


@pytest.mark.parametrize(
    ("changelog", "problem"),
    [
        (SECTION.replace("2026-11-21", "unreleased"), "the day of the release"),
        (SECTION.replace("[1.2.3]", "[1.3.0]"), "expected one of 1.2.3"),
        (SECTION.replace("- Something.", ""), "says nothing"),
        ("# Changelog\n", "missing"),
    ],
)
def test_another_section_is_a_problem(changelog, problem):
    with pytest.raises(ReleaseError, match=problem):
        dated_section(changelog, "1.2.3")


def test_files_that_belong_into_a_release_are_no_problem():
    assert wheel_problem(WHEEL) is None
    assert sdist_problem([*SDIST, "tests/io/test_nifti.py", "docs/pictures/tune.png"]) is None


@pytest.mark.parametrize(
    "name",
    ["crfrefine/case.nii.gz", "tests/test_io.py", "crfrefine/tests/a.py", "crfrefine/logits.npz", "crfrefine/x.bin", "crfrefine/a.nii.txt"],
)
def test_a_strange_file_in_the_wheel_is_seen(name):
    assert name in wheel_problem([*WHEEL, name])


@pytest.mark.parametrize("name", ["tests/data/a.nii.gz", "crfrefine/_engine_avx2.so", ".ci/run", ".github/x.yml"])
def test_a_strange_file_in_the_source_distribution_is_seen(name):
    assert name in sdist_problem([*SDIST, name])


@pytest.mark.parametrize("place", range(1, len(WHEEL)))
def test_a_missing_file_of_the_wheel_is_seen(place):
    found = wheel_problem(WHEEL[:place] + WHEEL[place + 1 :])
    assert (found is None) == WHEEL[place].endswith("METADATA")


@pytest.mark.parametrize("name", SDIST)
def test_a_missing_file_of_the_source_distribution_is_seen(name):
    assert name in sdist_problem([other for other in SDIST if other != name])


def test_a_missing_engine_of_the_wheel_is_named():
    """A wheel that is built on one machine has the engine of that machine's processor and the baseline."""
    assert wheel_problem(WHEEL, ("baseline", "avx2", "avx512")) == "has no compiled engine for avx2, avx512"
    engines = [name.replace("baseline", level) for name in WHEEL if "_engine_" in name for level in ("avx2", "avx512")]
    assert wheel_problem([*WHEEL, *engines], ("baseline", "avx2", "avx512")) is None


def test_a_missing_kind_of_wheel_is_named():
    """Another version's does not count, nor one that is of the building system alone."""
    tags = ["cp311-cp311-manylinux_2_28_x86_64", "cp312-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64", "cp311-cp311-linux_aarch64"]
    names = [f"crfrefine-1.2.3-{tag}.whl" for tag in tags]
    assert missing_wheels(names, "1.2.3") == ["cp311-cp311 for aarch64", "cp312-abi3 for aarch64"]
    assert len(missing_wheels(names, "1.2.4")) == 4


def test_version_and_tables_of_this_repository_agree():
    if not (release_check.ROOT / ".git").exists():
        pytest.skip("not a checkout: tags are looked up")
    words = [sys.executable, release_check.__file__, sys.executable, "--only", "version", "tables"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=Path(release_check.__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:16].split() for line in done.stdout.splitlines()[:2]] == [["ok", "version"], ["ok", "tables"]]
    assert "next: make test" in done.stdout
