"""Blocks in a label map: traces of a coarser grid from which nearest neighbor brought the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float64, Labels

Integers = NDArray[np.int64]

# Pitches that are looked for, in voxels.
_MIN_PITCH = 1.3
_MAX_PITCH = 12.0

# A grid is believed if it predicts this share of the changes of label, and if there are
# enough planes to tell it from chance.
_MIN_SHARE = 0.9
_MIN_PREDICTED = 5
_MIN_UNPREDICTED = 4

# Bytes hold the sum of so many bools.
_MAX_SUM = 255


@dataclass(frozen=True)
class Blocks:
    """Blocks of equal labels.

    Attributes:
        pitch: size of a block in voxels, one number per axis of the label map, in its order;
            fractions are the mean of smaller and larger blocks. 1 for an axis without blocks.
    """

    pitch: tuple[float, ...]

    def describe(self, spacing: Sequence[float]) -> str:
        """Return the size of a block in words, in voxels and in millimeters.

        Args:
            spacing: millimeters per voxel, in the order of the axes of the label map.
        """
        sizes = [pitch * step for pitch, step in zip(self.pitch, spacing, strict=True)]
        voxels, millimeters = (" x ".join(f"{x:.3g}" for x in row) for row in (self.pitch, sizes))
        return f"blocks of {voxels} voxels: {millimeters} mm"


def find_blocks(label_map: Labels) -> Blocks | None:
    """Return the blocks that a label map consists of; None if no axis has blocks.

    Along an axis that nearest neighbor brought from a coarser grid, labels change only between
    blocks. Linear interpolation leaves no blocks.

    Args:
        label_map: (*grid) labels, with at most three axes of any size.
    """
    pitch = tuple(_pitch(changes) for changes in count_changes(label_map))
    return Blocks(pitch) if any(size > 1 for size in pitch) else None


def count_changes(label_map: Labels) -> list[Integers]:
    """Return per axis the number of voxels whose label changes between neighboring planes.

    One pass, plane by plane in the order of the memory.

    Args:
        label_map: (*grid) labels, with at most three axes of any size.
    """
    order = sorted(range(label_map.ndim), key=lambda axis: -abs(label_map.strides[axis]))
    volume = label_map.transpose(order)[(np.newaxis,) * (3 - label_map.ndim)]
    counts = [np.zeros(max(size - 1, 0), np.int64) for size in volume.shape]
    for start in range(0, len(volume), _MAX_SUM):
        rows: Array = np.zeros((counts[1].size, volume.shape[2]), np.uint8)
        columns: Array = np.zeros((volume.shape[1], counts[2].size), np.uint8)
        for index in range(start, min(start + _MAX_SUM, len(volume))):
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
    share: float
    predicted: Integers  # indices into the planes


def _pitch(changes: Integers) -> float:
    """Return the pitch of the blocks along an axis in voxels, 1 if there are none."""
    changed = np.flatnonzero(changes)
    if changed.size < _MIN_PREDICTED:
        return 1.0
    planes = np.arange(changed[0], changed[-1] + 1)
    before = changed[np.searchsorted(changed, planes, "right") - 1]
    after = changed[np.searchsorted(changed, planes)]
    length = planes.size
    # Long runs of planes without a change say nothing: no label ends there.
    planes = planes[after - before <= _MAX_PITCH]
    weights = changes[planes] / changes.sum()

    # Relative step: at both ends of the planes, neighboring pitches differ by a quarter voxel.
    step = 0.5 / length
    num_steps = math.ceil(math.log(_MAX_PITCH / _MIN_PITCH) / step)
    coarse = [_fit(planes, weights, x) for x in np.geomspace(_MIN_PITCH, _MAX_PITCH, num_steps)]
    best = sorted(coarse, key=lambda fit: -fit.divergence)[:8]
    pitches = np.unique([fit.pitch * (1 + step * np.linspace(-1, 1, 33)) for fit in best])
    fine = [fit for fit in (_fit(planes, weights, x) for x in pitches) if fit.share >= _MIN_SHARE]
    if not fine:
        return 1.0
    top = max(fine, key=lambda fit: fit.divergence)
    if not _is_believed(changes[planes], top.predicted, length):
        return 1.0
    equal = [fit.pitch for fit in fine if fit.divergence > top.divergence - 1e-9]
    return float(min(equal) + max(equal)) / 2


def _fit(planes: Integers, weights: Float64, pitch: float) -> _Fit:
    """Return the phase at which a pitch predicts the most changes on the fewest planes.

    A block begins wherever the position modulo the pitch lies in a window of one voxel.
    """
    remainders = planes % pitch
    order = np.argsort(remainders)
    remainders, size = remainders[order], planes.size
    starts = np.arange(size)
    ends = np.searchsorted(np.concatenate([remainders, remainders + pitch]), remainders + 1 - 1e-9)
    sums = np.concatenate([[0.0], np.cumsum(np.tile(weights[order], 2))])
    shares = sums[ends] - sums[starts]
    divergences = _divergence(shares, (ends - starts) / size)
    best = int(np.argmax(np.where(shares * size > ends - starts, divergences, 0.0)))
    predicted = order[np.arange(best, ends[best]) % size]
    return _Fit(pitch, float(divergences[best]), float(shares[best]), predicted)


def _is_believed(changes: Integers, predicted: Integers, length: int) -> bool:
    """Return whether chance does not explain that changes lie on the predicted planes."""
    others = np.delete(changes, predicted)
    if others.size < _MIN_UNPREDICTED:
        return False
    # A few changes on other planes, such as those of an edit by hand, do not count.
    is_changed = changes > 3 * others.mean()
    hits, num_changed = np.count_nonzero(is_changed[predicted]), np.count_nonzero(is_changed)
    if hits < _MIN_PREDICTED:
        return False
    rate = num_changed / changes.size
    evidence = predicted.size * _divergence(hits / predicted.size, rate)
    evidence += others.size * _divergence((num_changed - hits) / others.size, rate)
    # About length³ sets of planes belong to some pitch and phase.
    return bool(evidence > 3 * math.log(length))


def _divergence(share: Array | float, expected: Array | float) -> Array:
    """Return the Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    share, expected = np.clip(share, 1e-12, 1 - 1e-12), np.clip(expected, 1e-12, 1 - 1e-12)
    in_share = share * np.log(share / expected)
    result: Array = in_share + (1 - share) * np.log((1 - share) / (1 - expected))
    return result
