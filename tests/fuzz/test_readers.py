"""Damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_planted import planted_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import Target, examine, fuzz

RUN = Path(__file__).with_name("run.py")
TARGETS = [*volume_targets(), *text_targets()]


def test_a_few_inputs_of_each_kind(tmp_path: Path) -> None:
    """In this process, without limits: of each kind, some are taken and some refused."""
    for target in TARGETS:
        folder = tmp_path / target.name
        folder.mkdir()
        assert {examine(target, folder, seed) for seed in range(40)} == {True, False}, target.name


def test_planted_faults_are_found(tmp_path: Path) -> None:
    faults = {target.name: target for target in planted_targets()}
    for name, told in {"raises": "KeyError: 'planted'", "crashes": "signal SIGSEGV", "hides-the-name": "does not name the file"}.items():
        (tmp_path / name).mkdir()
        found = fuzz(faults[f"planted-{name}"], tmp_path / name, inputs=60)
        assert found.inputs == 60
        assert found.findings
        assert all(told in finding.what for finding in found.findings)


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[subprocess.Popen[str]]:
    """One that is asked for one kind of file after the other, and forks for each: its start takes as long as a thousand inputs."""
    command = [sys.executable, RUN, "--ask", "--inputs", "1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate(timeout=60)


def report(fuzzer: subprocess.Popen[str], name: str) -> str:
    assert fuzzer.stdin is not None
    assert fuzzer.stdout is not None
    print(name, file=fuzzer.stdin, flush=True)
    return "".join(itertools.takewhile(lambda line: line != "\f\n", fuzzer.stdout))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_inputs(target: Target, fuzzer: subprocess.Popen[str]) -> None:
    found = report(fuzzer, target.name)
    words = found.split()
    assert words[:1] == [target.name], "the fuzzer has ended"
    inputs, taken, refused, findings = (int(words[place]) for place in (1, 3, 5, 7))
    assert findings == 0, found[-5000:]
    assert inputs == taken + refused == 1000
    assert taken >= 20, "too few inputs come as far as the voxels or the values"
    assert refused >= 200, "too little is damaged"
