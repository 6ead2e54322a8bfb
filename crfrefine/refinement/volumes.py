"""A bias per label after which each label has a given number of voxels.

See docs/reference/math.md#label-maps-of-a-coarser-network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Bool, Float32, Float64, Labels

# Largest change of a bias, and rounds over all labels, of each stage: fewer voxels matter the
# nearer the balance is.
STAGES = ((6.0, 2), (2.0, 8))

Integers = NDArray[np.int64]


class Member(NamedTuple):
    """Where a label takes part, and its logits there."""

    rows: slice | NDArray[np.integer[Any]]  # of an array of voxels
    logits: Float32  # (m, voxels of a row), or (m,) if a row is a voxel


class _OpenMember(NamedTuple):
    """The open voxels where a label takes part, see `_open`."""

    voxels: NDArray[np.int32]  # (m,), their numbers, or places in another order
    logits: Float32  # (m,), the label's logits there


def matching_bias(entries: Sequence[Member], inside: Bool, wanted: Integers) -> Float64:
    """Return (L,) biases after which each label is the best of about as many voxels as are wanted.

    There is an entry for each label; `inside`, (rows, voxels of a row), has the voxels that count.
    Where no bias can close a margin, voxels keep their label.
    """
    bias = np.zeros(len(entries))
    for limit, num_rounds in STAGES:
        members, num_open, wanted = _open(entries, inside, wanted, np.float32(2 * limit))
        change = _balance(members, num_open, wanted, limit, num_rounds)
        entries = []
        for (voxels, logits), rise in zip(members, change, strict=True):
            entries.append(Member(voxels, logits + np.float32(rise)))
        inside = np.ones(num_open, np.bool_)
        bias += change
    return bias


def volume_bias(logits: Float32, label_map: Labels) -> Float64:
    """Return (L,) biases after which labels have about as many voxels as in a label map, (…).

    The logits are (L, …).
    """
    channels = logits.reshape(len(logits), 1, -1)
    entries = [Member(slice(None), channel) for channel in channels]
    inside = np.ones((1, label_map.size), np.bool_)
    wanted = np.bincount(label_map.ravel(), minlength=len(logits))
    return matching_bias(entries, inside, wanted)


def _open(
    entries: Sequence[Member], inside: Bool, wanted: Integers, window: np.float32
) -> tuple[list[_OpenMember], int, Integers]:
    """Return the voxels whose two best logits differ by less than a window.

    The results are where labels take part among these *open* voxels, the number of open voxels, and
    the numbers of voxels that are wanted among them.
    """
    num_labels = len(entries)
    best = np.full(inside.shape, -np.inf, np.float32)
    second = best.copy()
    best_label = np.zeros(inside.shape, np.min_scalar_type(num_labels))
    for label, (rows, logits) in enumerate(entries):
        before = best[rows]
        is_best = logits > before
        second_so_far = np.maximum(second[rows], logits)
        second[rows] = np.where(is_best, before, second_so_far)
        best[rows] = np.maximum(before, logits)
        number_of_label = best_label.dtype.type(label)
        best_label[rows] = np.where(is_best, number_of_label, best_label[rows])

    is_open = inside & (best - second < window)
    fixed = best_label[inside & ~is_open]
    wanted = wanted - np.bincount(fixed, minlength=num_labels)
    num_open = int(np.count_nonzero(is_open))
    number = np.full(inside.shape, -1, np.int32)
    number[is_open] = np.arange(num_open)
    members = []
    for rows, logits in entries:
        takes_part = is_open[rows] & (logits > best[rows] - window)
        voxels = number[rows]
        members.append(_OpenMember(voxels[takes_part], logits[takes_part]))
    return members, num_open, wanted


def _balance(
    members: Sequence[_OpenMember], num_voxels: int, wanted: Integers, limit: float, num_rounds: int
) -> Float64:
    """Return the biases of labels, (L,)."""
    members, layers = _sort_into_layers(members, num_voxels)
    bias = np.zeros(len(members), np.float32)
    for _ in range(num_rounds):
        for label, (places, logits) in enumerate(members):
            if label == 0 or not len(places):  # The background gets the rest.
                continue
            others = _best_others(label, places, layers, bias)
            distances = others - logits
            bias[label] = _threshold(distances, int(wanted[label]), limit)
    return bias.astype(np.float64)


# The labels, and their logits, of the first voxels, one of each voxel.
_Layer = tuple[NDArray[np.int16], Float32]


def _sort_into_layers(
    members: Sequence[_OpenMember], num_voxels: int
) -> tuple[list[_OpenMember], list[_Layer]]:
    """Return the members with voxels in a new order, and layers of one label per voxel."""
    counts = np.zeros(num_voxels, np.int32)
    for voxels, _ in members:
        counts[voxels] += 1
    # Voxels where many labels meet come first, so that each further layer of labels is shorter.
    order = np.argsort(-counts, kind="stable")
    place = np.empty(num_voxels, np.int32)
    place[order] = np.arange(num_voxels, dtype=np.int32)
    layers = []
    for number in range(counts.max(initial=0)):
        length = int(np.count_nonzero(counts > number))
        labels = np.zeros(length, np.int16)
        layers.append((labels, np.empty(length, np.float32)))

    sorted_members = []
    counts[:] = 0
    for label, (voxels, logits) in enumerate(members):
        places = place[voxels]
        order = np.argsort(places)
        sorted_members.append(_OpenMember(places[order], logits[order]))
        for number, (layer_labels, layer_logits) in enumerate(layers):
            is_free = counts[places] == number
            layer_labels[places[is_free]] = label
            layer_logits[places[is_free]] = logits[is_free]
        counts[places] += 1
    return sorted_members, layers


def _best_others(
    label: int, places: NDArray[np.int32], layers: Sequence[_Layer], bias: Float32
) -> Float32:
    """Return the best logit, bias included, of the other labels at some ascending places."""
    others = np.full(len(places), -np.inf, np.float32)
    for layer_labels, layer_logits in layers:
        in_layer = places[: np.searchsorted(places, len(layer_labels))]
        labels = layer_labels[in_layer]
        biased = layer_logits[in_layer] + bias[labels]
        biased[labels == label] = -np.inf
        best = others[: len(in_layer)]
        np.maximum(best, biased, out=best)
    return others


def _threshold(distances: Float32, wanted: int, limit: float) -> float:
    """Return the bias with which a label wins about the wanted voxels; at most twice the limit."""
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
    elif num_with < len(distances):
        bias = 0.5 * (last + distances[above].min())
    else:
        bias = last + limit
    highest = limit if distances.min() < limit else 2 * limit
    return float(np.clip(bias, -limit, highest))
