"""Probabilities in percent or of 8 bits, and channels of labels with other numbers, by commands."""

import json

import numpy as np
import pytest
from cli_helpers import (
    FAST,
    GRID_SHAPE,
    SPACING,
    errors,
    load_nifti,
    run_here,
    save_nifti,
    set_streaming,
)
from evaluation_helpers import read_metrics

from crfrefine.demo.phantom import make_phantom

PHANTOM = make_phantom(4, GRID_SHAPE, SPACING)
EXPONENTIALS = np.exp(PHANTOM.logits - PHANTOM.logits.max(axis=0))
SOFTMAX = (EXPONENTIALS / EXPONENTIALS.sum(axis=0)).astype(np.float32)
TABLE = (0, 17, 1035, 53)  # the label of each channel
LABELS = np.array(TABLE, np.uint16)


@pytest.fixture(params=["in memory", "streamed"])
def is_streamed(request, monkeypatch):
    """Whether channels stay in their files."""
    set_streaming(monkeypatch, request.param == "streamed")
    return request.param == "streamed"


@pytest.fixture
def image(tmp_path):
    return save_nifti(tmp_path / "image.nii.gz", PHANTOM.image[0].astype(np.int16))


def save(path, channels, dtype=np.float32):
    return save_nifti(path, np.moveaxis(channels, 0, -1).astype(dtype))


def outputs(image, logits, *options, status=0):
    """Run infer on one case; return its refined labels and probabilities, and what it said."""
    output = image.with_name("out.nii.gz")
    result = run_here(
        *("infer", "-i", image, "-p", logits, "-o", output, "--save-probabilities", "-v"),
        *(*FAST, *options),
        status=status,
    )
    if status:
        return result.stderr
    saved = load_nifti(image.with_name("out_probabilities.nii.gz"))
    return load_nifti(output), saved, result.stderr


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert 0 < np.count_nonzero(expected[0]) < expected[0].size


@pytest.mark.parametrize(("scale", "dtype"), [(100, np.uint8), (255, np.uint8), (1000, np.int16)])
def test_scaled_probabilities_are_refined_as_divided_ones(
    scale, dtype, image, tmp_path, is_streamed
):
    rounded = np.rint(SOFTMAX * scale)
    divided = (rounded / np.float32(scale)).astype(np.float32)
    kind = ("--input-type", "probabilities")
    given = ("--scale", str(scale))
    expected = outputs(image, save(tmp_path / "d.nii.gz", divided), *kind)
    whole = save(tmp_path / "p.nii.gz", rounded, dtype)
    assert_same(outputs(image, whole, *given), expected)
    said = errors(outputs(image, whole, status=1))[0]
    assert "at each voxel, as probabilities in percent" in said

    # Without the background.
    add = ("--add-background",)
    half = ("--scale", str(scale / 2))
    expected = outputs(image, save(tmp_path / "d.nii.gz", divided[1:]), *add)
    foreground = save(tmp_path / "p.nii.gz", rounded[1:], dtype)
    said = outputs(image, foreground, status=1)
    assert "the background seems to be missing" in errors(said)[0]
    assert f"give --add-background --scale {scale}, by which" in said
    for options in ((*add, *given), add):
        found = outputs(image, foreground, *options)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert f"taken as probabilities from 0 to {scale}" in found[2]
    said = outputs(image, foreground, *add, *half, status=1)
    assert f"--scale {scale / 2:g}: expected probabilities from 0 to {scale / 2:g}" in said


def test_a_scale_contradicts_logits_and_label_maps(image, tmp_path):
    whole = save(tmp_path / "p.nii.gz", np.rint(SOFTMAX * 100), np.uint8)
    for kind in ("logits", "labels"):
        said = outputs(image, whole, "--scale", "100", "--input-type", kind, status=1)
        assert f"leave --input-type {kind} or --scale out" in said
    assert "expected a positive number" in outputs(image, whole, "--scale", "0", status=2)


def test_the_probability_of_one_structure_in_8_bits_is_no_label_map(image, tmp_path, is_streamed):
    noise = np.random.default_rng(1).normal(0, 0.6, GRID_SHAPE)
    log_odds = PHANTOM.logits[1:].max(axis=0) - PHANTOM.logits[0] + noise
    rounded = np.rint(255 / (1 + np.exp(-log_odds)))
    one = save_nifti(tmp_path / "p.nii.gz", rounded.astype(np.uint8))
    said = outputs(image, one, status=1)
    assert "expected a label map, found" in errors(said)[0]
    assert "give --scale 255 --input-type probabilities" in said
    divided = save_nifti(tmp_path / "d.nii.gz", (rounded / np.float32(255)).astype(np.float32))
    expected = outputs(image, divided)
    assert_same(outputs(image, one, "--scale", "255", "--input-type", "probabilities"), expected)
    assert_same(outputs(image, one, "--scale", "255"), expected)

    reference = save_nifti(tmp_path / "r.nii.gz", (PHANTOM.labels > 0).astype(np.uint8))
    report = tmp_path / "report"
    arguments = ("evaluate", one, reference, "-o", report, "--no-report")
    result = run_here(*arguments, status=1)
    assert "For the probability of label 1, give --scale 255." in result.stderr
    run_here(*arguments, "--scale", "255")
    result = run_here("evaluate", reference, one, "-o", report, "--no-report", status=1)
    assert "A reference has labels" in result.stderr


