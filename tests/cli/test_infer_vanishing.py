"""`infer` with rules for small objects that would take structures away: an error of the case, unless it is wanted."""

import json

import numpy as np
import pytest
from cli_helpers import FAST, SPACING, Folders, errors, load_nifti, run_here, save_nifti, statuses

from crfrefine.parameters.model import CrfParameters

VOXEL_ML = float(np.prod(SPACING)) / 1000
NAMES = {"background": 0, "liver": 3, "spleen": 5, "left kidney": 9}
FOREGROUND = "postprocess.keep_largest=foreground"
STILL = ("--set", "bilateral.weight=0", *FAST)


@pytest.fixture
def organs(tmp_path):
    """Label maps: in a the organs are apart, in b they touch."""
    folders = Folders(tmp_path / "images", tmp_path / "maps", tmp_path / "out")
    for case_id, gap in (("a", 2), ("b", 0)):
        labels = np.zeros((18, 15, 11), np.uint8)
        labels[1:8, 2:13, 1:9] = 3
        labels[8 + gap : 13 + gap, 2:7, 2:6] = 5
        labels[8 + gap : 11 + gap, 7 + gap : 12 + gap, 2:6] = 9
        image = np.random.default_rng(3).normal(10.0 * labels, 2.0)
        save_nifti(folders.logits / f"{case_id}.nii.gz", labels)
        save_nifti(folders.images / f"{case_id}_0000.nii.gz", image.astype(np.int16))
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": NAMES}))
    CrfParameters().replace(**{"postprocess.keep_largest": "foreground"}).save(tmp_path / "own.toml")
    return folders


def infer(folders, *options, status=None):
    return run_here("infer", *folders.arguments, "--input-type", "labels", *STILL, *options, status=status)


def test_a_rule_of_a_file_that_empties_structures_is_an_error_of_its_case(organs):
    summary = organs.output.with_name("summary.json")
    result = infer(organs, "-c", organs.output.with_name("own.toml"), "--summary", summary, status=1)
    assert statuses(result) == [("a", "failed"), ("b", "done")]
    assert [path.name for path in sorted(organs.output.glob("*.nii.gz"))] == ["b.nii.gz"]
    message = (
        "case 'a': postprocess.keep_largest = 'foreground' would remove more than 10% of 2 structures: "
        f"spleen 100 → 0 voxels ({100 * VOXEL_ML:.3g} → 0 ml), left kidney 60 → 0 voxels ({60 * VOXEL_ML:.3g} → 0 ml)"
    )
    assert message in errors(result.stderr)[0]
    assert "Switch it off (postprocess.keep_largest = none), or allow it: --allow-vanishing" in result.stderr
    failed, done = json.loads(summary.read_text())["cases"]
    assert (failed["status"], failed["output"], done["voxels_removed"]) == ("failed", None, 0)
    assert message.removeprefix("case 'a': ") in failed["error"]


def test_what_is_wanted_is_done_and_noted_with_names(organs):
    """A rule that is set on the command line is wanted, too."""
    own = ("-c", organs.output.with_name("own.toml"))
    for options in ((*own, "--allow-vanishing"), ("--set", FOREGROUND)):
        result = infer(organs, *options, status=0)
        assert set(np.unique(load_nifti(organs.output / "a.nii.gz"))) == {0, 3}
        rule = "postprocess.keep_largest = 'foreground'"
        note = f"a: structures that rules of [postprocess] removed, in whole or by more than 10%, by {rule}: spleen 100"
        assert note in result.stderr
        assert "a: labels that vanished: spleen (100 voxels), left kidney (60 voxels)\n" in result.stderr
        assert "b: structures" not in result.stderr
    result = infer(organs, *own, "--set", "postprocess.min_component_ml=0.001", status=1)
    assert "postprocess.keep_largest = 'foreground' and postprocess.min_component_ml = 0.001 would remove" in result.stderr
    infer(organs, *own, "--set", "postprocess.min_component_ml=0.001", "--set", FOREGROUND, status=0)


def test_a_window_of_ct_on_other_images_is_noted(organs):
    """Once, since it is of all cases; not on CT."""
    note = "intensity.window does not seem to fit modality 0: it is [-1000, 1000], and the image has values from "
    assert infer(organs, "-c", "body-ct", status=0).stderr.count(note) == 1
    for path in organs.images.glob("*.nii.gz"):
        values = load_nifti(path)
        save_nifti(path, np.where(values < 10, np.int16(-1000), values))
    assert note not in infer(organs, "-c", "body-ct", status=0).stderr
