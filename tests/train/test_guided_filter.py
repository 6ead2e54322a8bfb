"""The guided filter as a rival: against its definition window by window, and chosen where it helps."""

import dataclasses

import numpy as np
import pytest
from training_helpers import LARGER, REGIONS, SPACING, crops

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.execution.threads import Workers
from crfrefine.train.baselines import label_confusion
from crfrefine.train.guided_filter import EPSILONS, RADII_VOXELS, UNGUIDED, Guidance, Guide, guided_labels, score_guided
from crfrefine.train.model import mean_dice
from crfrefine.train.probabilities import probabilities_of

SHAPE = (7, 6, 9)
MM = (1.0, 2.1, 1.4)
RADIUS = 2.0  # mm: 2, 1 and 1 voxels
WINDOW = (2, 1, 1)


def by_definition(channel, image, epsilon):
    """Equations 14 to 16 of He, Sun & Tang: a linear function of the image per window, averaged over the windows of a voxel."""
    wide = [(2 * width, 2 * width) for width in WINDOW]
    channel, image = np.pad(channel, wide, mode="edge"), np.pad(image, [(0, 0), *wide], mode="edge")
    slopes, offsets = np.zeros_like(image), np.zeros_like(channel)
    inner = [range(width, extent - width) for width, extent in zip(WINDOW, channel.shape, strict=True)]
    for center in np.array(np.meshgrid(*inner, indexing="ij")).reshape(3, -1).T:
        box = tuple(slice(at - width, at + width + 1) for at, width in zip(center, WINDOW, strict=True))
        values, own = image[(slice(None), *box)].reshape(len(image), -1), channel[box].ravel()
        covariance = np.cov(values, bias=True).reshape(len(image), len(image)) + epsilon * np.eye(len(image))
        slope = np.linalg.solve(covariance, (values * own).mean(axis=1) - values.mean(axis=1) * own.mean())
        slopes[(slice(None), *center)] = slope
        offsets[tuple(center)] = own.mean() - slope @ values.mean(axis=1)
    result = np.zeros(SHAPE)
    for voxel in np.ndindex(*SHAPE):
        box = tuple(slice(at + width, at + 3 * width + 1) for at, width in zip(voxel, WINDOW, strict=True))
        here = tuple(at + 2 * width for at, width in zip(voxel, WINDOW, strict=True))
        result[voxel] = slopes[(slice(None), *box)].mean(axis=(1, 2, 3)) @ image[(slice(None), *here)] + offsets[box].mean()
    return result


@pytest.mark.parametrize("num_modalities", [1, 2, 4])
def test_windows_are_those_of_the_definition(num_modalities):
    """Inside, where windows of windows lie in the grid: at its border each filter repeats the outermost values by itself."""
    random = np.random.default_rng(num_modalities)
    image = random.random((num_modalities, *SHAPE)).astype(np.float32)
    channel = random.random(SHAPE).astype(np.float32)
    filtered = Guide(image, RADIUS, MM).filter(channel, EPSILONS)
    inside = tuple(slice(2 * width, -2 * width) for width in WINDOW)
    for epsilon, own in zip(EPSILONS, filtered, strict=True):
        # Covariances in float32 are differences of numbers near 0.3, so that they are known to 1e-7; divided by epsilon that is 1e-4.
        np.testing.assert_allclose(own[inside], by_definition(channel, image, epsilon)[inside], atol=1e-3)


def test_windows_far_larger_than_the_grid_are_all_of_it():
    """Of which only the outermost voxels matter, repeated on both sides."""
    channel = np.random.default_rng(0).random((4, 5, 7)).astype(np.float32)
    (filtered,) = Guide(np.zeros((1, 4, 5, 7), np.float32), 3.0, (1.0, 2.0, 1e-12)).filter(channel, [1.0])
    assert np.ptp(filtered, axis=2).max() < 0.1 * np.ptp(channel)


def test_a_large_epsilon_is_a_box_filter_and_a_small_one_keeps_edges():
    image = np.zeros((1, 5, 6, 20), np.float32)
    image[..., 10:] = 1.0
    channel = np.random.default_rng(0).normal(image[0], 0.1).astype(np.float32)
    flat, sharp = Guide(image, 2.0, (1.0, 1.0, 1.0)).filter(channel, (1e6, 1e-4))
    assert 0.2 < flat[..., 9].mean() < 0.45
    assert abs(sharp[..., 9].mean()) < 0.1
    assert sharp[..., :10].std() < 0.7 * channel[..., :10].std()


def test_it_is_chosen_where_the_image_helps_and_not_where_logits_are_right():
    with Workers(2) as workers:
        useful = score_guided(crops(2, **LARGER), REGIONS, LARGER["spacing"], workers)
        right = score_guided(crops(2, "right", **LARGER), REGIONS, LARGER["spacing"], workers)
    assert useful.scores.shape == (2, 1 + len(RADII_VOXELS) * len(EPSILONS))
    chosen = useful.best([0, 1])
    assert chosen.radius_mm > 0
    gain = useful.scores[:, useful.choices.index(chosen)] - useful.scores[:, 0]
    # The phantom's labels differ in intensity: a filter that sees the image gains points.
    assert gain.min() > 0.02
    assert right.best([0, 1]) == UNGUIDED


def test_the_scores_are_of_the_labels_that_are_measured():
    crop = crops(1)[0]
    with Workers(1) as workers:
        scores = score_guided([crop], REGIONS, SPACING, workers)
    chosen = scores.choices[5]
    labels = guided_labels(crop.logits.astype(np.float32), crop.image, chosen, crop.spacing, None)
    assert labels.shape == crop.mask.shape
    assert scores.scores[0, 5] == mean_dice(label_confusion(crop, labels), REGIONS)


def test_regions_are_filtered_one_by_one():
    crop = crops(1)[0]
    scheme = RegionScheme.of({"all": [1, 2, 3], "inner": [2, 3]}, class_order=(1, 2))
    log_odds = crop.logits[1:3].astype(np.float32)
    labels = guided_labels(log_odds, crop.image, Guidance(4.0, 0.01), crop.spacing, scheme)
    guide = Guide(crop.image, 4.0, crop.spacing)
    inside = [guide.filter(channel, [0.01])[0] > 0.5 for channel in probabilities_of(log_odds, scheme)]
    np.testing.assert_array_equal(labels, np.where(inside[1], 2, np.where(inside[0], 1, 0)))


def test_settings_are_values():
    assert dataclasses.asdict(Guidance(2.0, 0.01)) == {"radius_mm": 2.0, "epsilon": 0.01}
