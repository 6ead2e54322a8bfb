"""`make release-check` finds what is missing for a release; building is left to the command itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import release_check
from release_check import ReleaseError, dated_section, sdist_problem, wheel_problem

SECTION = "# Changelog\n\nText.\n\n## [1.2.3] - 2026-11-21\n\n### Added\n\n- Something.\n\n## [1.2.2] - 2026-10-01\n\n- Older.\n"
WHEEL = [
    "crfrefine/__init__.py",
    "crfrefine/py.typed",
    "crfrefine/configs/default.toml",
    "crfrefine/_engine_baseline.cpython-311-x86_64-linux-gnu.so",
    "crfrefine/pages/report/assets/brainsprite-license.txt",
    "crfrefine-1.2.3.dist-info/METADATA",
    "crfrefine-1.2.3.dist-info/licenses/LICENSE",
]
SDIST = ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "pyproject.toml", "kernels/cpu/module.cpp"]


def test_a_section_without_version_date_or_text_is_a_problem():
    assert dated_section(SECTION, "1.2.3") == "[1.2.3] - 2026-11-21"
    for changelog, problem in (
        (SECTION.replace("2026-11-21", "unreleased"), "the day of the release"),
        (SECTION.replace("[1.2.3]", "[1.3.0]"), "expected one of 1.2.3"),
        (SECTION.replace("- Something.", ""), "says nothing"),
        ("# Changelog\n", "missing"),
    ):
        with pytest.raises(ReleaseError, match=problem):
            dated_section(changelog, "1.2.3")


def test_a_strange_or_a_missing_file_is_seen():
    assert wheel_problem(WHEEL) is None
    assert sdist_problem([*SDIST, "tests/io/test_nifti.py", "docs/pictures/tune.png"]) is None
    for name in ("crfrefine/case.nii.gz", "tests/test_io.py", "crfrefine/tests/a.py", "crfrefine/x.bin", "crfrefine/a.nii.txt"):
        assert name in wheel_problem([*WHEEL, name])
    for name in ("tests/data/a.nii.gz", "crfrefine/_engine_avx2.so", ".ci/run", ".github/x.yml"):
        assert name in sdist_problem([*SDIST, name])
    for name in WHEEL[1:]:
        assert (wheel_problem([other for other in WHEEL if other != name]) is None) == name.endswith("METADATA")
    for name in SDIST:
        assert name in sdist_problem([other for other in SDIST if other != name])


def test_a_missing_engine_of_the_wheel_is_named():
    """A wheel that is built on one machine has the engine of that machine's processor and the baseline."""
    assert wheel_problem(WHEEL, ("baseline", "avx2", "avx512")) == "has no compiled engine for avx2, avx512"
    engines = [name.replace("baseline", level) for name in WHEEL if "_engine_" in name for level in ("avx2", "avx512")]
    assert wheel_problem([*WHEEL, *engines], ("baseline", "avx2", "avx512")) is None


def test_version_and_tables_of_this_repository_agree():
    if not (release_check.ROOT / ".git").exists():
        pytest.skip("not a checkout: tags are looked up")
    words = [sys.executable, release_check.__file__, sys.executable, "--only", "version", "tables"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=Path(release_check.__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:16].split() for line in done.stdout.splitlines()[:2]] == [["ok", "version"], ["ok", "tables"]]
    assert "next: make test" in done.stdout
