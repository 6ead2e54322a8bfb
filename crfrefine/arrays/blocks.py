"""Blocks in a label map, which nearest neighbor leaves when it brings labels from a coarser grid: the network's spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.arguments import given_spacing
from crfrefine.base.array_types import Array, Float64, Labels
from crfrefine.errors import InputError

Integers = NDArray[np.int64]

# A grid is believed if it has a pitch within these, in voxels, and predicts enough.
_MIN_PITCH = 1.3
_MAX_PITCH = 12.0
_MIN_SHARE = 0.9  # of all changes
_MIN_PREDICTED = 5  # planes with changes
_MIN_UNPREDICTED = 4  # planes


def find_blocks(label_map: Labels) -> tuple[float, ...] | None:
    """Return the mean size of blocks of equal labels in voxels per axis, 1 along an axis without blocks; None if no axis has them."""
    # Along an axis from a coarser grid labels change only between blocks. (*grid) has up to three
    # axes.
    pitch = tuple(_pitch(changes) for changes in _count_changes(label_map))
    if any(size > 1 for size in pitch):
        return pitch
    return None


def _count_changes(label_map: Labels) -> list[Integers]:
    """Return per axis how many voxels change their label between neighboring planes."""
    order = sorted(range(label_map.ndim), key=lambda axis: -abs(label_map.strides[axis]))
    volume = label_map.transpose(order)[(np.newaxis,) * (3 - label_map.ndim)]
    counts = [np.zeros(max(size - 1, 0), np.int64) for size in volume.shape]
    for start in range(0, len(volume), 255):  # 255 planes: a byte holds the number of changes.
        rows: Array = np.zeros((counts[1].size, volume.shape[2]), np.uint8)
        columns: Array = np.zeros((volume.shape[1], counts[2].size), np.uint8)
        for index in range(start, min(start + 255, len(volume))):
            plane = volume[index]
            rows += (plane[1:] != plane[:-1]).view(np.uint8)
            columns += (plane[:, 1:] != plane[:, :-1]).view(np.uint8)
            if index:
                counts[0][index - 1] = np.count_nonzero(plane != volume[index - 1])
        counts[1] += rows.sum(axis=1, dtype=np.int64)
        counts[2] += columns.sum(axis=0, dtype=np.int64)
    last = counts[3 - label_map.ndim :]
    return [last[order.index(axis)] for axis in range(label_map.ndim)]


class _Fit(NamedTuple):
    """The phase at which a pitch fits best."""

    pitch: float
    divergence: float
    predicted: Integers  # indices into the planes


def _pitch(changes: Integers) -> float:
    """Return the pitch of the blocks along an axis in voxels, 1 without blocks."""
    changed = np.flatnonzero(changes)
    if changed.size < _MIN_PREDICTED:
        return 1.0
    planes = np.arange(changed[0], changed[-1] + 1)
    length = planes.size
    # Longer runs of planes without a change say nothing.
    after = changed[np.searchsorted(changed, planes)]
    before = changed[np.searchsorted(changed, planes, "right") - 1]
    planes = planes[after - before <= _MAX_PITCH]
    weights = changes[planes] / changes.sum()
    max_pitch = min(_MAX_PITCH, (length - 1) / (_MIN_PREDICTED - 1))
    largest = np.sort(weights)[-math.ceil(planes.size / _MIN_PITCH) :]
    if max_pitch < _MIN_PITCH or largest.sum() < _MIN_SHARE:
        return 1.0

    # At both ends of the planes, neighboring pitches differ by a quarter voxel.
    num_pitches = math.ceil(2 * length * math.log(max_pitch / _MIN_PITCH)) + 1
    pitches = np.geomspace(_MIN_PITCH, max_pitch, num_pitches)
    coarse = max((_fit(planes, weights, x) for x in pitches), key=lambda fit: fit.divergence)
    # Now planes count: else pitches that leave out tips would win. Fewer changes, as by hand, do
    # not count.
    others = np.delete(weights, coarse.predicted)
    is_changed = weights > 3 * (np.median(others) if others.size else 1.0)
    if np.count_nonzero(is_changed) < _MIN_PREDICTED:
        return 1.0
    weights_of_planes = is_changed / np.count_nonzero(is_changed)
    span = 2 * coarse.pitch / length  # two blocks more or less
    pitches = np.clip(coarse.pitch * np.linspace(1 - span, 1 + span, 513), _MIN_PITCH, _MAX_PITCH)
    fine = [_fit(planes, weights_of_planes, x) for x in pitches]
    best = max(fine, key=lambda fit: fit.divergence)
    if weights[best.predicted].sum() < _MIN_SHARE:
        return 1.0
    # Chance does not explain that changes lie on the predicted planes: pitches and phases give
    # about length³ sets of planes.
    inside = is_changed[best.predicted]
    outside = np.delete(is_changed, best.predicted)
    mean = float(is_changed.mean())
    evidence = sum(
        part.size * _divergence(part.mean(), mean) for part in (inside, outside) if part.size
    )
    if (
        np.count_nonzero(inside) < _MIN_PREDICTED
        or outside.size < _MIN_UNPREDICTED
        or evidence <= 3 * math.log(length)
    ):
        return 1.0
    equal = [fit.pitch for fit in fine if fit.divergence > best.divergence - 1e-9]
    return float(min(equal) + max(equal)) / 2


def _fit(planes: Integers, weights: Float64, pitch: float) -> _Fit:
    """Return the phase at which a pitch predicts many changes on few planes."""
    # A block begins where the position modulo the pitch falls into a window of one voxel.
    remainders = planes % pitch
    order = np.argsort(remainders)
    remainders = remainders[order]
    starts = np.arange(planes.size)
    ends = np.searchsorted(np.concatenate([remainders, remainders + pitch]), remainders + 1 - 1e-9)
    sums = np.cumsum(np.concatenate([[0.0], weights[order], weights[order]]))
    shares = sums[ends] - sums[starts]
    expected = (ends - starts) / planes.size
    best = np.argmax(shares - expected)
    predicted = order[np.arange(best, ends[best]) % planes.size]
    return _Fit(pitch, _divergence(float(shares[best]), float(expected[best])), predicted)


def _divergence(share: float, expected: float) -> float:
    """Return the Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    pairs = ((share, expected), (1 - share, 1 - expected))
    return sum(p * math.log(p / q) for p, q in pairs if p > 1e-12 and q > 1e-12)


