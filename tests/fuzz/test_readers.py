"""Damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_planted import planted_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import Target, examine, fuzz

TARGETS = [*volume_targets(), *text_targets()]
PLANTED = {
    "raises": "KeyError: 'planted'",
    "crashes": "signal SIGSEGV",
    "ends": "the process ended with status 3",
    "hangs": "TookTooLong: not done in time",
    "waits": "Timeout",
    "grows": "it took more than 256 MiB",
    "asks-for-too-much": "MemoryError",
    "writes": "something was written to the standard streams",
    "floods": "characters: ",
    "steers": "not for a terminal",
    "hides-the-name": "does not name the file",
    "warns": "RuntimeWarning: planted",
    "integers": "ValueError: invalid literal for int",
    "finite": "AssertionError",
}


def test_a_few_inputs_of_each_kind(tmp_path: Path) -> None:
    """In this process, without limits: of each kind, some are taken and some refused. An input depends on its number alone."""
    for target in TARGETS:
        folder = tmp_path / target.name
        folder.mkdir()
        assert {examine(target, folder, seed) for seed in range(40)} == {True, False}, target.name
        files = target.make(random.Random(f"{target.name} 39"))
        assert files == {path.name: path.read_bytes() for path in folder.iterdir()}, target.name


@pytest.mark.parametrize("target", list(planted_targets()), ids=lambda target: target.name)
def test_planted_faults_are_found(target: Target, tmp_path: Path) -> None:
    """Also behind the first one: the run goes on. Of the patched readers, some of many inputs show it."""
    (tmp_path / "folder").mkdir()
    bad = [seed for seed in range(1, 300) if target.make(random.Random(f"{target.name} {seed}")) == {"a": b"\7"}]
    first, inputs = (bad[0] - 1, 4) if bad else (0, 200)
    found = fuzz(target, tmp_path / "folder", first=first, inputs=inputs)
    assert found.inputs == inputs
    assert found.findings
    if bad:
        # On a busy machine others may take too long besides.
        assert {finding.seed for finding in found.findings} >= {seed for seed in bad if seed < first + inputs}
    assert PLANTED[target.name.removeprefix("planted-")] in found.findings[0].what


def test_a_finding_is_made_again_by_its_number() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, Path(__file__).with_name("run.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = run("--target", "planted-raises", "--minutes", "0.003", "--seed", "3")
    assert done.returncode == 1
    again = re.search(r"finding: \S+ (--target \S+ --only [0-9]+)", done.stdout)[1].split()
    assert int(again[-1]) >= 3 << 32
    done = run(*again)
    assert "KeyError: 'planted'" in done.stderr
    assert r"a, 1 bytes: b'\x07'" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_inputs(target: Target, tmp_path: Path) -> None:
    (tmp_path / target.name).mkdir()
    found = fuzz(target, tmp_path / target.name, first=40, inputs=400)
    assert not found.findings, found.findings[0]
    assert found.taken >= 8, "too few inputs come as far as the voxels or the values"
    assert found.refused >= 40, "too little is damaged"
