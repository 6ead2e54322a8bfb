"""The guided filter as a rival: against its definition window by window, and chosen where it helps."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from training_helpers import LARGER, REGIONS, crops, material

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.train.baselines import EPSILONS, RADII_VOXELS, UNGUIDED, Guidance, Guide, guided_labels, score_guided
from crfrefine.train.crops import probabilities_of
from crfrefine.train.model import mean_dice
from crfrefine.train.threads import Workers

SHAPE = (11, 6, 9)
MM = (1.0, 2.1, 1.4)
RADIUS = 2.0  # mm: 2, 1 and 1 voxels
WINDOW = (2, 1, 1)
INSIDE = tuple(slice(2 * width, -2 * width) for width in WINDOW)


def by_definition(channel, image, epsilon):
    """Equations 14 to 16 of He, Sun & Tang, where windows of windows lie in the grid: averages of a linear function per window."""
    sizes = tuple(2 * width + 1 for width in WINDOW)
    windows = sliding_window_view(np.concatenate([image, channel[None]]), sizes, axis=(1, 2, 3))
    windows = windows.reshape(*windows.shape[:4], -1).astype(float)
    means = windows.mean(axis=-1)
    products = np.einsum("i...n,j...n->...ij", windows, windows) / windows.shape[-1] - np.einsum("i...,j...->...ij", means, means)
    slopes = np.linalg.solve(products[..., :3, :3] + epsilon * np.eye(3), products[..., :3, 3:])[..., 0]
    offsets = means[3] - np.einsum("...i,i...->...", slopes, means[:3])
    averaged = sliding_window_view(np.stack([*np.moveaxis(slopes, -1, 0), offsets]), sizes, axis=(1, 2, 3)).mean(axis=(-3, -2, -1))
    return (averaged[:3] * image[:, *INSIDE]).sum(axis=0) + averaged[3]


def test_windows_are_those_of_the_definition():
    """Inside, where windows of windows lie in the grid: at its border each filter repeats the outermost values by itself."""
    random = np.random.default_rng(0)
    image = random.random((3, *SHAPE)).astype(np.float32)
    channel = random.random(SHAPE).astype(np.float32)
    epsilons = EPSILONS[:: len(EPSILONS) - 1]
    for epsilon, own in zip(epsilons, Guide(image, RADIUS, MM).filter(channel, epsilons), strict=True):
        # Covariances in float32 are differences of numbers near 0.3, so that they are known to 1e-7; divided by epsilon that is 1e-4.
        np.testing.assert_allclose(own[INSIDE], by_definition(channel, image, epsilon), atol=1e-3)


def test_it_is_chosen_where_the_image_helps_and_not_where_logits_are_right():
    """The scores are of the labels that are measured."""
    cases, right = crops(2, **LARGER), crops(2, "right", **LARGER)
    with Workers(2) as workers:
        useful, unguided = (score_guided(material(given), LARGER["spacing"], workers) for given in (cases, right))
    assert useful.dice.shape == (2, 1 + len(RADII_VOXELS) * len(EPSILONS))
    chosen = useful.best([0, 1])
    assert chosen.radius_mm > 0
    gain = useful.dice[:, useful.choices.index(chosen)] - useful.dice[:, 0]
    # The phantom's labels differ in intensity: a filter that sees the image gains points.
    assert gain.min() > 0.02
    assert unguided.best([0, 1]) == UNGUIDED
    labels = guided_labels(cases[0].logits.astype(np.float32), cases[0].image, useful.choices[5], cases[0].spacing, None)
    assert useful.dice[0, 5] == mean_dice(cases[0].confusion(labels), REGIONS)


def test_regions_are_filtered_one_by_one():
    crop = crops(1)[0]
    scheme = RegionScheme.of({"all": [1, 2, 3], "inner": [2, 3]}, class_order=(1, 2))
    log_odds = crop.logits[1:3].astype(np.float32)
    guide = Guide(crop.image, 4.0, crop.spacing)
    inside = [guide.filter(channel, [0.01])[0] > 0.5 for channel in probabilities_of(log_odds, scheme)]
    labels = guided_labels(log_odds, crop.image, Guidance(4.0, 0.01), crop.spacing, scheme)
    np.testing.assert_array_equal(labels, np.where(inside[1], 2, np.where(inside[0], 1, 0)))
