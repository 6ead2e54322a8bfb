"""Distances between the boundaries of two masks, in mm. `docs/reference/metrics.md` defines boundary and distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A search tree costs about thirty times as much per boundary voxel as a distance transform per voxel of the box. The tree
# wins on smooth regions, where the boundary is a small part of the box; the transform bounds the time on noise.
_VOXELS_PER_POINT = 30


def boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of a mask that share a face with a voxel outside it, or with the border of the grid."""
    inner = mask.copy(order="K")
    for axis in range(mask.ndim):
        whole, kept = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        kept[1:] &= whole[:-1]
        kept[:-1] &= whole[1:]
        kept[0] = kept[-1] = False
    return mask & ~inner


def boundary_distances(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure the distance from each boundary voxel of one mask to the nearest one of the other, center to center.

    Args:
        prediction: (*grid) not empty.
        reference: (*grid) not empty.
        spacing: mm, one per grid axis.

    Returns:
        Distances in mm from each boundary voxel of the prediction to the reference's boundary, and the reverse, in no particular
        order.
    """
    edge, other = boundary(prediction), boundary(reference)
    shared = edge & other
    num_shared = int(np.count_nonzero(shared))
    from_prediction, from_reference = edge & ~shared, other & ~shared
    if _VOXELS_PER_POINT * (np.count_nonzero(from_prediction) + np.count_nonzero(from_reference)) > edge.size:
        nearest = _nearest_by_transform
    else:
        nearest = _nearest_by_tree
    zeros = np.zeros(num_shared)
    return (
        np.concatenate([zeros, nearest(from_prediction, other, spacing)]),
        np.concatenate([zeros, nearest(from_reference, edge, spacing)]),
    )


def _nearest_by_tree(points: NDArray[np.bool_], targets: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the distance in mm from each point to the nearest target, in C order of the points."""
    from scipy.spatial import cKDTree

    tree = cKDTree(np.argwhere(targets) * np.asarray(spacing, np.float64))
    distances: NDArray[Any] = tree.query(np.argwhere(points) * np.asarray(spacing, np.float64))[0]
    return distances.astype(np.float64, copy=False)


def _nearest_by_transform(points: NDArray[np.bool_], targets: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the same as `_nearest_by_tree`, in a time that depends only on the size of the grid."""
    from scipy import ndimage

    distances: NDArray[np.float64] = ndimage.distance_transform_edt(~targets, sampling=tuple(spacing))[points]
    return distances
