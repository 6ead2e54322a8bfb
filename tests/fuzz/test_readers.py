"""Ten thousand damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_dicom import dicom_targets
from fuzz_runs import run_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets

RUN = Path(__file__).with_name("run.py")
NAMES = [target.name for target in (*volume_targets(), *dicom_targets(), *text_targets(), *run_targets())]


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[subprocess.Popen[str]]:
    """One that is asked for one kind of file after the other, and forks for each: its start takes as long as a thousand inputs."""
    command = [sys.executable, RUN, "--ask", "--inputs", "10000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate(timeout=60)


def report(fuzzer: subprocess.Popen[str], name: str) -> str:
    assert fuzzer.stdin is not None
    assert fuzzer.stdout is not None
    print(name, file=fuzzer.stdin, flush=True)
    return "".join(itertools.takewhile(lambda line: line != "\f\n", fuzzer.stdout))


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_inputs(name: str, fuzzer: subprocess.Popen[str]) -> None:
    found = report(fuzzer, name)
    words = found.split()
    assert words[:1] == [name], "the fuzzer has ended"
    inputs, taken, refused, findings = (int(words[place]) for place in (1, 3, 5, 7))
    assert findings == 0, found[-5000:]
    assert inputs == taken + refused == 10_000
    assert taken >= 200, "too few inputs come as far as the voxels or the values"
    assert refused >= 2000, "too little is damaged"
