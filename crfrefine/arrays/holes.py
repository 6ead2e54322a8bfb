"""Holes of a label map: background that the labels enclose completely, and how it is filled."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fill_holes(label_map: NDArray[Any], labels: Collection[int], *, any_hole: bool = False) -> int:
    """Fill holes in place, and return the number of voxels filled.

    A hole is a region of background, connected over faces, that touches no border of the grid; axes with a single voxel have no border. It
    is filled with the label that it touches with the most faces, the lowest of equals.

    Args:
        label_map: (*grid) integers, 0 is background; any number of dimensions.
        labels: a hole that touches one of these labels and no other is filled.
        any_hole: fill every hole, also those that touch several labels.
    """
    from scipy import ndimage

    box = bounding_box(label_map != 0)
    if box is None:
        return 0
    part = label_map[box]
    regions, count = ndimage.label(part == 0)
    axes = [axis for axis in range(part.ndim) if label_map.shape[axis] > 1]
    is_hole = np.ones(int(count) + 1, dtype=bool)
    is_hole[0] = False
    for axis in axes:
        # What reaches the end of the box is at the grid's border, or continues outside the box, where all is background.
        for end in (0, -1):
            is_hole[regions.take(end, axis=axis)] = False
    voxels = np.flatnonzero(is_hole[regions])
    if not axes or voxels.size == 0:
        return 0
    numbers = regions.ravel()[voxels]
    filling = _fillings(np.ascontiguousarray(part), numbers, voxels, axes, len(is_hole), labels, any_hole)[numbers]
    voxels, filling = voxels[filling != 0], filling[filling != 0]
    part[np.unravel_index(voxels, part.shape)] = filling
    return int(voxels.size)


def _fillings(
    part: NDArray[Any],
    numbers: NDArray[np.integer[Any]],
    voxels: NDArray[np.integer[Any]],
    axes: Collection[int],
    num_regions: int,
    labels: Collection[int],
    any_hole: bool,
) -> NDArray[Any]:
    """Return the label that fills each region, 0: none.

    Args:
        part: labels, in C order.
        numbers: the hole of each of the voxels.
        voxels: their places in C order; none is at the end of an axis.
        axes: that have neighbors.
        num_regions: regions of background, number 0 included.
        labels: see `fill_holes`.
        any_hole: see `fill_holes`.
    """
    flat, base = part.ravel(), int(part.max()) + 1
    pairs = []
    for axis in axes:
        stride = int(np.prod(part.shape[axis + 1 :], dtype=np.int64))
        for step in (-stride, stride):
            touched = flat[voxels + step]
            is_label = touched != 0
            pairs.append(numbers[is_label].astype(np.int64) * base + touched[is_label])
    found, faces = np.unique(np.concatenate(pairs), return_counts=True)
    hole, label = np.divmod(found, base)
    order = np.lexsort((label, -faces, hole))
    holes, first = np.unique(hole[order], return_index=True)
    most = label[order][first]
    is_filled = np.full(most.shape, True) if any_hole else (np.bincount(hole)[holes] == 1) & np.isin(most, list(labels))
    result = np.zeros(num_regions, dtype=part.dtype)
    result[holes[is_filled]] = most[is_filled]
    return result
