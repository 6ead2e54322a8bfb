"""Logits and marginals at the voxels of a mask: those of the whole arrays, from every kind of result, without these arrays."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import tile_cases
from oracles import random_case

import crfrefine
from crfrefine import CrfParameters, InputError, RegionScheme

SHAPE = (19, 22, 17)
SPACING = (1.0, 1.4, 2.2)
PARAMETERS = CrfParameters().replace(**{"mean_field.temperature": 0.8, "mean_field.label_threshold": 0.0, "bilateral.theta_alpha": 3.0})
ON_TILES = PARAMETERS.replace(**{"mean_field.filter": "truncated", "bilateral.theta_alpha": 1.5})


def in_a_corner():
    """A mask whose bounding box is a small part of the grid, with holes."""
    mask = np.zeros(SHAPE, bool)
    mask[2:11, 2:13, 2:10] = np.random.default_rng(3).random((9, 11, 8)) < 0.8
    return mask


def refine(logits, mask=None, image=None, **options):
    image = random_case(len(logits.shape) - 1, grid_shape=logits.shape[1:]).image if image is None else image
    return crfrefine.refine(logits, image, spacing=SPACING[: logits.ndim - 1], parameters=PARAMETERS, mask=mask, **options)


def whole_grid(order="C"):
    return refine(np.asarray(random_case(3, grid_shape=SHAPE).logits, order=order))


def mask_in_a_corner(order="C"):
    return refine(np.asarray(random_case(3, grid_shape=SHAPE).logits, order=order), in_a_corner())


def overlapping_regions(order="C"):
    log_odds = np.asarray(random_case(3, grid_shape=SHAPE).logits - np.float32(0.4), order=order)
    return refine(log_odds, in_a_corner(), regions=RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}))


def tiles(order="C"):
    case = tile_cases.make_case(1, SHAPE, 6, with_mask=True)
    arrays = np.asarray(case.logits, order=order), case.image, case.spacing, case.mask, case.input_type
    return tile_cases.refine(tile_cases.TileCase(*arrays), ON_TILES, 1e-4)


def settled_tiles(order="C"):
    """Two labels on two halves: no voxel is near both."""
    logits = np.zeros((2, *SHAPE), np.float32, order=order)
    logits[1] = -50.0
    return tile_cases.refine(tile_cases.TileCase(logits, np.zeros(SHAPE), SPACING), ON_TILES, 1e-4)


def label_map(order="C"):
    """With many labels a label map is refined without an array of logits."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 20, (4, 5, 4)).repeat(5, 0).repeat(5, 1).repeat(5, 2)
    labels = np.asarray(coarse[:19, :22, :17], order=order)
    parameters = ON_TILES.replace(**{"mean_field.label_threshold": 1e-4})
    options = {"spacing": SPACING, "parameters": parameters, "mask": rng.random(SHAPE) < 0.95, "input_type": "labels"}
    return crfrefine.refine(labels, 10.0 * labels + rng.normal(0, 4, SHAPE), **options)


KINDS = {
    whole_grid: (True, False, False),
    overlapping_regions: (False, False, False),
    mask_in_a_corner: (False, False, False),
    settled_tiles: (False, True, False),
    tiles: (False, True, False),
    label_map: (False, True, True),
}
"""Whether the logits are an array, on tiles, and not even the network's in memory."""

ORDERED = [pytest.param(make, "CF"[number % 2], id=make.__name__) for number, make in enumerate(KINDS)]


def masks():
    """The box that was refined, parts of the rest, a single voxel, and none."""
    first = np.arange(19 * 22 * 17).reshape(SHAPE) == 0
    some = np.random.default_rng(1).random(SHAPE) < 0.1
    return [in_a_corner(), some.astype(np.int16) * -3, first, np.zeros(SHAPE, bool)]


@pytest.mark.parametrize(("make", "order"), ORDERED)
def test_values_at_voxels_are_those_of_the_whole_arrays(make, order):
    result = make(order)
    channels = result.channels
    assert (channels.is_array, channels.tiles is not None, channels.is_streamed) == KINDS[make]
    found = [(result.logits_at(mask), result.marginals_at(mask)) for mask in masks()]
    assert "logits" not in vars(result), "an array of the whole grid was made"
    for mask, (logits, marginals) in zip(masks(), found, strict=True):
        np.testing.assert_array_equal(logits, result.logits[:, mask != 0])
        np.testing.assert_array_equal(marginals, result.marginals[:, mask != 0])
        assert logits.dtype == marginals.dtype == np.float32


@pytest.mark.parametrize(("make", "order"), ORDERED)
def test_marginals_are_those_of_logits_over_the_output_temperature(make, order):
    """In every kind of result, whether the logits were asked for before or not; logits and labels stay."""
    first, second = (replace(make(order), output_temperature=2.5) for _ in range(2))
    usual, logits = make(order), second.logits.astype(np.float64) / 2.5
    expected = scipy.special.expit(logits) if first.regions else scipy.special.softmax(logits, axis=0)
    for mask in masks():
        np.testing.assert_allclose(first.marginals_at(mask), expected[:, mask != 0], atol=2e-6)
    assert "logits" not in vars(first)
    if first.channels.is_streamed and order == "C":  # of planes in storage order
        with np.errstate(divide="ignore"):  # of sums in tiles without a voxel outside the mask, which nobody reads
            found = first.channels.probabilities(3, slice(2, 9), output_temperature=2.5)
        np.testing.assert_allclose(found, expected[3, 2:9], atol=2e-6)
    for result in (first, second):
        np.testing.assert_allclose(result.marginals, expected, atol=2e-6)
        assert result.marginals.dtype == np.float32
        np.testing.assert_array_equal(result.logits, usual.logits)
        np.testing.assert_array_equal(result.label_map, usual.label_map)
    np.testing.assert_array_equal(replace(usual, output_temperature=1.0).marginals, usual.marginals)


def test_a_mask_that_does_not_fit_is_refused():
    result = whole_grid()
    for mask, message in (
        (np.ones((22, 19, 17), bool), r"mask has shape \(22, 19, 17\); expected the result's grid \(19, 22, 17\)"),
        (np.ones((2, *SHAPE), bool), "mask has shape"),
        (np.full(SHAPE, np.nan), "not finite"),
        ("mask.nii.gz", "mask is a path"),
    ):
        for function in (result.logits_at, result.marginals_at):
            with pytest.raises(InputError, match=message):
                function(mask)
