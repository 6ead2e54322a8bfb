"""A bias per label after which each label has a given number of voxels: docs/reference/math.md#label-maps-of-a-coarser-network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Bool, Float32, Float64, Labels

# Largest change of a bias, and rounds over all labels, of each stage: fewer voxels matter the
# nearer the balance is.
STAGES = ((6.0, 2), (2.0, 8))
Rows = Any  # rows of an array: a slice, or (m,) indices


def matching_bias(
    entries: Sequence[tuple[Rows, Float32]], inside: Bool, wanted: NDArray[np.int64]
) -> Float64:
    """Return (L,) biases after which each label is the best of about as many voxels as are wanted."""
    # Where no bias can close a margin, voxels keep their label. `entries` are the rows where each
    # label takes part, and its logits there, (m, voxels of a row); `inside` has the voxels that
    # count.
    bias = np.zeros(len(entries))
    for limit, num_rounds in STAGES:
        entries, inside, wanted = _open(entries, inside, wanted, np.float32(2 * limit))
        change = _balance(entries, len(inside), wanted, limit, num_rounds)
        entries = [
            (voxels, values + np.float32(more))
            for (voxels, values), more in zip(entries, change, strict=True)
        ]
        bias += change
    return bias


def volume_bias(logits: Float32, label_map: Labels) -> Float64:
    """Return (L,) biases after which logits, (L, …), give each label about as many voxels as a label map, (…), has."""
    rows = [(slice(None), channel.reshape(1, -1)) for channel in logits]
    return matching_bias(
        rows,
        np.ones((1, label_map.size), np.bool_),
        np.bincount(label_map.ravel(), minlength=len(logits)),
    )


def _open(
    entries: Sequence[tuple[Rows, Float32]],
    inside: Bool,
    wanted: NDArray[np.int64],
    window: np.float32,
) -> tuple[list[tuple[NDArray[np.int32], Float32]], Bool, NDArray[np.int64]]:
    """Return the arguments of `matching_bias` for the voxels whose two best logits differ by less than a window, as one row."""
    best, second = np.full((2, *inside.shape), -np.inf, np.float32)
    own = np.zeros(inside.shape, np.min_scalar_type(len(entries)))
    for label, (rows, values) in enumerate(entries):
        before = best[rows]
        is_best = values > before
        second[rows] = np.where(is_best, before, np.maximum(second[rows], values))
        best[rows] = np.maximum(before, values)
        own[rows] = np.where(is_best, own.dtype.type(label), own[rows])
    is_open = inside & (best - second < window)
    wanted = wanted - np.bincount(own[inside & ~is_open], minlength=len(entries))
    num_open = int(np.count_nonzero(is_open))
    number = np.full(inside.shape, -1, np.int32)
    number[is_open] = np.arange(num_open)
    members = []
    for rows, values in entries:
        takes_part = is_open[rows] & (values > best[rows] - window)
        members.append((number[rows][takes_part], values[takes_part]))
    return members, np.ones(num_open, np.bool_), wanted


def _balance(
    members: Sequence[tuple[NDArray[np.int32], Float32]],
    num_voxels: int,
    wanted: NDArray[np.int64],
    limit: float,
    num_rounds: int,
) -> Float64:
    """Return the biases.

    `members` are the numbers of the open voxels where each label takes part, and its logits there.
    """
    counts = np.zeros(num_voxels, np.int32)
    for voxels, _ in members:
        counts[voxels] += 1
    # Voxels where many labels meet come first, so that each further layer of labels is shorter.
    order = np.argsort(-counts, kind="stable")
    place = np.empty(num_voxels, np.int32)
    place[order] = np.arange(num_voxels, dtype=np.int32)
    lengths = [int(np.count_nonzero(counts > layer)) for layer in range(counts.max(initial=0))]
    layers = [(np.zeros(length, np.int16), np.empty(length, np.float32)) for length in lengths]
    sorted_members = []
    counts[:] = 0
    for label, (voxels, values) in enumerate(members):
        places = place[voxels]
        order = np.argsort(places)
        sorted_members.append((places[order], values[order]))
        for layer, (labels, logits) in enumerate(layers):
            free = counts[places] == layer
            labels[places[free]] = label
            logits[places[free]] = values[free]
        counts[places] += 1
    bias = np.zeros(len(members), np.float32)
    for _ in range(num_rounds):
        # The background gets the rest.
        for label, (places, values) in enumerate(sorted_members):
            if label == 0 or not len(places):
                continue
            others = np.full(len(places), -np.inf, np.float32)
            for labels, logits in layers:
                some = places[: np.searchsorted(places, len(labels))]
                held = labels[some]
                biased = np.where(held == label, -np.inf, logits[some] + bias[held])
                np.maximum(others[: len(some)], biased, out=others[: len(some)])
            bias[label] = _threshold(others - values, int(wanted[label]), limit)
    return bias.astype(np.float64)


def _threshold(distances: Float32, wanted: int, limit: float) -> float:
    """Return the bias with which a label wins about as many voxels as are wanted: within the limit, or twice that if it would vanish."""
    if wanted <= 0:
        return -limit
    if wanted >= len(distances):
        return limit
    last = np.partition(distances, wanted - 1)[wanted - 1]
    below = distances < last
    above = distances > last
    num_below = np.count_nonzero(below)
    num_with = len(distances) - np.count_nonzero(above)
    if num_below and wanted - num_below < num_with - wanted:
        bias = 0.5 * (last + distances[below].max())
    else:
        bias = 0.5 * (last + distances[above].min()) if num_with < len(distances) else last + limit
    return float(np.clip(bias, -limit, limit if distances.min() < limit else 2 * limit))
