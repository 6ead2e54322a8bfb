"""The label map of a coarse network as shares of labels: docs/reference/math.md#label-maps-of-a-coarser-network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Float32, Labels

SIGMA = 0.5
"""Standard deviation of the Gaussian that makes shares of labels, in voxels of the network."""

MIN_SHARE = 1e-3
"""Smaller shares count as this share."""

REACH = 1.6
"""Voxels of the network beyond which a flat border leaves a share below MIN_SHARE."""

_TRUNCATE = 4.0
"""Standard deviations at which the Gaussian ends."""


def share_sigma(network_spacing: Sequence[float], spacing: Sequence[float]) -> tuple[float, ...]:
    """Return the standard deviation along each axis in voxels of the grid; 0 along an axis that is not coarser.

    Args:
        network_spacing: mm between voxels of the network, one per axis, at least the spacing.
        spacing: mm between voxels of the grid, one per axis.
    """
    return tuple(SIGMA * wide / step if wide > step else 0.0 for wide, step in zip(network_spacing, spacing, strict=True))


def share_reach(sigma: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels along each axis within which a label has a share above MIN_SHARE."""
    return tuple(int(np.ceil(REACH / SIGMA * width)) for width in sigma)


def log_shares(labels: Labels, label: int, sigma: Sequence[float], box: Box) -> Float32:
    """Return the logarithm of a label's share at the voxels of a box, at least that of MIN_SHARE.

    Args:
        labels: (*grid).
        label: the label.
        sigma: result of `share_sigma`, in the order of the axes of `labels`.
        box: slices with a start and a stop.
    """
    from scipy.ndimage import gaussian_filter

    ends = [int(_TRUNCATE * width + 0.5) for width in sigma]
    wide = tuple(slice(max(0, axis.start - end), axis.stop + end) for axis, end in zip(box, ends, strict=True))
    share = gaussian_filter(labels[wide] == label, sigma, output=np.float32, mode="nearest", truncate=_TRUNCATE)
    inner = share[tuple(slice(axis.start - out.start, axis.stop - out.start) for axis, out in zip(box, wide, strict=True))]
    logits: Float32 = np.log(np.maximum(inner, np.float32(MIN_SHARE)))
    return logits


def share_logits(labels: Labels, num_labels: int, sigma: Sequence[float]) -> Float32:
    """Return (num_labels, *grid) logarithms of the shares of labels 0 to num_labels - 1.

    Args:
        labels: (*grid).
        num_labels: number of labels.
        sigma: result of `share_sigma`.
    """
    from scipy.ndimage import find_objects

    logits = np.full((num_labels, *labels.shape), np.log(np.float32(MIN_SHARE)), np.float32)
    whole = tuple(slice(0, extent) for extent in labels.shape)
    reach = share_reach(sigma)
    for label, box in enumerate([whole, *find_objects(labels, num_labels - 1)][:num_labels]):
        if box is not None:
            near = tuple(
                slice(max(0, axis.start - extent), min(size, axis.stop + extent))
                for axis, extent, size in zip(box, reach, labels.shape, strict=True)
            )
            logits[label][near] = log_shares(labels, label, sigma, near)
    return logits
