"""Metrics against a brute force on random anisotropic masks, known answers, and SimpleITK."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from evaluation_helpers import (
    SHAPE,
    expected_calibration,
    expected_calibration_of_all,
    expected_overlap,
    label_map,
    logits_of,
)
from oracles import softmax
from scipy import ndimage

from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.metrics.calibration import _BLOCK_VOXELS, measure_calibration
from crfrefine.metrics.overlap import MaskPair, boundary_distances, dice_of, measure_case
from crfrefine.metrics.regions import ALL_LABELS, parse_region
from crfrefine.metrics.registry import CALIBRATION_METRICS, MASK_METRICS

# The same sums in another order: double precision leaves 1e-15 of each of some hundred terms.
ROUNDING = 1e-12

GRIDS = {1: (23,), 2: (11, 7), 3: (6, 4, 7)}
SPACINGS = {1: (0.8,), 2: (1.3, 0.7), 3: (1.0, 0.6, 2.5)}


SHARES = {"empty": 0.0, "full": 1.0, "sparse": 0.15, "dense": 0.8}
PARTS = {
    "voxel": lambda size: size // 2,
    "corner": lambda size: size - 1,
    "border": lambda size: slice(size // 2),
    "inside": lambda size: slice(1, -1),
}


def measure_masks(prediction, reference, spacing, **options):
    return measure_case(prediction, reference, {"mask": (1,)}, spacing, **options)["mask"]


def _masks(kind, grid_shape, rng):
    """A mask of a kind that metrics tend to get wrong: a part of the grid, or random voxels."""
    if kind in SHARES:
        return rng.random(grid_shape) < SHARES[kind]
    mask = np.zeros(grid_shape, dtype=bool)
    mask[tuple(PARTS[kind](size) for size in grid_shape)] = True
    return mask


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_every_metric_equals_the_brute_force_for_all_pairs_of_kinds(num_dims):
    rng = np.random.default_rng(num_dims)
    spacing = SPACINGS[num_dims]
    for one, other in itertools.product((*SHARES, *PARTS), repeat=2):
        prediction = _masks(one, GRIDS[num_dims], rng)
        reference = _masks(other, GRIDS[num_dims], rng)
        # No distance between voxels of these grids is 1.25 mm, so rounding cannot decide what is
        # within it.
        measured = measure_masks(prediction, reference, spacing, tolerance_mm=1.25)
        expected = expected_overlap(prediction, reference, 1.25, spacing)
        assert tuple(measured) == tuple(MASK_METRICS)
        assert measured == pytest.approx(expected, abs=ROUNDING, rel=ROUNDING, nan_ok=True), (
            one,
            other,
        )


def _smooth_mask(rng, share):
    """A smooth random shape that the border of the grid cuts off."""
    noise = ndimage.gaussian_filter(rng.normal(size=(30, 9, 17)), 1.5, mode="wrap")
    return noise > np.quantile(noise, 1.0 - share)


def _itk_image(mask, spacing):
    """A mask as an image of SimpleITK, with a rim of background around it."""
    image = SimpleITK.GetImageFromArray(np.pad(mask, 1).T.astype(np.uint8))
    image.SetSpacing(spacing)
    return image


def _itk_distances(image, other):
    """Distances from each boundary voxel of an image to the boundary of another one."""
    contour = SimpleITK.BinaryContour(image, fullyConnected=False)
    other_contour = SimpleITK.BinaryContour(other, fullyConnected=False)
    distances = SimpleITK.SignedMaurerDistanceMap(
        other_contour, squaredDistance=False, useImageSpacing=True
    )
    is_boundary = SimpleITK.GetArrayFromImage(contour) > 0
    return np.abs(SimpleITK.GetArrayFromImage(distances))[is_boundary]


def test_boundaries_distances_and_pieces_equal_those_of_simpleitk(monkeypatch):
    rng = np.random.default_rng(16)
    spacing = (2.0, 0.5, 1.1)
    masks = _smooth_mask(rng, 0.2), _smooth_mask(rng, 0.3)
    predicted = _itk_image(masks[0], spacing)
    wanted = _itk_image(masks[1], spacing)
    there = _itk_distances(predicted, wanted)
    back = _itk_distances(wanted, predicted)
    everything = np.concatenate([there, back]).astype(np.float64)
    pieces = SimpleITK.GetArrayFromImage(SimpleITK.ConnectedComponent(predicted, True))
    expected = {
        "surface_dice": np.mean(everything <= 1.25),
        "hd_mm": everything.max(),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": everything.mean(),
        "num_components": pieces.max(),
    }
    measured = measure_masks(*masks, spacing, tolerance_mm=1.25)
    # SimpleITK keeps its distance maps in single precision.
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert measure_masks(*masks, spacing, metrics=("hd95_mm", "dice")) == {
        "hd95_mm": measured["hd95_mm"],
        "dice": measured["dice"],
    }
    ways = []
    for voxels_per_point in (0, math.inf):  # A search tree, and a transform.
        monkeypatch.setattr("crfrefine.metrics.overlap._VOXELS_PER_POINT", voxels_per_point)
        ways.append(boundary_distances(*masks, spacing))
    for by_tree, by_transform in zip(*ways, strict=True):
        np.testing.assert_allclose(by_tree, by_transform, rtol=ROUNDING)


def test_a_shift_by_exactly_the_tolerance_is_within_it():
    """Three voxels of 0.1 mm are 0.30000000000000004 mm in floating point."""
    prediction = np.zeros((30, 5), bool)
    reference = np.zeros((30, 5), bool)
    prediction[3, 2] = True
    reference[6, 2] = True
    assert 3 * 0.1 > 0.3
    assert measure_masks(prediction, reference, (0.1, 0.4), tolerance_mm=0.3)["surface_dice"] == 1.0
    assert (
        measure_masks(prediction, reference, (0.1, 0.4), tolerance_mm=0.2999)["surface_dice"] == 0.0
    )


@pytest.mark.parametrize("axis", range(3))
def test_a_single_slice_is_measured_as_a_plane(axis):
    """Along an axis of one voxel every voxel would be boundary."""
    prediction = _masks("inside", (11, 7), np.random.default_rng(6))
    reference = _masks("dense", (11, 7), np.random.default_rng(6))
    found = measure_masks(
        np.expand_dims(prediction, axis),
        np.expand_dims(reference, axis),
        np.insert((1.3, 0.7), axis, 1.0),
    )
    expected = measure_masks(prediction, reference, (1.3, 0.7))
    assert found == pytest.approx(expected, rel=ROUNDING)


def test_ignored_voxels_are_background_in_both_maps():
    labels = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    truth = np.array([[1, 1, 9, 0], [0, 9, 0, 0], [0, 0, 0, 0]])
    # Also of a region that names the ignored label.
    regions = {"one": (1,), "both": (1, 9)}
    for values in measure_case(labels, truth, regions, (1.0, 2.0), ignore_label=9).values():
        assert (values["dice"], values["volume_ml"]) == (1.0, 0.004)


def test_the_dice_of_a_confusion_matrix_is_that_of_masks():
    """Labels of one region that are exchanged are right for the region."""
    found, wanted = np.random.default_rng(2).integers(0, 4, (2, 7, 5, 6))
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (wanted, found), 1)
    regions = ((1,), (1, 3), (0, 2, 3))
    pairs = [MaskPair(np.isin(found, region), np.isin(wanted, region)) for region in regions]
    assert dice_of(confusion, regions).tolist() == [pair.dice() for pair in pairs]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"reference": np.ones((4, 3), int)},
            GridMismatchError,
            "the prediction has 3×4 voxels, the reference 4×3",
        ),
        ({"prediction": np.ones((3, 4))}, InputError, "the prediction has values of type float64"),
        ({"spacing": (1.0, 0.0)}, InputError, "expected 2 positive distances in mm"),
        ({"spacing": None}, InputError, "expected 2 positive distances in mm"),
        ({"regions": {"a": (0, 1)}}, ConfigError, "region 'a': expected labels from 1 up"),
        ({"regions": {"a": 1}}, ConfigError, "region 'a': expected labels from 1 up"),
        ({"regions": {"a": "1"}}, ConfigError, "region 'a': expected labels from 1 up"),
        ({"regions": {"a": (1.5,)}}, ConfigError, "region 'a': expected labels from 1 up"),
        (
            {"tolerance_mm": -1.0},
            ConfigError,
            "tolerance_mm: expected a number of mm, at least 0, got -1.0",
        ),
        ({"metrics": ("dicee",)}, ConfigError, "unknown metric 'dicee'; known are dice, iou"),
        (
            {"prediction": np.ones((0, 4), int), "reference": np.ones((0, 4), int)},
            InputError,
            "have no voxels",
        ),
    ],
)
def test_bad_input_is_named(change, error, text):
    arguments = {
        "prediction": np.ones((3, 4), int),
        "reference": np.ones((3, 4), int),
        "regions": {"one": (1,)},
        "spacing": (1.0, 2.0),
    }
    with pytest.raises(error) as raised:
        measure_case(**(arguments | change))
    assert text in str(raised.value)


PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
BETTER = {"higher": "higher", "lower": "lower", "nearer 0": "nearer_zero", "–": None}


def rows_of(head):
    """Cells of the table of the page whose head begins so."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(head)) + 2
    for line in lines[start:]:
        if not line.strip().startswith("|"):
            return
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def test_the_page_has_every_metric_with_its_unit_and_direction():
    found = {}
    for name, _, unit, better in rows_of("| metric | definition | unit |"):
        found[name.strip("`")] = (unit, BETTER[better])
    expected = {}
    for name, metric in MASK_METRICS.items():
        default = "0 to 1" if metric.is_ratio else "count"
        expected[name] = (metric.unit or default, metric.better)
    assert found == expected

    calibration = {}
    for name, _, better in rows_of("| metric | definition | better |"):
        calibration[name.strip("`")] = BETTER[better]
    assert calibration == {name: metric.better for name, metric in CALIBRATION_METRICS.items()}


