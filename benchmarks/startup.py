"""Suite `startup`: what a shell loop pays for each call of the command."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from processes import time_command

COMMAND = Path(sys.executable).with_name("crfrefine")


def run(*, quick: bool) -> dict[str, Any]:
    """Best and median of 15 calls (5 when quick), files in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        volume = Path(folder) / "case_0000.nii.gz"
        rng = np.random.default_rng(1)
        nibabel.save(nibabel.Nifti1Image(rng.standard_normal((120, 150, 100)).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0])), volume)
        commands = {"--help": [COMMAND, "--help"], "info FILE": [COMMAND, "info", volume]}
        record = {}
        for name, command in commands.items():
            time_command(command)
            seconds = sorted(time_command(command) for _ in range(5 if quick else 15))
            record[name] = {"best": seconds[0], "median": seconds[len(seconds) // 2], "runs": seconds}
    return record
