"""The workflows of the examples run where their engines are installed; the function for MATLAB is valid and writes NIfTI files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from cli_helpers import Folders, load_nifti, run_here, save_nifti, write_folders

from crfrefine.demo.phantom import make_phantom

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


def options_of(folders: Folders, labels: Path) -> dict[str, object]:
    given = {"images": folders.images, "logits": folders.logits, "labels": labels, "output": "out"}
    return {**given, "command": f"{sys.executable} -m crfrefine"}


def run_in(folder: Path, *arguments: object) -> None:
    done = subprocess.run(list(map(str, arguments)), cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_snakemake(tmp_path):
    snakemake = program("snakemake")
    folders, labels = write_study(tmp_path)
    options = options_of(folders, labels)
    config = [f"{name}={value}" for name, value in options.items()]
    run_in(tmp_path, snakemake, "-s", EXAMPLES / "workflows" / "Snakefile", "--cores", 1, "--config", *config)
    check_study(folders, tmp_path / "out", tmp_path)


def test_nextflow(tmp_path):
    nextflow = program("nextflow")
    folders, labels = write_study(tmp_path)
    options = options_of(folders, labels)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run_in(tmp_path, nextflow, "run", EXAMPLES / "workflows" / "main.nf", *words)
    check_study(folders, tmp_path / "out", tmp_path)


# ---- MATLAB and Octave

FUNCTION = EXAMPLES / "matlab" / "crfrefine_infer.m"


def test_octave_refines(tmp_path):
    octave = program("octave-cli")
    folders = write_folders(tmp_path, "a")
    arrays = [folders.logits / "a.nii.gz", folders.images / "a_0000.nii.gz"]
    for name, path in zip(("logits", "image"), arrays, strict=True):
        values = np.asarray(load_nifti(path), np.float32)
        (tmp_path / f"{name}.raw").write_bytes(values.tobytes(order="F"))
    shape = load_nifti(arrays[0]).shape
    (tmp_path / "crfrefine").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m crfrefine "$@"\n', encoding="utf-8")
    (tmp_path / "crfrefine").chmod(0o755)
    code = (
        f"addpath('{FUNCTION.parent}'); g = {list(shape[:3])};"
        f"l = reshape(fread(fopen('logits.raw'), Inf, 'single=>single'), {list(shape)});"
        "i = reshape(fread(fopen('image.raw'), Inf, 'single=>single'), g);"
        "r = crfrefine_infer(l, i, [1 1.25 2.5], 'command', './crfrefine', 'threads', 1);"
        "f = fopen('labels.raw', 'w'); fwrite(f, r, 'uint8'); fclose(f);"
    )
    run_in(tmp_path, octave, "--eval", code)
    affine = np.diag([1.0, 1.25, 2.5, 1.0])
    image = save_nifti(tmp_path / "image.nii", np.asarray(load_nifti(arrays[1]), np.float32), affine)
    logits = save_nifti(tmp_path / "logits.nii", load_nifti(arrays[0]), affine)
    assert run_here("infer", "-i", image, "-p", logits, "-o", tmp_path / "wanted.nii", "-q").status == 0
    found = np.frombuffer((tmp_path / "labels.raw").read_bytes(), np.uint8).reshape(shape[:3], order="F")
    np.testing.assert_array_equal(found, load_nifti(tmp_path / "wanted.nii"))


@pytest.mark.parametrize("language", [("--octave", "7.0"), ("--matlab", "2020b")], ids=["octave", "matlab"])
def test_the_function_for_matlab_can_be_parsed(language):
    linter = program("mh_lint")
    done = subprocess.run([linter, *language, str(FUNCTION)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_header_that_the_function_writes_is_nifti(tmp_path):
    """Its calls of fwrite, done by Python with the same numbers: the file is the one that nibabel reads, values in the same order."""
    body = FUNCTION.read_text(encoding="utf-8").partition("function write_nifti")[2].partition("\nend\n")[0]
    values = np.arange(3 * 4 * 5 * 2, dtype=np.float32).reshape(3, 4, 5, 2)
    spacing, extents = np.array([0.9, 1.5, 2.5]), np.array(values.shape)
    kinds = {"int32": "<i4", "uint8": "u1", "int16": "<i2", "single": "<f4"}
    content = b""
    for given, kind in re.findall(r"fwrite\(id, (.+), '(\w+)'\);", body):
        python = {
            "extents(4) > 1": "(extents[3] > 1)",
            "[3 + ((extents[3] > 1)), extents,": "[3 + (extents[3] > 1), *extents,",
            "spacing(:)'": "*spacing",
            "zeros(1, ": "zeros((",
            "uint8('n+1')": "*b'n+1'",
        }
        for matlab, own in python.items():
            given = given.replace(matlab, own)
        given = re.sub(r"zeros\(\((.+?)\)", r"np.zeros(int(\1))", given)
        given = re.sub(r"spacing\((\d)\)", lambda found: f"spacing[{int(found[1]) - 1}]", given)
        numbers = np.asarray(eval(given, {"np": np, "spacing": spacing, "extents": extents, "values": values}))
        content += numbers.astype(kinds[kind]).tobytes(order="F")
    (tmp_path / "written.nii").write_bytes(content)
    found = nibabel.load(tmp_path / "written.nii")
    np.testing.assert_allclose(found.affine, np.diag([0.9, 1.5, 2.5, 1.0]), rtol=1e-6)
    assert found.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(found.dataobj), values)