@pytest.mark.parametrize("empty", ["both", "prediction", "reference"])
def test_metrics_are_undefined_where_the_page_says(empty):
    rng = np.random.default_rng(5)
    masks = {name: rng.random((6, 4, 3)) < 0.4 for name in ("prediction", "reference")}
    for name, mask in masks.items():
        if empty in ("both", name):
            mask[...] = False
    measured = measure_masks(masks["prediction"], masks["reference"], (0.8, 1.1, 2.5))
    undefined = {name for name, value in measured.items() if math.isnan(value)}
    column = 1 + ["both", "prediction", "reference"].index(empty)
    said = set()
    for row in rows_of("| | both empty |"):
        if row[column] == "undefined":
            said.update(name.strip("` ") for name in row[0].split(","))
    assert undefined == said


def test_a_region_of_the_command_line():
    for text, region in (
        ("core=1+3+4", ("core", (1, 3, 4))),
        ("enhancing=4", ("enhancing", (4,))),
        (" whole tumor = 4 + 2+1+ 3+4", ("whole tumor", (1, 2, 3, 4))),
    ):
        assert parse_region(text) == region
    for text in (
        "core",
        "core=1,3",
        "core=0+1",
        "core=65536",
        "core=1+",
        "core=²",
        "core=" + 5000 * "9",
    ):
        with pytest.raises(
            ConfigError,
            match=r"region 'core.*: expected NAME=LABEL\+LABEL\+\.\.\., .* "
            "with labels from 1 to 65535",
        ):
            parse_region(text)
    for text, name in (("=1+2", ""), ("mean=1", "mean"), (f"{201 * 'a'}=1", "aaa")):
        with pytest.raises(
            ConfigError,
            match=f"region '{name}.*: expected a name of 1 to 200 characters that is not",
        ):
            parse_region(text)
    assert parse_region("2=2") == ("2", (2,))
    for name in ("all", "2", "02"):
        with pytest.raises(
            ConfigError, match=f"region '{name}': is the name of a label, or of all labels together"
        ):
            parse_region(f"{name}=1+2")


