"""An evaluation says once, before the first case, what its inputs are taken for."""

import numpy as np
from cli_helpers import load_nifti, run_here, save_nifti
from evaluation_helpers import write_study

from crfrefine import io


def test_the_first_lines_say_what_each_input_is_taken_for(tmp_path):
    study = write_study(tmp_path, 2)
    for path in study.before.iterdir():
        channels = np.eye(3, dtype=np.float32)[load_nifti(path)]
        save_nifti(path, 4 * channels, io.read_header(path).affine)
    told = "reference: label map; prediction: label map; baseline before: 3 channels, logits or"
    lines = run_here(*study.arguments, status=0).stderr.splitlines()
    assert [told in line for line in lines[:2]] == [False, True]
    assert sum("baseline before" in line for line in lines) == 1
    lines = run_here(*study.arguments, "--verbose", status=0).stderr.splitlines()
    path = study.after / "case0.nii.gz"
    assert f"prediction: label map: {path}, the grid of the reference; one value" in lines[2]
    assert run_here(*study.arguments, "--quiet", status=0).stderr == ""
