"""The workflows of the examples run where their engines are installed; the function for MATLAB is valid and writes NIfTI files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Folders, load_nifti, run_here, save_nifti, write_folders

from crfrefine.apps.demo.phantom import make_phantom

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CASES = ("a", "b c")
BESIDE = str(Path(sys.executable).parent)


def program(name: str) -> str:
    found = shutil.which(name, path=f"{BESIDE}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def write_study(root: Path) -> tuple[Folders, Path]:
    """Cases with labels; one name has a blank."""
    folders = write_folders(root, *CASES)
    for seed, name in enumerate(CASES):
        shape = load_nifti(folders.images / f"{name}_0000.nii.gz").shape
        save_nifti(root / "labels" / f"{name}.nii.gz", make_phantom(seed, shape, (1.0, 1.25, 2.5)).labels)
    return folders, root / "labels"


def check_study(folders: Folders, output: Path, tmp_path: Path) -> None:
    assert run_here("infer", "-i", folders.images, "-p", folders.logits, "-o", tmp_path / "wanted", "-q").status == 0
    for name in CASES:
        found, wanted = (load_nifti(folder / f"{name}.nii.gz") for folder in (output / "refined", tmp_path / "wanted"))
        np.testing.assert_array_equal(found, wanted)
    assert (output / "report" / "report.html").is_file()


def run_in(folder: Path, *arguments: object) -> None:
    done = subprocess.run(list(map(str, arguments)), cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("engine", ["snakemake", "nextflow"])
def test_a_workflow_refines_and_evaluates(engine, tmp_path):
    found = program(engine)
    folders, labels = write_study(tmp_path)
    given = {"images": folders.images, "logits": folders.logits, "labels": labels, "output": "out"}
    options = {**given, "command": f"{sys.executable} -m crfrefine"}
    if engine == "snakemake":
        config = [f"{name}={value}" for name, value in options.items()]
        run_in(tmp_path, found, "-s", EXAMPLES / "workflows" / "Snakefile", "--cores", 1, "--config", *config)
    else:
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        run_in(tmp_path, found, "run", EXAMPLES / "workflows" / "main.nf", *words)
    check_study(folders, tmp_path / "out", tmp_path)


# ---- MATLAB and Octave

FUNCTION = EXAMPLES / "matlab" / "crfrefine_infer.m"


@pytest.mark.parametrize("language", [("--octave", "7.0"), ("--matlab", "2020b")], ids=["octave", "matlab"])
def test_the_function_for_matlab_can_be_parsed(language):
    linter = program("mh_lint")
    done = subprocess.run([linter, *language, str(FUNCTION)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
