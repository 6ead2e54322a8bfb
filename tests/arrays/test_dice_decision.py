"""The decision for the best expected Dice, against the best of all label maps, and where it must agree with the argmax."""

import itertools
import math

import numpy as np
import pytest

from crfrefine.arrays.dice_decision import MIN_PROBABILITY, dice_labels, dice_region_labels
from crfrefine.arrays.region_scheme import RegionScheme


def random_probabilities(seed, num_labels, shape, spread=1.0):
    values = np.random.default_rng(seed).gamma(spread, size=(num_labels, *shape))
    return values / values.sum(axis=0)


def approximate_dice(probabilities, labels):
    """Mean over the labels above 0 of the reciprocal moment approximation."""
    values = []
    for label in range(1, len(probabilities)):
        own = labels == label
        values.append(2 * probabilities[label][own].sum() / (own.sum() + probabilities[label].sum() + 1))
    return sum(values) / len(values)


def all_maps(num_labels, shape):
    for labels in itertools.product(range(num_labels), repeat=math.prod(shape)):
        yield np.array(labels).reshape(shape)


@pytest.mark.parametrize("seed", range(6))
def test_with_two_labels_no_label_map_is_better(seed):
    probabilities = random_probabilities(seed, 2, (2, 5), spread=(0.4, 1.0, 3.0)[seed % 3])
    found = approximate_dice(probabilities, dice_labels(probabilities))
    best = max(approximate_dice(probabilities, labels) for labels in all_maps(2, (2, 5)))
    assert found == pytest.approx(best, rel=1e-12)


def test_several_labels_come_close_to_the_best_label_map():
    """Sharing voxels out is a search: the mean of 12 cases stays within a hundredth of the best of 729 maps, and most are the best."""
    ratios = []
    for seed in range(12):
        probabilities = random_probabilities(seed, 3, (2, 3), spread=(0.5, 1.0)[seed % 2])
        best = max(approximate_dice(probabilities, labels) for labels in all_maps(3, (2, 3)))
        ratios.append(approximate_dice(probabilities, dice_labels(probabilities)) / best)
    assert np.mean(ratios) > 0.99
    assert np.mean(np.array(ratios) > 1 - 1e-12) > 0.75


def test_a_label_without_any_likely_voxel_stays_absent():
    values = np.full((4, 5, 6), 0.99 * MIN_PROBABILITY, np.float32)
    assert not dice_labels(np.stack([1 - values, values])).any()
    assert dice_labels(np.stack([1 - 1.5 * values, 1.5 * values])).all()


def test_equal_labels_and_voxels_at_the_threshold_are_decided_by_number():
    probabilities = np.full((3, 4, 5), 1 / 3)
    np.testing.assert_array_equal(dice_labels(probabilities), np.ones((4, 5)))
    # A certain voxel, and one whose probability x is the threshold: 1 / (1 + (1 + x) + 1) = x.
    threshold = (math.sqrt(13) - 3) / 2
    for other, label in ((threshold * (1 - 1e-9), 0), (threshold * (1 + 1e-9), 1)):
        inside = np.array([1.0, other])
        assert dice_labels(np.stack([1 - inside, inside])).tolist() == [1, label]


def test_only_the_mask_counts_and_gets_labels():
    probabilities = random_probabilities(5, 3, (5, 6, 7)).astype(np.float32)
    mask = np.random.default_rng(6).random((5, 6, 7)) < 0.4
    labels = dice_labels(probabilities, mask)
    assert not labels[~mask].any()
    np.testing.assert_array_equal(labels[mask], dice_labels(probabilities[:, mask]))
    other = np.where(mask, probabilities, 1 / 3)
    np.testing.assert_array_equal(dice_labels(other, mask), labels)
    assert not dice_labels(probabilities, np.zeros_like(mask)).any()


def test_each_region_has_its_own_best_dice():
    scheme = RegionScheme.of({"whole": [1, 2], "core": 2})
    random = np.random.default_rng(9)
    probabilities = random.random((2, 3, 4, 5)) ** 2
    labels = dice_region_labels(probabilities, scheme)
    whole, core = (dice_labels(np.stack([1 - own, own])) for own in probabilities)
    np.testing.assert_array_equal(labels, np.where(core, 2, whole))
    mask = random.random((3, 4, 5)) < 0.5
    inside = dice_region_labels(probabilities, scheme, mask)
    assert not inside[~mask].any()
    whole, core = (dice_labels(np.stack([1 - own, own]), mask) for own in probabilities)
    np.testing.assert_array_equal(inside, np.where(core, 2, whole))
    assert not dice_region_labels(np.full((2, 3, 4), 0.05), scheme).any()
