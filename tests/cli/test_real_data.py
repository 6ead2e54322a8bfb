"""The command on real cases; CRFREFINE_DATA names their folder."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import load_nifti, run_here

from crfrefine.metrics.masks import OverlapCounts

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("CRFREFINE_DATA", BESIDE)) / "hippocampus"

pytestmark = [pytest.mark.long, pytest.mark.data, pytest.mark.skipif(not DATA.is_dir(), reason="needs the real cases: set CRFREFINE_DATA")]


@pytest.mark.parametrize("logits", ["logits", "logits_weak"])
def test_hippocampus_is_refined_on_its_grids_and_not_broken(tmp_path, logits):
    """Every 40th of the 120 cases."""
    data, summary = DATA, tmp_path / "summary.json"
    part = ("--num-parts", 40, "--part-id", 3)
    run_here("infer", "-i", data / "images", "-p", data / logits, "-o", tmp_path / "out", *part, "--summary", summary, status=0)
    changes = []
    for case in json.loads(summary.read_text())["cases"]:
        image = nib.load(data / "images" / f"{case['case_id']}_0000.nii.gz")
        refined = nib.load(case["output"])
        assert refined.shape == image.shape
        np.testing.assert_array_equal(refined.affine, image.affine)
        for transform in ("sform_code", "qform_code"):
            assert refined.header[transform] == image.header[transform]
        truth = np.rint(load_nifti(data / "labels" / f"{case['case_id']}.nii.gz"))
        before = load_nifti(data / logits / f"{case['case_id']}.nii.gz").argmax(axis=-1)
        after = np.asanyarray(refined.dataobj)
        assert 0 < case["voxels_changed"] == (before != after).sum() < 0.1 * before.size
        for label in (1, 2):
            changes.append(np.subtract(*(OverlapCounts.of_masks(found == label, truth == label).dice() for found in (after, before))))
    # Default parameters need not help; a sign or an axis that is wrong would cost far more than two points.
    assert len(changes) == 6
    assert np.mean(changes) > -0.02
