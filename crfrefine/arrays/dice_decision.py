"""The label map with the best expected Dice under given probabilities: RankSEG's decision, instead of the argmax.

A label takes the voxels whose probability is above half of the Dice that it can expect, so each label has its own threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Array, Bool, Labels

MIN_PROBABILITY = 0.1
"""A label whose probability is nowhere above this is taken to be absent, as in the authors' implementation: any voxel would be a guess."""

MAX_ROUNDS = 50
"""A bound that is not reached: two to ten rounds are usual."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class _Take:
    """The share of a label in a label map, present or planned."""

    mass: float  # the label's probability summed over all voxels: the size that the structure is expected to have
    overlap: float  # the same over the label's own voxels: the expected overlap
    size: int  # number of the label's voxels

    @property
    def worth(self) -> float:
        """What one more voxel of probability 1 adds to half of the expected Dice, before the threshold's share of it is taken off."""
        return 1.0 / (self.size + self.mass + 1.0)

    @property
    def threshold(self) -> float:
        """Half of the expected Dice: voxels of a higher probability raise it."""
        return self.overlap * self.worth


def dice_labels(probabilities: Array, mask: Bool | None = None) -> Labels:
    """Return the label map with the best expected mean Dice of the labels above 0, in the smallest unsigned type.

    The Dice that a label with the voxels S can expect is taken to be 2 sum_S p / (|S| + sum p + 1): the reciprocal moment approximation,
    for independent voxels a lower bound, whose error falls with the size of the structure. With one label above 0 its maximum is found
    exactly. With several, the search starts from the maximum of each label, and contested voxels go to the label that gains most. That is
    repeated with the sizes that follow, as long as the mean rises.

    Args:
        probabilities: (L, *grid), they sum to 1 over the labels; fastest if C-ordered.
        mask: (*grid), True where voxels get a label and count; the others get 0. None: everywhere.

    Returns:
        (*grid) in the memory layout of the probabilities. A voxel at a threshold is background; of equal labels the lowest wins.

    Source: Dai & Li, RankSEG (JMLR 24, 2023), theorem 1, with the approximation, and the score of a voxel that several labels want, of
        Wang & Dai, RankSEG-RMA (NeurIPS 2025); docs/reference/math.md#the-best-expected-dice.

    Examples:
        Half of the voxels that may be label 1 are expected to be: a Dice of 2/3 if all are taken, and 0 by the argmax.

        >>> dice_labels(np.stack([np.full((2, 50), 0.51), np.full((2, 50), 0.49)])).all()
        np.True_
    """
    labels: Labels = np.zeros_like(probabilities[0], dtype=np.min_scalar_type(max(len(probabilities) - 1, 0)))
    values = {label: _inside(probabilities[label], mask) for label in range(1, len(probabilities))}
    takes = {label: alone for label, own in values.items() if (alone := _best_alone(own)) is not None}
    if not takes:
        return labels
    values = {label: values[label] for label in takes}
    best, best_mean = takes, -1.0
    for _ in range(MAX_ROUNDS):
        found = _counted(values, takes)
        mean = sum(take.threshold for take in found.values())
        if not mean > best_mean:
            break
        best, best_mean, takes = takes, mean, found
    flat = np.concatenate([part for _, part in _decided(values, best, labels.dtype)])
    if mask is None:
        labels[...] = flat.reshape(labels.shape)
    else:
        labels[mask] = flat
    return labels


def dice_region_labels(probabilities: Array, scheme: RegionScheme, mask: Bool | None = None) -> Labels:
    """Return the label map of overlapping regions, each with the best expected Dice; a region takes no voxel from another.

    Source: as for `dice_labels`; overlapping regions are the setting of RankSEG's theorem.
    """
    takes = [_best_alone(_inside(own, mask)) for own in probabilities]
    above = np.empty_like(probabilities)
    for own, take, out in zip(probabilities, takes, above, strict=True):
        np.subtract(own, 1.0 if take is None else take.threshold, out=out)
        if mask is not None:
            out[~mask] = -1.0
    return scheme.decode(above)


def _inside(values: Array, mask: Bool | None) -> Array:
    """Return the values in a mask, one after the other; a view if there is no mask and they are in C order."""
    return values.reshape(-1) if mask is None else values[mask]


def _best_alone(values: Array) -> _Take | None:
    """Return the best choice of voxels for a label that need not share them; None if it is taken to be absent.

    The threshold is half of the largest ratio of overlap to size, which Dinkelbach's iteration reaches from below: exactly, and without
    the sorting by which RankSEG ranks voxels.
    """
    highest = float(values.max(initial=0.0))
    if highest <= MIN_PROBABILITY:
        return None
    mass = float(values.sum(dtype=np.float64))
    first = values[values > 0.5 * highest]
    take = _Take(mass, float(first.sum(dtype=np.float64)), first.size)
    chosen = values
    while True:
        chosen = chosen[chosen > take.threshold]
        better = _Take(mass, float(chosen.sum(dtype=np.float64)), chosen.size)
        if not better.threshold > take.threshold:
            return take
        take = better


def _counted(values: dict[int, Array], takes: dict[int, _Take]) -> dict[int, _Take]:
    """Return what each label has of the label map that the thresholds and worths of `takes` give."""
    sizes, overlaps = dict.fromkeys(values, 0), dict.fromkeys(values, 0.0)
    for block, labels in _decided(values, takes, np.min_scalar_type(max(values))):
        for label, own in values.items():
            is_own = labels == label
            count = int(np.count_nonzero(is_own))
            if count:
                sizes[label] += count
                overlaps[label] += float(own[block][is_own].sum(dtype=np.float64))
    return {label: _Take(takes[label].mass, overlaps[label], sizes[label]) for label in values}


def _decided(values: dict[int, Array], takes: dict[int, _Take], dtype: np.dtype[Any]) -> Iterator[tuple[slice, Labels]]:
    """Yield blocks of voxels with their labels: that whose Dice the voxel raises most, background if it raises none."""
    num_voxels = len(next(iter(values.values())))
    for start in range(0, num_voxels, _BLOCK):
        block = slice(start, min(start + _BLOCK, num_voxels))
        labels = np.zeros(block.stop - block.start, dtype)
        best: Array | None = None
        for label, own in values.items():
            gain = own[block] - takes[label].threshold
            gain *= takes[label].worth
            if best is None:
                best = np.zeros_like(gain)
            np.copyto(labels, dtype.type(label), where=gain > best)
            np.maximum(best, gain, out=best)
        yield block, labels
