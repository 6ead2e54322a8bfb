"""Label maps as plain arrays, and as logits.

Logits are a fixed value for the label of each voxel, or shares of the labels of a coarser network:
see docs/reference/math.md#7-before-and-after, and #label-maps-of-a-coarser-network there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.limits import MAX_LABELS
from crfrefine.errors import InputError

Box = tuple[slice, ...]  # A part of a grid: one slice per axis, with a start and a stop
# A comparison with one label takes a twentieth of the time of a histogram, which widens each voxel
# to 64 bits.
_MAX_PASSES = 16

_BLOCK = 1 << 18


def argmax_labels(scores: Array) -> Array:
    """Return the label with the highest score at each voxel (the lowest one of equals), in the smallest unsigned type."""
    # In the layout of the scores: one pass per label, several times faster than numpy's strided
    # argmax.
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
    if num_labels <= _MAX_PASSES:
        return tuple(int(np.count_nonzero(labels == label)) for label in range(num_labels))
    flat = labels.ravel(order="K")
    counts = np.zeros(num_labels, np.int64)
    for start in range(0, flat.size, _BLOCK):  # Counting widens each voxel to 64 bits.
        counts += np.bincount(flat[start : start + _BLOCK], minlength=num_labels)[:num_labels]
    return tuple(counts.tolist())


def foreground_labels(labels: Array) -> list[int]:
    """Return the labels above 0 that occur in (*grid) unsigned labels, ascending."""
    return [label for label in _occurring(labels) if label]


def _occurring(labels: Array) -> tuple[int, ...]:
    counts = count_labels(labels, int(labels.max(initial=0)) + 1)
    return tuple(label for label, count in enumerate(counts) if count)


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
        lines = np.moveaxis(near, axis, 0)
        done = 0
        last = min(most, len(lines) - 1)
        while done < last:  # Twice as far with each step, whatever the reach.
            step = min(done + 1, last - done)
            before = lines.copy(order="K")
            lines[step:] |= before[:-step]
            lines[:-step] |= before[step:]
            done += step
    return near


def bounding_box(mask: Bool) -> Box | None:
    """Slices that contain all True voxels; None without any."""
    box = [slice(0, extent) for extent in mask.shape]
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if occupied.size == 0:
            return None
        # Only this part is searched along the other axes.
        box[axis] = slice(int(occupied[0]), int(occupied[-1]) + 1)
    return tuple(box)


# ---- Label maps as logits


CONFIDENCE = 2.0  # logit of a voxel's label; that of the other labels is 0
ABSENT_LOGIT = -1e4  # logit of a label that does not occur: its marginal is 0, and float16 holds it
# Channels, and bytes of logits, from which on a label takes part only near where it occurs: e^0 for
# each of many others would outweigh a voxel's own label.
MANY_LABELS = 16
MAX_IN_MEMORY = 1 << 29


def present_labels(label_map: Array) -> tuple[int, ...]:
    """Return the labels that occur in unsigned labels, ascending.

    Raise InputError if they are more than MAX_LABELS.
    """
    present = _occurring(label_map)
    if len(present) > MAX_LABELS:
        raise InputError(
            f"a label map with {len(present)} different labels; expected at most {MAX_LABELS}. Is it an image?"
        )
    return present


def channels_of(present: Sequence[int]) -> tuple[int, ...]:
    """Return the labels that get a channel: those that occur, the background, and at least two."""
    if {*present} - {0}:
        return tuple(sorted({0, *present}))
    return (0, 1)


def labels_of_one_hot(
    pieces: Iterable[tuple[int, slice, Array]], shape: tuple[int, ...], path: Path
) -> Labels | None:
    """Return the label map, (*grid), of one-hot channels of a file that come in pieces.

    None for other values.
    """
    # A piece: its first channel, planes, (channels, planes, …) values. InputError: no label, or
    # several.
    labels = np.zeros(shape[1:], np.min_scalar_type(shape[0] - 1))
    is_labeled = np.zeros(shape[1:], np.bool_)
    for first, planes, values in pieces:
        for label, channel in enumerate(values, first):
            inside = channel == 1
            if (is_labeled[planes] & inside).any() or not (inside | (channel == 0)).all():
                return None
            is_labeled[planes] |= inside
            labels[planes][inside] = label
    if not is_labeled.any():
        return None
    if not is_labeled.all():
        without = is_labeled.size - int(np.count_nonzero(is_labeled))
        raise InputError(
            f"{path}: the background seems to be missing: the channels are 1 for the label of a "
            f"voxel and else 0, but {without} of {is_labeled.size} voxels have no label. "
            "If background has no channel, put one before the others, or give --add-background; "
            "if these voxels are padding, give them background; or give a label map, with "
            "--input-type labels"
        )
    return labels


def one_hot_logits(
    label_map: Array, channels: Sequence[int], present: Sequence[int] | None = None
) -> Float32:
    """Return (channels, *grid) logits of a label map: CONFIDENCE for a voxel's label, 0 for others, ABSENT_LOGIT for labels not present."""
    logits = np.full((len(channels), *label_map.shape), ABSENT_LOGIT, np.float32)
    for label, channel in zip(channels, logits, strict=True):
        if present is None or label in present:
            np.multiply(label_map == label, np.float32(CONFIDENCE), out=channel)
    return logits


