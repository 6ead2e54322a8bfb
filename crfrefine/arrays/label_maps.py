"""Label maps as plain arrays, and as logits.

Logits are a fixed value for the label of each voxel, or shares of the labels of a coarser network:
see docs/reference/math.md#7-before-and-after, and #label-maps-of-a-coarser-network there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine.base.array_types import Array, Bool, Float32, Integers, Labels, Shape
from crfrefine.base.geometry import SAME_LENGTH
from crfrefine.base.limits import MAX_LABELS
from crfrefine.errors import CapacityError, InputError

Box = tuple[slice, ...]  # A part of a grid: one slice per axis, with a start and a stop
# Up to so many labels are counted one by one: a pass takes a twentieth of the time of a histogram,
# which widens each voxel to 64 bits.
_MAX_PASSES = 16

_BLOCK = 1 << 18


def argmax_labels(scores: Array) -> Array:
    """Return the label with the highest score at each voxel, in the smallest unsigned type.

    If several are equally high, the lowest counts. The memory layout is that of the scores.
    """
    # One pass per label is several times faster than numpy's strided argmax.
    dtype = np.min_scalar_type(max(len(scores) - 1, 0))
    best = scores[0].copy(order="K")
    labels = np.zeros_like(best, dtype=dtype)
    for label in range(1, len(scores)):
        channel = scores[label]
        np.copyto(labels, dtype.type(label), where=channel > best)
        np.maximum(best, channel, out=best)
    return labels


def count_labels(labels: Array, num_labels: int) -> tuple[int, ...]:
    """Return the number of voxels of each label 0 … num_labels - 1."""
    if num_labels <= _MAX_PASSES:
        return tuple(int(np.count_nonzero(labels == label)) for label in range(num_labels))
    flat = labels.ravel(order="K")
    counts = np.zeros(num_labels, np.int64)
    size = max(_BLOCK, num_labels)
    for start in range(0, flat.size, size):  # Counting widens each voxel to 64 bits.
        block = flat[start : start + size]
        counts += np.bincount(block, minlength=num_labels)[:num_labels]
    return tuple(counts.tolist())


def count_pairs(first: Labels, second: Labels) -> dict[tuple[int, int], int]:
    """Return the voxels of each pair of labels that two (*grid) label maps have at one place."""
    of_first = _occurring(first)
    of_second = _occurring(second)
    num_pairs = len(of_first) * len(of_second)
    numbers = channel_numbers(first, of_first).astype(np.min_scalar_type(num_pairs))
    numbers *= len(of_second)
    numbers += channel_numbers(second, of_second)
    found = zip(product(of_first, of_second), count_labels(numbers, num_pairs), strict=True)
    return {pair: count for pair, count in found if count}


def foreground_labels(labels: Array) -> list[int]:
    """Return the labels above 0 that occur in (*grid) unsigned labels, ascending."""
    return [label for label in _occurring(labels) if label]


def _occurring(labels: Array) -> tuple[int, ...]:
    """Return the labels that occur in (*grid) unsigned labels, ascending."""
    counts = count_labels(labels, int(labels.max(initial=0)) + 1)
    return tuple(np.flatnonzero(counts).tolist())


class LabelChanges(NamedTuple):
    """The changes of a label map."""

    voxels_changed: int  # voxels whose label differs
    voxels_before: tuple[int, ...]  # voxels of each label before
    voxels_after: tuple[int, ...]  # voxels of each label after

    def by_label(self) -> Iterator[tuple[int, int, int]]:
        """Yield each label above 0 that occurs before or after, with its voxels in both."""
        counts = zip(self.voxels_before, self.voxels_after, strict=True)
        for label, (before, after) in enumerate(counts):
            if label and (before or after):
                yield label, before, after


def dilated(mask: Bool, reach: Sequence[int]) -> Bool:
    """Return where a True voxel is within reach, in voxels to both sides of each axis."""
    reached = mask.copy()
    for axis, distance in enumerate(reach):
        planes = np.moveaxis(reached, axis, 0)
        covered = 0
        last = min(distance, len(planes) - 1)
        while covered < last:  # Each step about doubles the distance.
            step = min(covered + 1, last - covered)
            before = planes.copy(order="K")
            planes[step:] |= before[:-step]
            planes[:-step] |= before[step:]
            covered += step
    return reached


def count_inside(mask: Bool | None, shape: Sequence[int]) -> int:
    """Return the number of voxels inside a mask; None means everywhere on a grid of a shape."""
    if mask is None:
        return math.prod(shape)
    return int(np.count_nonzero(mask))


def bounding_box(mask: Bool) -> Box | None:
    """Slices that contain all True voxels; None without any."""
    box = [slice(0, extent) for extent in mask.shape]
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if occupied.size == 0:
            return None
        # Only this part is searched along the other axes.
        last = int(occupied[-1])
        box[axis] = slice(int(occupied[0]), last + 1)
    return tuple(box)


def box_around(boxes: Iterable[Box]) -> Box:
    """Return the smallest box that contains all of these, which are at least one."""
    sides = []
    for slices in zip(*boxes, strict=True):
        start = min(side.start for side in slices)
        stop = max(side.stop for side in slices)
        sides.append(slice(start, stop))
    return tuple(sides)


def relative(box: Box, around: Box) -> Box:
    """Return a box in the indices of a larger box around it."""
    inner = []
    for part, outer in zip(box, around, strict=True):
        first = outer.start
        inner.append(slice(part.start - first, part.stop - first))
    return tuple(inner)


# Smallest share of zeros in the boxes around other values: crops and windows leave hardly any.
_SHARE_IN_BOX = 0.1
# Corners are voxels at a border along all axes. A box has eight, a body has a staircase of them.
_MIN_CORNERS = 48
_SHARE_OF_CORNERS = 0.04


def are_zero_outside_a_body(is_zero: Bool) -> bool:
    """Return whether the zeros of a grid, (*grid), lie around a body, and not around boxes.

    The network saw one box, or several: their faces are flat.
    """
    box = bounding_box(~is_zero)
    if box is None:
        return False
    zeros = is_zero[box]
    if np.count_nonzero(zeros) < _SHARE_IN_BOX * zeros.size:
        return False
    # The outside of the box is 0, too, unless the grid ends there.
    steps = np.eye(zeros.ndim, dtype=int)[np.greater(zeros.shape, 1)]
    zeros = is_zero[grown(box, (1,) * zeros.ndim, is_zero.shape)]
    num_sides = np.zeros(zeros.shape, np.uint8)
    for step in steps.tolist():
        num_sides += dilated(zeros, step) & ~zeros
    num_corners = int(np.count_nonzero(num_sides == len(steps)))
    num_at_border = int(np.count_nonzero(num_sides))
    return num_corners >= max(_MIN_CORNERS, _SHARE_OF_CORNERS * num_at_border)


# ---- Label maps as logits


CONFIDENCE = 2.0  # logit of a voxel's label; that of the other labels is 0
ABSENT_LOGIT = -1e4  # logit of a label that does not occur: its marginal is 0, and float16 holds it


def present_labels(label_map: Array) -> tuple[int, ...]:
    """Return the labels that occur in unsigned labels, ascending.

    Raise CapacityError if they are more than MAX_LABELS.
    """
    present = _occurring(label_map)
    if len(present) > MAX_LABELS:
        raise CapacityError(
            f"a label map with {len(present)} different labels; expected at most {MAX_LABELS}. "
            "Is it an image?"
        )
    return present


def channels_of(present: Sequence[int]) -> tuple[int, ...]:
    """Return the labels that get a channel: those that occur, the background, and at least two."""
    if {*present} - {0}:
        return tuple(sorted({0, *present}))
    return (0, 1)


def occurring_channels(labels: Labels, channels: Sequence[int]) -> tuple[int, ...]:
    """Return the labels of `channels_of` that take part: those that occur, and the background.

    A map that holds only background has a channel of another label, which does not occur.
    """
    return tuple(channels) if labels.any() else (0,)


def labels_of_one_hot(
    pieces: Iterable[tuple[int, slice, Array]], shape: Shape, path: Path
) -> Labels | None:
    """Return the label map, (*grid), of one-hot channels; None for values other than one-hot.

    Args:
        pieces: first channel, planes, and (channels, planes, …) values of each piece of a file.
        shape: (L, *grid), of all pieces together.
        path: the file, for errors.

    Raises:
        InputError: a voxel has no label.
    """
    num_labels, *grid = shape
    labels = np.zeros(grid, np.min_scalar_type(num_labels - 1))
    is_labeled = np.zeros(grid, np.bool_)
    for first, planes, values in pieces:
        for label, channel in enumerate(values, first):
            inside = channel == 1
            has_several_labels = (is_labeled[planes] & inside).any()
            if has_several_labels or not (inside | (channel == 0)).all():
                return None
            is_labeled[planes] |= inside
            labels[planes][inside] = label
    if not is_labeled.any():
        return None
    if not is_labeled.all():
        num_unlabeled = is_labeled.size - np.count_nonzero(is_labeled)
        raise InputError(
            f"{path}: the background seems to be missing: the channels are 1 for the label of a "
            f"voxel and else 0, but {num_unlabeled} of {is_labeled.size} voxels have no label. "
            "If background has no channel, put one before the others, or give --add-background; "
            "if these voxels are padding, give them background; or give a label map, with "
            "--input-type labels"
        )
    return labels


def channel_numbers(labels: Labels, channels: Sequence[int]) -> Labels:
    """Return the number of the channel of each label, in the smallest unsigned type.

    The channels are ascending labels, and every label has one.
    """
    table = np.zeros(channels[-1] + 1, np.int64)
    table[list(channels)] = np.arange(len(channels))
    return renumber(labels, table)


def renumber(indices: Array, channels: Sequence[int] | Integers) -> Labels:
    """Return the label map of (*grid) channel numbers, in the smallest unsigned type.

    The memory layout is that of the numbers.
    """
    table = np.asarray(channels)
    table = table.astype(np.min_scalar_type(table.max()))
    if np.array_equal(table, np.arange(len(table))):
        return indices.astype(table.dtype, copy=False)
    entries = np.empty_like(indices, dtype=table.dtype)
    # Numpy widens indices to 64 bits, so a block at a time, in the order of memory.
    blocks = np.nditer(
        [indices, entries],
        ["external_loop", "buffered", "zerosize_ok"],
        [["readonly"], ["writeonly"]],
        buffersize=_BLOCK,
    )
    with blocks:
        for block, target in blocks:
            target[...] = table[block]
    return entries


def map_labels(labels: Labels, mapping: Mapping[int, int]) -> tuple[Labels, tuple[int, ...]]:
    """Return (*grid) labels with new numbers, and the old numbers that occur among them.

    `mapping` has the new number of each old one; other labels keep theirs. The labels get the
    smallest unsigned type, and keep their memory layout.
    """
    if not mapping:
        return labels, ()
    occurring = _occurring(labels)
    found = tuple(label for label in occurring if label in mapping)
    table = np.zeros(occurring[-1] + 1, np.int64)
    table[list(occurring)] = [mapping.get(label, label) for label in occurring]
    return renumber(labels, table), found


# Standard deviation of the Gaussian that makes shares of labels, in voxels of the network.
SIGMA = 0.5
MIN_SHARE = 1e-3  # smaller shares count as this share
REACH = 1.6  # voxels of the network beyond which a flat border leaves a share below MIN_SHARE
_TRUNCATE = 4.0  # standard deviations at which the Gaussian ends


def share_sigma(network_spacing: Sequence[float], spacing: Sequence[float]) -> tuple[float, ...]:
    """Return the standard deviation along each axis in voxels of the grid, whose spacing is in mm.

    It is 0 along an axis on which the network is not coarser.
    """
    sigma = []
    for network_step, step in zip(network_spacing, spacing, strict=True):
        is_coarser = network_step > step * (1.0 + SAME_LENGTH)
        sigma.append(SIGMA * network_step / step if is_coarser else 0.0)
    return tuple(sigma)


def share_reach(sigma: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels along each axis within which a label has a share above MIN_SHARE."""
    return tuple(int(np.ceil(REACH / SIGMA * width)) for width in sigma)


