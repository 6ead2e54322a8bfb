"""Files given as label maps that are none: each command says so, and names the likely cause."""

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    SPACING,
    errors,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    write_folders,
)
from scipy import ndimage

from crfrefine.demo.phantom import make_phantom


def network_labels():
    return make_phantom(0, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    found = write_folders(tmp_path, "a")
    save_nifti(tmp_path / "labels" / "a.nii.gz", network_labels())
    return found._replace(logits=tmp_path / "maps")


def fractions(kind):
    """Float values that are neither whole numbers nor probabilities."""
    inside = network_labels() == 1
    random = np.random.default_rng(0)
    values = {"one": 0.008, "many": random.uniform(1e-7, 1e-2, GRID_SHAPE)}[kind]
    return np.where(inside, values, 0).astype(np.float32)


@pytest.mark.parametrize("kind", ["one", "many"])
def test_small_fractions_are_no_label_map_for_infer(folders, kind):
    save_nifti(folders.logits / "a.nii.gz", fractions(kind))
    (message,) = errors(infer(folders, status=1).stderr)
    assert "neither a label map, of whole numbers, nor probabilities that reach 0.5" in message
    assert not (folders.output / "a.nii.gz").exists()
    (message,) = errors(infer(folders, "--input-type", "labels", status=1).stderr)
    assert "not a label map: expected whole numbers" in message
    # A network that is sure that there is nothing is believed on the user's word.
    infer(folders, "--input-type", "probabilities", status=0)
    assert not load_nifti(folders.output / "a.nii.gz").any()


def test_small_fractions_are_no_structure(folders):
    save_nifti(folders.logits / "a" / "vessels.nii.gz", fractions("one"))
    save_nifti(folders.logits / "a" / "liver.nii.gz", (network_labels() == 2).astype(np.uint8))
    (message,) = errors(infer(folders, "--input-type", "labels", status=1).stderr)
    assert "not a label map: expected whole numbers" in message


@pytest.mark.parametrize("kind", ["one", "many"])
def test_small_fractions_are_no_reference(folders, tmp_path, kind):
    save_nifti(tmp_path / "labels" / "a.nii.gz", fractions(kind))
    save_nifti(folders.logits / "a.nii.gz", network_labels())
    arguments = (folders.logits, tmp_path / "labels", "-o", folders.output, "--no-report")
    found = run_here("evaluate", *arguments, status=1).stderr
    assert "labels/a.nii.gz: not a label map: expected whole numbers" in found


def test_a_mask_of_a_small_value_is_no_prediction(folders, tmp_path):
    save_nifti(folders.logits / "a.nii.gz", fractions("one"))
    arguments = (folders.logits, tmp_path / "labels", "-o", folders.output, "--no-report")
    found = run_here("evaluate", *arguments, status=1).stderr
    assert "maps/a.nii.gz: one value per voxel, up to 0.008: neither a label map" in found
    assert "--input-type probabilities (in Python: input_type; evaluate takes neither)" in found


def test_a_scaled_mask_is_a_label_map_for_all_commands(folders, tmp_path):
    """As of stored 0 and 1, or 0 and 255, with a slope. `infer` asks before it rounds."""
    mask = (network_labels() == 1).astype(np.float32)
    save_nifti(folders.logits / "a.nii.gz", mask * 0.988)
    (message,) = errors(infer(folders, status=1).stderr)
    assert "off by up to 0.012; --input-type labels rounds labels that a program has" in message
    found = infer(folders, "--input-type", "labels", "-v", status=0).stderr
    assert "a.nii.gz is taken as a label map" in found
    save_nifti(folders.logits / "a.nii.gz", (mask - 0.6) * 8)  # as log-odds, nothing is to round
    (message,) = errors(infer(folders, status=1).stderr)
    assert "off by up to 0.2; logits need one value per label" in message
    save_nifti(folders.logits / "a.nii.gz", mask * 0.988)
    arguments = (folders.logits, tmp_path / "labels", "-o", tmp_path / "report", "--no-report")
    assert "ece" not in run_here("evaluate", *arguments, status=0).stdout
    # Several values that are not whole are probabilities, however near they are to 0 and 1.
    save_nifti(folders.logits / "a.nii.gz", np.where(mask, 0.988, 0.01).astype(np.float32))
    found = infer(folders, "-v", status=0).stderr
    assert "taken as the probability of label 1" in found
    assert "ece" in run_here("evaluate", *arguments, status=0).stdout


def test_low_probabilities_are_a_prediction_without_foreground(folders, tmp_path):
    save_nifti(folders.logits / "a.nii.gz", fractions("many"))
    arguments = (folders.logits, tmp_path / "labels", "-o", folders.output, "--no-report")
    told = (
        "note: case 'a': prediction: a.nii.gz: taken as the probability of label 1, which is below"
    )
    assert told in run_here("evaluate", *arguments, status=0).stderr
    save_nifti(folders.logits / "a.nii.gz", np.where(network_labels() == 1, 0.6, 0.1).astype("f4"))
    assert told not in run_here("evaluate", *arguments, status=0).stderr


def interpolated_labels(order):
    """Three labels after interpolation: 0, 0.37, 1, 1.5, 2 and more."""
    return ndimage.zoom(
        ndimage.zoom(network_labels(), (1, 1, 1.3), order=0).astype("f4"),
        (1, 1, GRID_SHAPE[2] / round(1.3 * GRID_SHAPE[2])),
        order=order,
    )


@pytest.mark.parametrize("order", [1, 3], ids=["linear", "cubic"])
@pytest.mark.parametrize("options", [(), ("--input-type", "labels")])
def test_an_interpolated_label_map_is_to_be_resampled_again(folders, tmp_path, options, order):
    values = interpolated_labels(order)
    assert values.shape == GRID_SHAPE
    save_nifti(folders.logits / "a.nii.gz", values)
    (message,) = errors(infer(folders, *options, status=1).stderr)
    assert "resample it with nearest neighbor" in message
    assert "log-odds" not in message
    arguments = (folders.logits, tmp_path / "labels", "-o", folders.output, "--no-report")
    found = run_here("evaluate", *arguments, status=1).stderr
    assert "resample it with nearest neighbor" in found


def test_an_image_is_not_taken_for_an_interpolated_label_map(folders):
    values = np.random.default_rng(0).normal(0, 3, GRID_SHAPE).astype(np.float32)
    save_nifti(folders.logits / "a.nii.gz", values)
    (message,) = errors(infer(folders, status=1).stderr)
    assert "nearest neighbor" not in message


def test_an_anti_aliased_mask_is_no_label_map_unless_somebody_says_so(folders, tmp_path):
    mask = ndimage.gaussian_filter(255.0 * (network_labels() > 0), 0.6)
    values = np.rint(mask).astype(np.uint8)
    save_nifti(folders.logits / "a.nii.gz", values)
    warning = "labels lie only in thin layers between two others"
    refusal = "expected a label map, found"
    assert refusal in infer(folders, status=1).stderr
    said = ("--input-type", "labels")
    assert infer(folders, *said).stderr.count(warning) == 1
    arguments = (folders.logits, tmp_path / "labels", "-o", folders.output, "--no-report")
    assert refusal in run_here("evaluate", *arguments, status=1).stderr
    names = '{"labels": {"background": 0, "liver": 255}}'
    (folders.logits / "dataset.json").write_text(names)
    found = infer(folders, *said, status=1).stderr
    assert "has labels that are not declared" in found
    assert warning in found


def test_an_image_is_not_measured_as_a_label_map(tmp_path):
    values = np.random.default_rng(0).integers(0, 6000, (24, 24, 24)).astype(np.uint16)
    path = save_nifti(tmp_path / "map.nii.gz", values)
    reference = save_nifti(tmp_path / "reference.nii.gz", (values > 3000).astype(np.uint8))
    arguments = (path, reference, "-o", tmp_path / "output", "--no-report")
    found = run_here("evaluate", *arguments, status=1).stderr
    assert "different whole numbers up to 5999 that change from voxel to voxel" in found


def anti_aliased():
    """A mask of two boxes, 127 and 255, with a smoothed border: 29 different values."""
    boxes = np.zeros(GRID_SHAPE)
    boxes[2:9, 2:13, 2:9] = 255.0
    boxes[9:16, 2:13, 2:9] = 127.5
    return np.rint(ndimage.gaussian_filter(boxes, 0.5)).astype(np.uint8)


def test_anti_aliased_strokes_get_a_warning(folders, tmp_path):
    """They would draw a hundred labels; strokes of many labels are no such mask."""
    save_nifti(folders.logits / "a.nii.gz", network_labels())
    apart = np.zeros(GRID_SHAPE, np.uint8)
    apart[::4, ::4] = np.arange(apart[::4, ::4].size).reshape(apart[::4, ::4].shape) % 30
    warning = "labels lie only in thin layers between two others"
    for values, count in ((anti_aliased(), 1), (apart, 0)):
        strokes = save_nifti(tmp_path / "strokes" / "a.nii.gz", values.astype(np.uint8))
        assert infer(folders, "--strokes", strokes.parent).stderr.count(warning) == count
