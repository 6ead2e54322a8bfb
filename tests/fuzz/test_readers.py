"""Ten thousand damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_dicom import dicom_targets
from fuzz_runs import run_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets

RUN = Path(__file__).with_name("run.py")
NAMES = [target.name for target in (*volume_targets(), *dicom_targets(), *text_targets(), *run_targets())]


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_inputs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, RUN, "--target", name, "--inputs", "10000"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    words = done.stdout.split()
    inputs, taken, refused = (int(words[place]) for place in (1, 3, 5))
    assert inputs == taken + refused == 10_000
    assert taken >= 200, "too few inputs come as far as the voxels or the values"
    assert refused >= 2000, "too little is damaged"
