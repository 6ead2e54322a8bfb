"""Suite `startup`: what a shell loop over small cases pays for each call, and a program for its first one.

The case is as large as a hippocampus of the Medical Segmentation Decathlon. Processor time is compared with that of importing numpy and
nibabel, which any program on such files begins with. Bytecode is cached, files are in the page cache.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from processes import measure_command, time_command
from workloads import WORKLOADS, make

COMMAND = Path(sys.executable).with_name("crfrefine")
YARDSTICK = "import numpy, nibabel"
CASE = replace(WORKLOADS["S"], name="hippocampus", grid_shape=(35, 51, 35), num_labels=3)
_FIRST_REFINE = """
import sys, numpy, crfrefine
logits, image = map(numpy.load, sys.argv[1:3])
for _ in range(int(sys.argv[3])):
    crfrefine.refine(logits, image, spacing=(1, 1, 1), threads=1)
"""


def _commands(folder: Path) -> dict[str, Sequence[str | Path]]:
    arrays = make(CASE)
    image, logits = folder / "case_0000.nii.gz", folder / "case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(arrays.image[0], np.eye(4)), image)
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(arrays.logits, 0, -1), np.eye(4)), logits)
    np.save(folder / "logits.npy", arrays.logits)
    np.save(folder / "image.npy", arrays.image)
    refine: list[str | Path] = [sys.executable, "-c", _FIRST_REFINE, folder / "logits.npy", folder / "image.npy"]
    return {
        YARDSTICK: [sys.executable, "-c", YARDSTICK],
        "crfrefine --help": [COMMAND, "--help"],
        "crfrefine info FILE": [COMMAND, "info", image],
        "crfrefine infer": [COMMAND, "infer", "-q", "--threads", "1", "-i", image, "-p", logits, "-o", folder / "refined.nii.gz"],
        "crfrefine.refine, the first of a process": [*refine, "1"],
        "crfrefine.refine, two of a process": [*refine, "2"],
    }


def run(*, quick: bool) -> dict[str, Any]:
    """Wall and processor seconds of 15 calls (5 when quick), one of each after the other."""
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        for name, command in commands.items():
            time_command(command)
            record[name] = {"wall": [], "processor": []}
        for _ in range(5 if quick else 15):
            for name, command in commands.items():
                measured = measure_command(command)
                record[name]["wall"].append(measured["seconds"])
                record[name]["processor"].append(measured["processor_seconds"])
    return record
