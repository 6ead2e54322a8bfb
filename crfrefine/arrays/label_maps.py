"""Label maps as plain arrays: the best label of each voxel, and the number of voxels of each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool

Box = tuple[slice, ...]
"""A part of a grid: one slice per axis, with a start and a stop."""

# A comparison with one label takes a twentieth of the time of a histogram, which widens each voxel to 64 bits.
_MAX_PASSES = 16

_BLOCK = 1 << 18


def argmax_labels(scores: Array) -> Array:
    """Return the label with the highest score at each voxel (the lowest one of equals), in the smallest unsigned type.

    The memory layout is that of the scores: one pass per label, several times faster than numpy's argmax over a strided axis.
    """
    dtype = np.min_scalar_type(max(len(scores) - 1, 0))
    best = scores[0].copy(order="K")
    labels = np.zeros_like(best, dtype=dtype)
    for label in range(1, len(scores)):
        better = scores[label] > best
        np.copyto(labels, dtype.type(label), where=better)
        np.maximum(best, scores[label], out=best)
    return labels


def count_labels(labels: Array, num_labels: int) -> tuple[int, ...]:
    """Return the number of voxels of each label 0 … num_labels - 1."""
    if num_labels > _MAX_PASSES:
        flat = labels.ravel(order="K")
        counts = np.zeros(num_labels, np.int64)
        for start in range(0, flat.size, _BLOCK):  # Counting widens each voxel to 64 bits.
            counts += np.bincount(flat[start : start + _BLOCK], minlength=num_labels)[:num_labels]
        return tuple(int(count) for count in counts)
    return tuple(int(np.count_nonzero(labels == label)) for label in range(num_labels))


def foreground_labels(labels: Array) -> list[int]:
    """Return the labels above 0 that occur in (*grid) unsigned labels, ascending."""
    counts = count_labels(labels, int(labels.max(initial=0)) + 1)
    return [label for label, count in enumerate(counts) if label and count]


@dataclass(frozen=True)
class LabelChanges:
    """The changes of a label map."""

    voxels_changed: int  # voxels whose label differs
    voxels_before: tuple[int, ...]  # voxels of each label before
    voxels_after: tuple[int, ...]  # voxels of each label after


def widen(mask: Bool, reach: Sequence[int]) -> Bool:
    """Return where a True voxel is within reach, to both sides of each axis: in a box around each voxel, cut off by the grid."""
    near = mask.copy()
    for axis, most in enumerate(reach):
        lines, done = np.moveaxis(near, axis, 0), 0
        last = min(most, len(lines) - 1)
        while done < last:  # Twice as far with each step, whatever the reach.
            step = min(done + 1, last - done)
            before = lines.copy()
            lines[step:] |= before[:-step]
            lines[:-step] |= before[step:]
            done += step
    return near


def bounding_box(mask: Bool) -> Box | None:
    """Slices that contain all True voxels; None without any."""
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if occupied.size == 0:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)