REGIONS = {"1": (1,), "2": (2,), "both": (1, 2)}


@pytest.mark.parametrize("order", ["C", "F"])
def test_every_number_equals_the_brute_force(order):
    """The second grid has more voxels than two blocks, and not a whole number of them."""
    rng = np.random.default_rng(0)
    shape = (2 * _BLOCK_VOXELS // 15 + 3, 5, 3)
    small = label_map(3)
    # Sums of a thousand and of 60,000 doubles in another order.
    for reference, logits, rounding in (
        (small, logits_of(small, 4), ROUNDING),
        (rng.integers(0, 3, shape), rng.normal(0, 2, (3, *shape)), 1e-10),
    ):
        probabilities = softmax(logits).astype(np.float32)
        measured = measure_calibration(
            np.asarray(probabilities, order=order), np.asarray(reference, order=order), REGIONS
        )
        regions = {
            "1": probabilities[1],
            "2": probabilities[2],
            "both": probabilities[1].astype(float) + probabilities[2],
        }
        for name, probability in regions.items():
            assert measured[name] == pytest.approx(
                expected_calibration(probability, np.isin(reference, REGIONS[name])), abs=rounding
            )
        assert measured[ALL_LABELS] == pytest.approx(
            expected_calibration_of_all(probabilities, reference), abs=rounding
        )
        assert list(measured["1"]) == list(CALIBRATION_METRICS)


def test_certain_and_right_is_zero_and_certain_and_wrong_is_bounded():
    reference = np.array([0, 1])
    right = np.array([[1.0, 0.0], [0.0, 1.0]])
    for row in measure_calibration(right, reference, {"1": (1,)}).values():
        assert row == {"ece": 0.0, "brier": 0.0, "nll": 0.0}
    wrong = measure_calibration(right[::-1], reference, {"1": (1,)})
    assert wrong["1"] == pytest.approx({"ece": 1.0, "brier": 1.0, "nll": -math.log(1e-7)})
    assert wrong[ALL_LABELS] == pytest.approx({"ece": 1.0, "brier": 2.0, "nll": -math.log(1e-7)})


def test_calibration_is_undefined_where_all_voxels_are_ignored():
    even = np.full((3, *SHAPE), 1 / 3)
    ignored = np.full(SHAPE, 9)
    nothing = measure_calibration(even, ignored, REGIONS, ignore_label=9)
    assert all(math.isnan(value) for row in nothing.values() for value in row.values())


def test_a_label_without_a_channel_has_the_probability_zero():
    reference = np.array([0, 5])
    probabilities = np.array([[1.0, 0.6], [0.0, 0.4]])
    measured = measure_calibration(probabilities, reference, {"5": (5,), "6": (6,)})
    assert measured["5"] == pytest.approx({"ece": 0.5, "brier": 0.5, "nll": -math.log(1e-7) / 2})
    assert measured["6"] == {"ece": 0.0, "brier": 0.0, "nll": 0.0}
    # All labels: the truth has a label that nothing was said about, so its 1 counts in full, and so
    # does every other probability.
    assert measured[ALL_LABELS] == pytest.approx(
        {"ece": 0.3, "brier": (1 + 0.6**2 + 0.4**2) / 2, "nll": -math.log(1e-7) / 2}
    )
