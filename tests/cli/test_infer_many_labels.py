"""`infer` on label maps with many labels, which stay label maps: the same as `refine`, with every output."""

import json

import numpy as np
import pytest
from cli_helpers import SPACING, Folders, files_in, load_nifti, run_here, save_nifti

import crfrefine
from crfrefine.arrays.one_hot import ABSENT_LOGIT

SHAPE = (35, 26, 19)
NUMBERS = np.array([0, *range(2, 42, 2)])
MISSING = [label for label in range(45) if label not in NUMBERS]
SETTINGS = {"bilateral.theta_alpha": 1.5, "bilateral.theta_beta": 0.05, "mean_field.filter": "truncated"}
STRENGTH = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]
PARAMETERS = crfrefine.CrfParameters().replace(**SETTINGS)


@pytest.fixture(scope="module")
def scene():
    """Blocks of labels with wrong voxels, and an image of them."""
    rng = np.random.default_rng(0)
    coarse = NUMBERS[rng.integers(0, len(NUMBERS), (4, 3, 2))]
    coarse.flat[: len(NUMBERS)] = NUMBERS
    true = coarse.repeat(10, 0).repeat(10, 1).repeat(10, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.where(rng.random(SHAPE) < 0.06, np.roll(true, 1, axis=0), true)
    return labels.astype(np.uint8), (100 * true + rng.normal(0, 30, SHAPE)).astype(np.int16)


@pytest.mark.parametrize("options", [(), ("--set", "mean_field.label_threshold=0")])
def test_every_output_is_that_of_refine(scene, tmp_path, options):
    """Inside of a mask, with the labels that are declared."""
    labels, image = scene
    folders, mask = Folders(tmp_path / "images", tmp_path / "maps", tmp_path / "out"), np.zeros(SHAPE, np.uint8)
    mask[4:30, :20] = 1
    for folder, name, values in ((folders.images, "a_0000", image), (folders.logits, "a", labels), (tmp_path / "masks", "a", mask)):
        save_nifti(folder / f"{name}.nii.gz", values)
    names = {"background": 0, **{f"part {label}": int(label) for label in range(1, 45)}}
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": names}))
    summary = tmp_path / "summary.json"
    kinds = ("--save-probabilities", "--save-logits", "--preview", "--summary", summary, "-m", tmp_path / "masks")
    run_here("infer", *folders.arguments, *STRENGTH, *options, *kinds, status=0)
    assert files_in(folders.output) == ["a.nii.gz", "a_logits.nii.gz", "a_preview.png", "a_probabilities.nii.gz"]
    settings = {"spacing": SPACING, "parameters": PARAMETERS, "input_type": "labels", "mask": mask.astype(bool)}
    expected = crfrefine.refine(np.asfortranarray(labels), image, **settings)
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), expected.label_map)
    np.testing.assert_array_equal(expected.label_map[mask == 0], labels[mask == 0])
    assert expected.changes.voxels_changed > 20
    probabilities, logits = (np.moveaxis(load_nifti(folders.output / f"a_{kind}.nii.gz"), -1, 0) for kind in ("probabilities", "logits"))
    assert probabilities.shape == (45, *SHAPE)
    np.testing.assert_allclose(probabilities[NUMBERS], expected.marginals, atol=2e-5)
    np.testing.assert_array_equal(NUMBERS[logits[NUMBERS].argmax(axis=0)], expected.label_map)
    assert (probabilities[MISSING] == 0).all()
    assert (logits[MISSING] == ABSENT_LOGIT).all()
    (record,) = json.loads(summary.read_text())["cases"]
    assert (record["input_type"], record["num_labels"], record["num_modalities"]) == ("labels", 45, 1)
    assert record["voxels_changed"] == expected.changes.voxels_changed
    assert record["voxels_before"][:41] == list(expected.changes.voxels_before)
    assert ("tiles" in record["filters"][0]) == ("mean_field.label_threshold=0" not in options)
