"""Synthetic cases like a given one, but with a known truth.

They are a parametric bootstrap of the network's errors: a label map is the truth; logits that agree
with it are disturbed by noise until they are as wrong as the network expects itself to be.

Source: Efron & Tibshirani 1993, chapter 6. Arrays are (channels, *grid) or (*grid), in any number
of dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.region_scheme import RegionScheme, decode, probabilities_of
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.metrics.overlap import dice_of, mean_defined
from crfrefine.train.crops import count_confusion

# Widths of the noise in voxels of the network, in equal parts: errors of a voxel, and errors that
# look like structures.
NOISE_SIGMAS = (1.0, 2.0)
# A label with fewer voxels has no part in a mean Dice: a few voxels would decide it.
MIN_VOXELS = 30
# Tolerance of the Dice that noise leaves: a fifth of the smallest gain that counts.
DICE_TOLERANCE = 0.002
_MAX_HALVINGS = 16
_MAX_SCALE = 1024.0
_MIN_PROBABILITY = 1e-12


def groups_of(num_channels: int, regions: RegionScheme | None) -> Sequence[tuple[int, ...]]:
    """Return the labels that count together: each foreground label, or those of each region."""
    if regions is None:
        return [(label,) for label in range(1, num_channels)]
    return regions.labels


def logits_of(probabilities: Float32, regions: RegionScheme | None) -> Float32:
    """Return the inverse of `probabilities_of`, up to a constant over labels."""
    logarithms = np.log(np.maximum(probabilities, _MIN_PROBABILITY))
    if regions is None:
        return logarithms
    logarithms -= np.log(np.maximum(1.0 - probabilities, _MIN_PROBABILITY))
    return logarithms


def agreeing(logits: Float32, truth: Array, regions: RegionScheme | None) -> Float32:
    """Return (channels, *grid) logits, as doubtful as they were, that decode to the truth.

    The logits of a wrong label and of the true one change places; those of wrong regions change
    sign.
    """
    if regions is not None:
        inside = np.stack([np.isin(truth, labels) for labels in regions.labels])
        sizes = np.abs(logits)
        return np.where(inside, np.maximum(sizes, np.finfo(np.float32).tiny), -sizes)
    labels = argmax_labels(logits)
    wrong = np.nonzero(labels != truth)
    highest = (labels[wrong], *wrong)
    of_truth = (truth[wrong], *wrong)
    changed = logits.copy()
    changed[highest] = logits[of_truth]
    # Of equal logits, the lower label would win.
    changed[of_truth] = np.nextafter(logits[highest], np.float32(np.inf))
    return changed


def dice_of_maps(labels: Array, truth: Array, groups: Sequence[Sequence[int]]) -> float:
    """Return the mean Dice of two (*grid) label maps over groups of labels.

    Groups with fewer than MIN_VOXELS in the truth do not count; NaN if none is left.
    """
    largest = max(max(group) for group in groups)
    num_labels = 1 + max(int(labels.max()), int(truth.max()), largest)
    confusion = count_confusion(truth, labels, num_labels)
    counted = [group for group in groups if confusion[list(group)].sum() >= MIN_VOXELS]
    return mean_defined(dice_of(confusion, counted))


def expected_dice(logits: Float32, mask: Bool, regions: RegionScheme | None) -> float:
    """Return the mean Dice that a network expects of itself, or NaN.

    It is 2 sum(p inside) / (voxels inside + sum(p)), with the probabilities p of a label or region.
    """
    labels = decode(logits, regions)
    probabilities = probabilities_of(logits, regions)
    foreground = probabilities[1:] if regions is None else probabilities
    values = []
    for channel, group in zip(foreground, groups_of(len(logits), regions), strict=True):
        inside = np.isin(labels, group) & mask
        num_inside = int(inside.sum())
        if num_inside >= MIN_VOXELS:
            sum_inside = float(channel[inside].sum(dtype=np.float64))
            sum_all = float(channel[mask].sum(dtype=np.float64))
            values.append(2.0 * sum_inside / (num_inside + sum_all))
    return mean_defined(values)


def make_noise(shape: Sequence[int], voxel: float, random: np.random.Generator) -> Float32:
    """Return (channels, *grid) Gaussian noise of NOISE_SIGMAS, in equal parts.

    Its standard deviation is 1; `voxel` is the unit of the widths.
    """
    total = np.zeros(shape, np.float32)
    for width in NOISE_SIGMAS:
        sigmas = (0.0, *(width * voxel,) * (len(shape) - 1))
        part = gaussian_filter(random.standard_normal(shape, dtype=np.float32), sigmas)
        total += part / part.std()
    return np.asarray(total / total.std(), np.float32)


def noise_scale(
    logits: Float32,
    noise: Float32,
    truth: Array,
    mask: Bool,
    dice: float,
    regions: RegionScheme | None,
) -> float:
    """Return the factor on noise that brings logits, which decode to the truth, to a Dice.

    Noise is (channels, *grid); the Dice is that within the (*grid) mask.
    """
    groups = groups_of(len(logits), regions)

    def reached(scale: float) -> float:
        labels = decode(logits + np.float32(scale) * noise, regions)
        return dice_of_maps(np.where(mask, labels, 0), truth, groups)

    low = 0.0
    high = 1.0
    while reached(high) > dice and high < _MAX_SCALE:
        low = high
        high = 2.0 * high
    for _ in range(_MAX_HALVINGS):
        middle = (low + high) / 2.0
        present = reached(middle)
        if abs(present - dice) <= DICE_TOLERANCE:
            return middle
        if present > dice:
            low = middle
        else:
            high = middle
    return high


def halving(shape: Sequence[int], spacing: Sequence[float]) -> list[int]:
    """Return by how much each axis is coarsened next.

    It is 2 for the finest axis of more than a voxel (the longest of equals), and 1 for the others.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    finest = min(axes, key=lambda axis: (spacing[axis], -shape[axis]))
    factors = [1] * len(shape)
    factors[finest] = 2
    return factors


def block_means(values: Array, factors: Sequence[int]) -> Float32:
    """Return the means of blocks of (channels, *grid) values, of `factors` voxels along each axis.

    Voxels that fill no block are left out.
    """
    filled = [slice(None)]
    block_shape = [len(values)]  # each axis as two: the blocks, and the voxels of a block
    for size, factor in zip(values.shape[1:], factors, strict=True):
        num_blocks = size // factor
        filled.append(slice(num_blocks * factor))
        block_shape += [num_blocks, factor]
    within_blocks = tuple(range(2, len(block_shape), 2))
    blocks = values[tuple(filled)].reshape(block_shape)
    return np.asarray(blocks.mean(axis=within_blocks), np.float32)