AUTO = "auto"  # network spacing that is found in the label map
_MAX_DIMS = 3


def find_network_spacing(
    given: Any, labels: Labels, spacing: Sequence[float]
) -> tuple[tuple[float, ...] | None, str | None]:
    """Return mm between voxels of the network along each axis, or None, and a note for the user."""
    # `given` is one number, one per axis, or "auto". Raises InputError if the voxels are not
    # larger, or no blocks are found.
    if given is not None and not (isinstance(given, str) and given == AUTO):
        try:
            network = given_spacing(given, labels.ndim)
        except InputError as error:
            raise InputError(f"network {error}") from None
        if all(wide <= step for wide, step in zip(network, spacing, strict=True)):
            raise InputError(
                f"network spacing is {_by(network)} mm; expected more than the image's {_by(spacing)} mm along an axis at least. If the "
                "network worked on the image's grid, leave it out"
            )
        sizes = [wide / step for wide, step in zip(network, spacing, strict=True)]
        if max(sizes) > max(labels.shape):
            raise InputError(
                f"network spacing is {_by(network)} mm, more than the image of {_by(labels.shape)} voxels of {_by(spacing)} mm; expected mm"
            )
        note = (
            f"the label map is taken as that of a coarser network: {_by(sizes)} voxels of the image"
        )
        return tuple(map(max, network, spacing)), note
    blocks = find_blocks(labels) if labels.ndim <= _MAX_DIMS else None
    if blocks is None:
        if given is None:
            return None, None
        if (labels == labels.flat[0]).all():
            return tuple(
                spacing
            ), "the label map has a single label: there are no borders to refine"
        raise InputError(
            "network spacing 'auto': the label map has no blocks of a coarser grid, as maps have that nearest neighbor brought to the "
            "image's grid; give the spacing of the network: --network-spacing MM, in Python network_spacing=..."
        )
    network = tuple(step * max(1.0, pitch) for step, pitch in zip(spacing, blocks, strict=True))
    text = f"blocks of {_by(blocks)} voxels: {_by(network)} mm"
    if given is None:
        return None, (
            "the label map looks like that of a coarser network, whose stairs stay; for a border at the image's resolution add "
            f"--network-spacing auto, in Python network_spacing='auto': {text}"
        )
    return network, f"the label map is taken as that of a coarser network, found in it: {text}"


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