def test_channels_stand_for_any_labels(image, tmp_path, is_streamed):
    """Everything has the numbers of the table; what is computed is that of the channels."""
    logits = save(tmp_path / "logits" / "p.nii.gz", PHANTOM.logits)
    numbers, probabilities, _ = outputs(image, logits)
    table = ",".join(map(str, TABLE))
    found = outputs(image, logits, "--channel-labels", table)
    np.testing.assert_array_equal(found[0], LABELS[numbers])
    np.testing.assert_array_equal(found[1], probabilities)

    strokes = np.zeros(GRID_SHAPE, np.uint16)
    place = tuple(np.argwhere(numbers == 0)[100])
    strokes[place] = 1035
    drawn = ("--strokes", save_nifti(tmp_path / "s.nii.gz", strokes))
    found = outputs(image, logits, "--channel-labels", table, *drawn)
    assert found[0][place] == 1035
    strokes[place] = 2
    save_nifti(tmp_path / "s.nii.gz", strokes)
    said = outputs(image, logits, "--channel-labels", table, *drawn, status=1)
    assert "expected the labels of the channels" in said
    said = outputs(image, logits, "--channel-labels", "0,17", status=1)
    assert "has 4 channels, expected 2, one for each of the labels 0, 17 of" in said
    for bad in ("0,17,17", "17,0,3", "a", "0"):
        outputs(image, logits, "--channel-labels", bad, status=2)


def test_a_description_with_gaps_numbers_channels_and_references(image, tmp_path):
    logits = save(tmp_path / "logits" / "case.nii.gz", PHANTOM.logits)
    names = {"background": 0, "left": 17, "right": 53, "rim": 1035}
    (tmp_path / "logits" / "dataset.json").write_text(json.dumps({"labels": names}))
    in_order = np.array(sorted(TABLE), np.uint16)
    plain = save(tmp_path / "plain.nii.gz", PHANTOM.logits)
    expected = in_order[outputs(image, plain)[0]]
    found = outputs(image, logits, "--save-structures", "--statistics")
    np.testing.assert_array_equal(found[0], expected)
    for name, number in names.items():
        if number:
            structure = load_nifti(tmp_path / "out" / f"{name}.nii.gz")
            np.testing.assert_array_equal(structure == 1, expected == number)
    table = (tmp_path / "out_statistics.csv").read_text()
    assert "image,1035,rim," in table

    reference = in_order[PHANTOM.labels]
    save_nifti(tmp_path / "labels" / "case.nii.gz", reference)
    places = ("evaluate", tmp_path / "logits", tmp_path / "labels")
    run_here(*places, "-o", tmp_path / "gaps", "--no-report")
    numbers = save_nifti(tmp_path / "numbers" / "case.nii.gz", PHANTOM.labels.astype(np.uint8))
    run_here("evaluate", plain, numbers, "-o", tmp_path / "dense", "--no-report")
    gaps = read_metrics(tmp_path / "gaps")
    number_of = {str(label): str(number) for number, label in enumerate(in_order)}
    dense = {}
    for (_, label, *rest), value in read_metrics(tmp_path / "dense").items():
        dense[label, *rest] = value
    for (_, label, *rest), value in gaps.items():
        assert value == dense[number_of.get(label, label), *rest]
    assert {"1035", "all"} <= {label for _, label, *_ in gaps}


def test_rounded_percent_of_many_labels_does_not_lack_the_background(image, tmp_path, is_streamed):
    """The sums differ by more than those of a few labels, since each number is rounded."""
    shares = np.random.default_rng(5).gamma(0.7, size=(10, *SOFTMAX.shape[1:]))
    shares[0] *= 5
    percent = np.rint(shares / shares.sum(axis=0) * 100)
    sums = percent.sum(axis=0)
    assert sums.max() - sums.min() > 5
    logits = save(tmp_path / "percent.nii.gz", percent, np.uint8)
    said = outputs(image, logits, status=1)
    assert "at each voxel, as probabilities in percent" in said
    assert "give --scale 100, by" in said
    assert "--add-background" not in said
    labels, _, _ = outputs(image, logits, "--scale", "100")
    assert np.count_nonzero(labels == 0) > 0.3 * labels.size
