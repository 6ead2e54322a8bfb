"""Runs the command as a process or in this one, and writes small cases with nibabel alone, not with
the code under test.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import io_helpers
import nibabel as nib
import numpy as np

import crfrefine
from crfrefine.demo.phantom import make_phantom
from crfrefine.records.records import RECORD_FOLDER

GRID_SHAPE = (18, 15, 11)  # no two axes alike
SPACING = (1.0, 1.25, 2.5)  # mm, nor two spacings
NUM_LABELS = 4
# A rotation by a quarter turn and two flips: x of the array is not x of the world.
AFFINE = np.array(
    [[0.0, -1.25, 0.0, 10.0], [1.0, 0.0, 0.0, -20.0], [0.0, 0.0, -2.5, 30.0], [0.0, 0.0, 0.0, 1.0]]
)


FAST = ("--set", "mean_field.filter=lattice")  # in place of all pairs of voxels
HERE = ("--no-report", "--processes", 1)  # of `evaluate`, which starts no process then


Result = namedtuple("Result", "status stdout stderr")


def command(*arguments):
    return [sys.executable, "-m", "crfrefine", *map(str, arguments)]


def run_process(*arguments, timeout=120, status=None, **options):
    """Run the command as users do. `status`: how it must end."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    assert status in (None, done.returncode), done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def wait_for(condition, process=None, seconds=60):
    """Wait for something that is to come while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, (
            "the run ended before it could be disturbed"
        )
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run_here(*arguments, status=None):
    """Run the command in this process: no start-up time, and exceptions that are bugs come through.
    `status`: how it must end.
    """
    from crfrefine.cli.main import app

    out = io.StringIO()
    err = io.StringIO()
    found = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([str(argument) for argument in arguments], prog_name="crfrefine")
        except SystemExit as leave:
            found = int(leave.code or 0)
    assert status in (None, found), err.getvalue()
    return Result(found, out.getvalue(), err.getvalue())


def set_streaming(monkeypatch, streams=True):
    """Have channels stay in their files, or be read as a whole, whatever their size."""
    for limit in ("MAX_IN_MEMORY", "MIN_STREAMED"):
        monkeypatch.setattr(f"crfrefine.cases.memory.{limit}", 0 if streams else 1 << 40)


def save_nifti(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    return io_helpers.save_nifti(path, values, affine)


def load_nifti(path):
    return np.asanyarray(nib.load(path).dataobj)


def record_path(folder):
    return folder / RECORD_FOLDER / "record.jsonl"


class Folders(NamedTuple):
    """A folder of images, one of logits, and one for the results."""

    images: Path
    logits: Path
    output: Path

    @property
    def arguments(self):
        return ("-i", self.images, "-p", self.logits, "-o", self.output)

    def image(self, case_id):
        return np.stack(
            [load_nifti(path) for path in sorted(self.images.glob(f"{case_id}_*"))]
        ).astype(np.float32)

    def scores(self, case_id):
        """Logits (L, x, y, z)."""
        return np.moveaxis(load_nifti(self.logits / f"{case_id}.nii.gz"), -1, 0)


def infer(folders, *options, status=None):
    return run_here("infer", *folders.arguments, *FAST, *options, status=status)


def summary_of(folders, *options, status=0):
    """Run the command; return its summary."""
    path = folders.output.with_name("summary.json")
    infer(folders, "--summary", path, *options, status=status)
    return json.loads(path.read_text())


def refined(folders, case_id, changes=(), **options):
    """What the public function gives for the arrays of a case."""
    parameters = crfrefine.CrfParameters().replace(
        **{"mean_field.filter": "lattice", **dict(changes)}
    )
    options = {"spacing": SPACING, "parameters": parameters, **options}
    return crfrefine.refine(folders.scores(case_id), folders.image(case_id), **options).label_map


def errors(text):
    """The lines of errors, without the time of day before those of cases."""
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]
    return [line for line in lines if line.startswith("crfrefine: error: ")]


def statuses(result):
    """Case and status, of each line of the table of `infer`."""
    return [tuple(line.split("\t")[:2]) for line in result.stdout.splitlines()[1:]]


def write_case(folders, case_id, seed=0):
    phantom = make_phantom(seed, GRID_SHAPE, SPACING)
    for modality, values in enumerate(phantom.image):
        save_nifti(folders.images / f"{case_id}_{modality:04d}.nii.gz", values.astype(np.int16))
    save_nifti(folders.logits / f"{case_id}.nii.gz", np.moveaxis(phantom.logits, 0, -1))


def write_folders(root, *case_ids):
    """Write small cases that differ from each other, in nnU-Net's naming."""
    folders = Folders(root / "images", root / "logits", root / "out")
    for seed, case_id in enumerate(case_ids):
        write_case(folders, case_id, seed)
    return folders


def files_in(folder):
    """Return all names in a folder, hidden ones too, but not the folder of records."""
    return (
        sorted(path.name for path in folder.iterdir() if path.name != RECORD_FOLDER)
        if folder.is_dir()
        else []
    )
