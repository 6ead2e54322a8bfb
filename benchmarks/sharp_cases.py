"""Coarse label maps of labeled cases, and methods that bring them to the image's resolution.

Factors are sizes of the network's voxels in voxels of the image, one per axis.
The values of the guided filter were chosen among 51 settings on even cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter, maximum_filter, minimum_filter

import crfrefine
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.train.guided_filter import Guide

KAPPA = 2.0
MIN_SHARE = 1e-3
SIGMA = 0.5  # voxels of the network
GUIDED_RADIUS = 0.5  # voxels of the network
GUIDED_EPSILON = 0.01
MAX_BIAS = 6.0
NUM_ROUNDS = 3

Labels = NDArray[np.integer[Any]]
Shares = NDArray[np.float32]


@dataclass(frozen=True)
class Coarse:
    """A coarse label map on the image's grid."""

    labels: Labels  # (*grid), constant in each block
    image: NDArray[Any]  # (*grid), raw intensities
    spacing: tuple[float, ...]  # mm of the image, one per axis
    factors: tuple[float, ...]


def read_case(data: Path, name: str) -> tuple[NDArray[Any], Labels, tuple[float, ...]]:
    """Image, reference labels and spacing of a case."""
    image = nibabel.load(data / "images" / f"{name}_0000.nii.gz")
    labels = nibabel.load(data / "labels" / f"{name}.nii.gz")
    spacing = tuple(map(float, labels.header.get_zooms()[:3]))
    return np.asarray(image.dataobj), np.asarray(labels.dataobj).astype(np.uint8), spacing


def make_coarse(labels: Labels, factors: Sequence[int], how: str) -> Labels:
    """Return a label per block: that of its middle voxel ("sampled"), or the most frequent one.

    If two labels have equally many voxels, the middle voxel decides where it has one of them.
    """
    sizes = list(zip(labels.shape, factors, strict=True))
    starts = [np.arange(0, size, factor) for size, factor in sizes]
    middles = [np.minimum(np.arange(0, size, f) + f // 2, size - 1) for size, f in sizes]
    middle = labels[np.ix_(*middles)]
    if how == "sampled":
        return middle
    counts = []
    for label in range(int(labels.max()) + 1):
        count = (labels == label).astype(np.float32)
        for axis, own in enumerate(starts):
            count = np.add.reduceat(count, own, axis)
        counts.append(count + np.float32(0.5) * (middle == label))
    return np.argmax(counts, axis=0).astype(labels.dtype)


def to_grid(blocks: Labels, factors: Sequence[int], shape: Sequence[int]) -> Labels:
    """Repeat each block's label in all of its voxels."""
    for axis, factor in enumerate(factors):
        blocks = np.repeat(blocks, factor, axis)
    return blocks[tuple(slice(size) for size in shape)]


def interpolate(coarse: Coarse) -> Shares:
    """Return the shares (L, *grid) by linear interpolation between the centers of blocks.

    This is the mean over a box of a block's size around each voxel.
    """
    shares = _one_hot(coarse)
    for axis, factor in enumerate(coarse.factors, start=1):
        reach = int(np.ceil((factor - 1) / 2))
        weights = np.clip(factor / 2 + 0.5 - np.abs(np.arange(-reach, reach + 1)), 0, 1)
        shares = correlate1d(shares, weights / weights.sum(), axis, mode="nearest")
    return shares


def soften(coarse: Coarse) -> Shares:
    """Return the shares (L, *grid): labels under a Gaussian along the axes that are coarse."""
    sigmas = [SIGMA * factor if factor > 1 else 0.0 for factor in coarse.factors]
    return gaussian_filter(_one_hot(coarse), (0.0, *sigmas), mode="nearest")


def _one_hot(coarse: Coarse) -> Shares:
    labels = range(int(coarse.labels.max()) + 1)
    return np.stack([(coarse.labels == label).astype(np.float32) for label in labels])


def guide(coarse: Coarse) -> Shares:
    """Return interpolated shares, filtered along the image."""
    image = normalize_intensity(coarse.image[None], crfrefine.CrfParameters().intensity)
    steps = [1 / factor if factor > 1 else 1e9 for factor in coarse.factors]
    windows = Guide(image, GUIDED_RADIUS, steps)
    return np.stack([windows.filter(share, [GUIDED_EPSILON])[0] for share in interpolate(coarse)])


def keep_volumes(shares: Shares, coarse: Coarse) -> Labels:
    """Return the argmax of log shares, with biases that give each label its volume in the map.

    Voxels further than a block from other labels keep their label.
    """
    sizes = [2 * int(np.ceil(factor)) + 1 if factor > 1 else 1 for factor in coarse.factors]
    band = maximum_filter(coarse.labels, sizes) != minimum_filter(coarse.labels, sizes)
    shares = shares[:, band]
    places = [np.flatnonzero(share > MIN_SHARE) for share in shares]
    scores = KAPPA * np.log(np.maximum(shares, MIN_SHARE))
    volumes = np.bincount(coarse.labels[band], minlength=len(scores))
    for _ in range(NUM_ROUNDS):
        for label in np.flatnonzero(volumes)[1:]:
            near = scores[:, places[label]]
            margins = np.sort(near[label] - np.delete(near, label, axis=0).max(axis=0))[::-1]
            last = min(volumes[label], len(margins) - 1)
            scores[label] -= np.clip(margins[last - 1 : last + 1].mean(), -MAX_BIAS, MAX_BIAS)
    result = coarse.labels.copy()
    result[band] = scores.argmax(axis=0)
    return result


def crf(coarse: Coarse) -> Labels:
    """Refine with the preset `sharp`."""
    network = [size * factor for size, factor in zip(coarse.spacing, coarse.factors, strict=True)]
    more: dict[str, Any] = {"network_spacing": network, "parameters": "sharp", "threads": 1}
    more |= {"spacing": coarse.spacing, "input_type": "labels"}
    return crfrefine.refine(coarse.labels, coarse.image, **more).label_map


CRF = "crfrefine"
METHODS: dict[str, Callable[[Coarse], Labels]] = {
    "linear shares": lambda coarse: interpolate(coarse).argmax(axis=0),
    "softened + volume": lambda coarse: keep_volumes(soften(coarse), coarse),
    "guided filter + volume": lambda coarse: keep_volumes(guide(coarse), coarse),
    CRF: crf,
}