def log_shares(labels: Labels, label: int, sigma: Sequence[float], box: Box) -> Float32:
    """Return the logarithm of a label's share at the voxels of a box, at least that of MIN_SHARE.

    `sigma` is that of `share_sigma`.
    """
    from scipy.ndimage import gaussian_filter

    margin = [int(_TRUNCATE * width + 0.5) for width in sigma]
    around = grown(box, margin, labels.shape)
    share = gaussian_filter(
        labels[around] == label, sigma, output=np.float32, mode="nearest", truncate=_TRUNCATE
    )
    inner = share[relative(box, around)]
    return np.log(np.maximum(inner, np.float32(MIN_SHARE)))


def label_logits(
    labels: Labels, num_labels: int, sigma: Sequence[float] | None, absent: Collection[int]
) -> Float32:
    """Return (num_labels, *grid) logits of a map of labels 0 to num_labels - 1.

    They are CONFIDENCE for a voxel's label and 0 for other labels, or with the result of
    `share_sigma` the logarithms of shares. Labels that are absent have ABSENT_LOGIT everywhere.
    """
    logits = np.empty((num_labels, *labels.shape), np.float32)
    if sigma is None:
        for label, channel in enumerate(logits):
            np.multiply(labels == label, np.float32(CONFIDENCE), out=channel)
    else:
        from scipy.ndimage import find_objects

        logits[:] = np.log(np.float32(MIN_SHARE))
        reach = share_reach(sigma)
        boxes = [whole_box(labels.shape), *find_objects(labels, num_labels - 1)][:num_labels]
        for label, box in enumerate(boxes):
            if box is not None:
                near = grown(box, reach, labels.shape)
                logits[label][near] = log_shares(labels, label, sigma, near)
    logits[list(absent)] = ABSENT_LOGIT
    return logits


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box of a whole grid."""
    return tuple(slice(0, extent) for extent in shape)


def grown(box: Box, margin: Sequence[int], shape: Sequence[int]) -> Box:
    """Return a box with a margin of voxels on both sides of each axis, cut off by the grid."""
    grown = []
    for part, extent, size in zip(box, margin, shape, strict=True):
        start = max(0, part.start - extent)
        stop = min(size, part.stop + extent)
        grown.append(slice(start, stop))
    return tuple(grown)
