"""`postprocess.decision`: the refined marginals become labels by the best expected Dice, inside the mask alone."""

import dataclasses

import numpy as np
import pytest
from oracles import random_case
from tile_cases import make_case
from tile_cases import refine as refine_on_tiles

import crfrefine
from crfrefine import ConfigError, CrfParameters, RegionScheme
from crfrefine.arrays.dice_decision import dice_labels, dice_region_labels

ARGMAX = CrfParameters().replace(**{"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "bilateral.weight": 1.0})
DICE = ARGMAX.replace(**{"postprocess.decision": "dice", "mean_field.output_temperature": 3.0})


def refine(case, parameters, **options):
    return crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=parameters, mask=case.mask, **options)


@pytest.mark.parametrize(("masked", "order"), [(False, "C"), (True, "F")])
def test_labels_are_those_of_the_marginals(backend, masked, order):
    case = random_case(3, masked=masked)
    case = dataclasses.replace(case, logits=np.asarray(case.logits, order=order))
    result, usual = (refine(case, parameters, device=backend.name) for parameters in (DICE, ARGMAX))
    np.testing.assert_array_equal(result.logits, usual.logits)
    mask = np.ones(case.logits.shape[1:], bool) if case.mask is None else case.mask != 0
    expected = np.where(mask, dice_labels(result.marginals, mask), result.network_label_map)
    np.testing.assert_array_equal(result.label_map, expected)
    assert (result.label_map != usual.label_map).any()
    assert result.label_map.dtype == np.uint8
    assert result.changes.voxels_changed == (expected != result.network_label_map).sum()


def test_padding_stays_background():
    """Its marginals are the same for all labels, which would be enough for one with a low threshold."""
    case = random_case(3)
    logits = case.logits.copy()
    logits[:, :2] = -7.0
    logits[0, 2:] += 1.0
    case = dataclasses.replace(case, logits=logits)
    result = refine(case, DICE)
    assert dice_labels(result.marginals)[:2].any()
    assert result.label_map.any()
    assert not result.label_map[:2].any()


@pytest.mark.parametrize("threshold", [0.0, 1e-4])
def test_labels_left_out_of_tiles_decide_like_all(threshold):
    """Many labels in blocks: where labels may be left out, they are, and the decision is still on the marginals of the result."""
    case = make_case(4, (25, 22, 33), 12, with_mask=True)
    result = refine_on_tiles(case, DICE.replace(**{"mean_field.filter": "truncated"}), threshold)
    expected = np.where(case.mask, dice_labels(result.marginals, case.mask), result.network_label_map)
    np.testing.assert_array_equal(result.label_map, expected)


def test_regions_are_decided_each_by_itself():
    scheme = RegionScheme.of({"whole": [1, 2], "core": 2})
    case = random_case(3, num_labels=2, masked=True)
    case = dataclasses.replace(case, logits=case.logits - np.float32(0.6))
    result, usual = (refine(case, parameters, regions=scheme) for parameters in (DICE, ARGMAX))
    mask = case.mask != 0
    expected = np.where(mask, dice_region_labels(result.marginals, scheme, mask), result.network_label_map)
    np.testing.assert_array_equal(result.label_map, expected)
    assert (result.label_map != usual.label_map).any()


def test_a_label_map_with_many_labels_cannot():
    labels = np.arange(8 * 9 * 10).reshape(8, 9, 10) % 20
    with pytest.raises(ConfigError, match=r"postprocess\.decision: 'dice' .* 20 labels .* 'argmax', or mean_field\.label_threshold = 0"):
        crfrefine.refine(labels, np.zeros(labels.shape), spacing=1.0, input_type="labels", parameters=DICE)
    whole = DICE.replace(**{"mean_field.label_threshold": 0.0})
    assert crfrefine.refine(labels, np.zeros(labels.shape), spacing=1.0, input_type="labels", parameters=whole).num_labels == 20
