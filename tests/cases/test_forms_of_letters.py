"""Names of cases that look alike belong together: macOS stores letters with accents taken apart."""

import unicodedata

import numpy as np
from cli_helpers import GRID_SHAPE, files_in, infer, run_here, save_nifti, write_folders

COMPOSED = unicodedata.normalize("NFC", "M\u00fcller")
APART = unicodedata.normalize("NFD", COMPOSED)


def test_infer_and_evaluate_pair_files_of_both_forms(tmp_path):
    folders = write_folders(tmp_path, APART, "b")
    logits = folders.logits / f"{APART}.nii.gz"
    logits.rename(folders.logits / f"{COMPOSED}.nii.gz")
    done = infer(folders, status=0)
    assert "without images" not in done.stderr
    names = files_in(folders.output)
    assert names == sorted([f"{APART}.nii.gz", "b.nii.gz"])
    labels = tmp_path / "labels"
    for name in (COMPOSED, "b"):
        save_nifti(labels / f"{name}.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    arguments = ("evaluate", folders.output, labels, "-o", tmp_path / "report", "--no-report")
    done = run_here(*arguments, status=0)
    assert "2 cases" in done.stderr
    assert "left out" not in done.stderr


def test_names_of_one_folder_in_both_forms_are_two_cases(tmp_path):
    folders = write_folders(tmp_path, APART, COMPOSED)
    infer(folders, status=0)
    assert files_in(folders.output) == sorted([f"{APART}.nii.gz", f"{COMPOSED}.nii.gz"])
