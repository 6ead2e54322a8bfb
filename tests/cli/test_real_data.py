"""The command on real cases; CRFREFINE_DATA names their folder."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from agreement_helpers import label_dice
from cli_helpers import data_folder, files_in, load_nifti, run_here

pytestmark = [
    pytest.mark.long,
    pytest.mark.data,
    pytest.mark.skipif(not (data_folder() / "hippocampus").is_dir(), reason="needs the real cases: set CRFREFINE_DATA"),
]


def hippocampus_part(output: Path, logits: str, *options: object) -> dict:
    """Refine every 24th of the 120 cases."""
    data = data_folder() / "hippocampus"
    summary = output.with_name("summary.json")
    part = ("--num-parts", 24, "--part-id", 3)
    result = run_here("infer", "-i", data / "images", "-p", data / logits, "-o", output, *part, "--summary", summary, *options)
    assert result.status == 0, result.stderr
    return json.loads(summary.read_text())


@pytest.mark.parametrize("logits", ["logits", "logits_weak"])
def test_hippocampus_is_refined_on_its_grids_and_not_broken(tmp_path, logits):
    summary = hippocampus_part(tmp_path / "out", logits)
    assert summary["num_done"] == 5
    data = data_folder() / "hippocampus"
    changes = []
    for case in summary["cases"]:
        image = nib.load(data / "images" / f"{case['case_id']}_0000.nii.gz")
        refined = nib.load(case["output"])
        assert refined.shape == image.shape
        np.testing.assert_array_equal(refined.affine, image.affine)
        for transform in ("sform_code", "qform_code"):
            assert refined.header[transform] == image.header[transform]
        truth = np.rint(load_nifti(data / "labels" / f"{case['case_id']}.nii.gz"))
        stored = load_nifti(data / logits / f"{case['case_id']}.nii.gz")
        before = stored.argmax(axis=-1)
        after = np.asanyarray(refined.dataobj)
        assert 0 < case["voxels_changed"] == (before != after).sum() < 0.1 * before.size
        changes += [label_dice(after, truth, label) - label_dice(before, truth, label) for label in (1, 2)]
    # Default parameters need not help; a sign or an axis that is wrong would cost far more than two points.
    assert np.mean(changes) > -0.02


def test_metaimage_cases_come_back_in_their_format(tmp_path):
    data = data_folder() / "hippocampus_mhd"
    result = run_here("infer", "-i", data / "images", "-p", data / "logits", "-o", tmp_path / "out", "--preview")
    assert result.status == 0, result.stderr
    assert files_in(tmp_path / "out") == sorted(f"Case0{n}{end}" for n in range(5) for end in (".mhd", ".zraw", "_preview.png"))
    for number in range(5):
        image = sitk.ReadImage(str(data / "images" / f"Case0{number}.mhd"))
        refined = sitk.ReadImage(str(tmp_path / "out" / f"Case0{number}.mhd"))
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "labels" / f"Case0{number}_segmentation.mhd")))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(refined, get)() == getattr(image, get)()
        assert min(label_dice(sitk.GetArrayFromImage(refined), truth, label) for label in (1, 2)) > 0.6
