"""Synthetic cases like a given one, but with a known truth: a parametric bootstrap of the network's errors.

A label map is the truth; logits that agree with it are disturbed by noise until they are as wrong
as the network expects itself to be.

Source: Efron & Tibshirani 1993, chapter 6. Arrays are (channels, *grid) or (*grid), in any number
of dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.region_scheme import RegionScheme, decode, probabilities_of
from crfrefine.metrics.overlap import OverlapCounts
from crfrefine.train.crops import count_confusion

# Widths of the noise in voxels of the network, in equal parts: errors of a voxel, and errors that
# look like structures.
NOISE_SIGMAS = (1.0, 2.0)
# a label with fewer voxels has no part in a mean Dice: a few voxels would decide it
MIN_VOXELS = 30
# of the noise: a fifth of the smallest gain at which parameters are considered
DICE_TOLERANCE = 0.002
_MAX_HALVINGS = 16
_MAX_SCALE = 1024.0
_MIN_PROBABILITY = 1e-12


def groups_of(num_channels: int, regions: RegionScheme | None) -> Sequence[tuple[int, ...]]:
    """Return the labels that count together: each foreground label, or those of each region."""
    if regions is None:
        return [(label,) for label in range(1, num_channels)]
    return regions.labels


def logits_of(
    probabilities: NDArray[np.float32], regions: RegionScheme | None
) -> NDArray[np.float32]:
    """Return the inverse of `probabilities_of`, up to a constant over labels."""
    logarithms: NDArray[np.float32] = np.log(np.maximum(probabilities, _MIN_PROBABILITY))
    if regions is None:
        return logarithms
    logarithms -= np.log(np.maximum(1.0 - probabilities, _MIN_PROBABILITY))
    return logarithms


def agreeing(
    logits: NDArray[np.float32], truth: NDArray[Any], regions: RegionScheme | None
) -> NDArray[np.float32]:
    """Return (channels, *grid) logits, as doubtful as they were, that decode to the truth: those of wrong labels change places or sign."""
    if regions is not None:
        inside = np.stack([np.isin(truth, labels) for labels in regions.labels])
        return np.where(
            inside, np.maximum(np.abs(logits), np.finfo(np.float32).tiny), -np.abs(logits)
        )
    changed = logits.copy()
    labels = argmax_labels(logits)
    wrong = np.nonzero(labels != truth)
    highest = (labels[wrong], *wrong)
    own = (truth[wrong], *wrong)
    changed[highest] = logits[own]
    # Of equal logits, the lower label would win.
    changed[own] = np.nextafter(logits[highest], np.float32(np.inf))
    return changed


def dice_of(labels: NDArray[Any], truth: NDArray[Any], groups: Sequence[Sequence[int]]) -> float:
    """Return the mean Dice of two (*grid) label maps over the groups of labels with MIN_VOXELS in the truth; NaN if none has."""
    num_labels = 1 + max(int(labels.max()), int(truth.max()), *(max(group) for group in groups))
    confusion = count_confusion(truth, labels, num_labels)
    overlaps = [OverlapCounts.of_confusion(confusion, group) for group in groups]
    values = [overlap.dice() for overlap in overlaps if overlap.num_reference >= MIN_VOXELS]
    if values:
        return float(np.mean(values))
    return float("nan")


def expected_dice(
    logits: NDArray[np.float32], mask: NDArray[np.bool_], regions: RegionScheme | None
) -> float:
    """Return the mean Dice that a network expects of itself: 2 sum(p inside) / (voxels inside + sum(p)); or NaN."""
    labels = decode(logits, regions)
    probabilities = probabilities_of(logits, regions)
    values = []
    for number, group in enumerate(groups_of(len(logits), regions), start=regions is None):
        inside = np.isin(labels, group) & mask
        if (size := int(inside.sum())) >= MIN_VOXELS:
            within = float(probabilities[number][inside].sum(dtype=np.float64))
            values.append(
                2.0 * within / (size + float(probabilities[number][mask].sum(dtype=np.float64)))
            )
    if values:
        return float(np.mean(values))
    return float("nan")


def make_noise(
    shape: Sequence[int], voxel: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Return (channels, *grid) Gaussian noise of NOISE_SIGMAS, in equal parts, with a standard deviation of 1; `voxel` is their unit."""
    total = np.zeros(shape, np.float32)
    for sigma in (width * voxel for width in NOISE_SIGMAS):
        part = gaussian_filter(
            random.standard_normal(shape, dtype=np.float32), (0.0, *(sigma,) * (len(shape) - 1))
        )
        total += part / part.std()
    return np.asarray(total / total.std(), np.float32)


def noise_scale(
    logits: NDArray[np.float32],
    noise: NDArray[np.float32],
    truth: NDArray[Any],
    mask: NDArray[np.bool_],
    dice: float,
    regions: RegionScheme | None,
) -> float:
    """Return the factor on (channels, *grid) noise that brings logits, which decode to the truth, to a Dice within the (*grid) mask."""

    def reached(scale: float) -> float:
        labels = decode(logits + np.float32(scale) * noise, regions)
        return dice_of(np.where(mask, labels, 0), truth, groups_of(len(logits), regions))

    low = 0.0
    high = 1.0
    while reached(high) > dice and high < _MAX_SCALE:
        low = high
        high = 2.0 * high
    for _ in range(_MAX_HALVINGS):
        middle = (low + high) / 2.0
        if abs((present := reached(middle)) - dice) <= DICE_TOLERANCE:
            return middle
        low, high = (middle, high) if present > dice else (low, middle)
    return high


def halving(shape: Sequence[int], spacing: Sequence[float]) -> list[int]:
    """Return by how much each axis is coarsened next: 2 for the finest one of more than a voxel (the longest of equals), else 1."""
    finest = min(
        (axis for axis, size in enumerate(shape) if size > 1),
        key=lambda axis: (spacing[axis], -shape[axis]),
    )
    return [2 if axis == finest else 1 for axis in range(len(shape))]


def block_means(values: NDArray[Any], factors: Sequence[int]) -> NDArray[np.float32]:
    """Return the means of blocks of (channels, *grid) values, of `factors` voxels along each axis.

    What fills no block is left out.
    """
    num_blocks = [size // factor for size, factor in zip(values.shape[1:], factors, strict=True)]
    filled = values[
        (
            slice(None),
            *(slice(count * factor) for count, factor in zip(num_blocks, factors, strict=True)),
        )
    ]
    shape = [length for pair in zip(num_blocks, factors, strict=True) for length in pair]
    return np.asarray(
        filled.reshape(len(values), *shape).mean(axis=tuple(range(2, 2 * len(factors) + 1, 2))),
        np.float32,
    )