def take_part_nearby(num_channels: int, num_voxels: int) -> bool:
    """Return whether the labels of a label map take part only within the kernels' reach of where they occur."""
    return num_channels >= MANY_LABELS or 4 * num_channels * num_voxels > MAX_IN_MEMORY


def channel_numbers(labels: Labels, channels: Sequence[int]) -> Labels:
    """Return the number of the channel of each label, in the smallest unsigned type.

    Channels ascend, and have every label.
    """
    table = np.zeros(channels[-1] + 1, np.min_scalar_type(len(channels) - 1))
    table[list(channels)] = np.arange(len(channels))
    return _look_up(table, labels)


def renumber(indices: Array, channels: Sequence[int]) -> Labels:
    """Return a label map from (*grid) channel numbers, in the smallest unsigned type and the same memory layout."""
    return _look_up(np.asarray(channels).astype(np.min_scalar_type(max(channels))), indices)


def _look_up(table: Array, indices: Array) -> Array:
    """Return (*grid) entries of a table in the memory layout of the indices.

    Numpy widens indices to 64 bits, so a plane at a time.
    """
    if table[-1] == len(table) - 1:  # Ascending numbers without a gap are their own entries.
        return indices.astype(table.dtype, copy=False)
    entries = np.empty_like(indices, dtype=table.dtype)
    order = StorageOrder.of_memory(indices)
    for plane, target in zip(
        np.atleast_2d(order.to_storage(indices)),
        np.atleast_2d(order.to_storage(entries)),
        strict=True,
    ):
        target[...] = table[plane]
    return entries


def expand_channels(
    values: Float32, channels: Sequence[int], num_labels: int, absent: float
) -> Float32:
    """Return (num_labels, *grid) values from those of some labels, in the same order of the grid's axes in memory; others are `absent`."""
    order = StorageOrder.of_memory(values[0])
    expanded = order.to_user(
        np.full((num_labels, *order.to_storage(values[0]).shape), absent, np.float32)
    )
    for channel, label in zip(values, channels, strict=True):
        expanded[label] = channel
    return expanded


# Standard deviation of the Gaussian that makes shares of labels, in voxels of the network.
SIGMA = 0.5
MIN_SHARE = 1e-3  # smaller shares count as this share
REACH = 1.6  # voxels of the network beyond which a flat border leaves a share below MIN_SHARE
_TRUNCATE = 4.0  # standard deviations at which the Gaussian ends


def share_sigma(network_spacing: Sequence[float], spacing: Sequence[float]) -> tuple[float, ...]:
    """Return the standard deviation along each axis in voxels of the grid, whose spacing is in mm.

    0 along an axis that is not coarser.
    """
    return tuple(
        SIGMA * wide / step if wide > step else 0.0
        for wide, step in zip(network_spacing, spacing, strict=True)
    )


def share_reach(sigma: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels along each axis within which a label has a share above MIN_SHARE."""
    return tuple(int(np.ceil(REACH / SIGMA * width)) for width in sigma)


def log_shares(labels: Labels, label: int, sigma: Sequence[float], box: Box) -> Float32:
    """Return the logarithm of a label's share at the voxels of a box, at least that of MIN_SHARE.

    `sigma` is that of `share_sigma`.
    """
    from scipy.ndimage import gaussian_filter

    ends = [int(_TRUNCATE * width + 0.5) for width in sigma]
    wide = tuple(
        slice(max(0, axis.start - end), axis.stop + end)
        for axis, end in zip(box, ends, strict=True)
    )
    share = gaussian_filter(
        labels[wide] == label, sigma, output=np.float32, mode="nearest", truncate=_TRUNCATE
    )
    inner = share[
        tuple(
            slice(axis.start - out.start, axis.stop - out.start)
            for axis, out in zip(box, wide, strict=True)
        )
    ]
    logits: Float32 = np.log(np.maximum(inner, np.float32(MIN_SHARE)))
    return logits


def share_logits(labels: Labels, num_labels: int, sigma: Sequence[float]) -> Float32:
    """Return (num_labels, *grid) logarithms of the shares of labels 0 to num_labels - 1.

    `sigma` is that of `share_sigma`.
    """
    from scipy.ndimage import find_objects

    logits = np.full((num_labels, *labels.shape), np.log(np.float32(MIN_SHARE)), np.float32)
    whole = tuple(slice(0, extent) for extent in labels.shape)
    reach = share_reach(sigma)
    for label, box in enumerate([whole, *find_objects(labels, num_labels - 1)][:num_labels]):
        if box is not None:
            sides = zip(box, reach, labels.shape, strict=True)
            near = tuple(
                slice(max(0, axis.start - extent), min(size, axis.stop + extent))
                for axis, extent, size in sides
            )
            logits[label][near] = log_shares(labels, label, sigma, near)
    return logits
