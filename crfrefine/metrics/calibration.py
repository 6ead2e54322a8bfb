"""The calibration of one case: probabilities against the reference, over all voxels (conventions: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Bool, Float64
from crfrefine.base.geometry import reverse_grid
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues

_BLOCK_VOXELS = 1 << 15  # A few arrays of a block fit into a processor's cache.
NUM_BINS = 15  # Bins of equal width between 0 and 1, as in Guo et al. 2017 and most later work.
MIN_PROBABILITY = 1e-7  # Smallest probability of the true outcome: a single exact zero would make the mean infinite.


class ReliabilitySums:
    """Sums over voxels, block by block; a method for each metric of at least one voxel, by its name."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps = np.zeros(NUM_BINS)  # Confidence minus hits in each bin.
        self.squares = self.logarithms = 0.0

    def add_binary(self, probability: Float64, truth: Bool) -> None:
        """Add the probabilities of a region, and where it is."""
        of_truth = np.where(truth, probability, 1.0 - probability)
        self._add(probability, truth, of_truth, float(((1.0 - of_truth) ** 2).sum()))

    def add_labels(self, probabilities: Float64, truth: Array) -> None:
        """Add the probability of the most probable label, and where it is right; squares and logarithms are over all labels."""
        best, voxels, has_channel = (
            probabilities.argmax(axis=0),
            np.arange(truth.size),
            truth < len(probabilities),
        )
        of_truth = np.where(
            has_channel, probabilities[np.where(has_channel, truth, 0), voxels], 0.0
        )
        # The sum of (p - y)² over labels is that of p², except for the label of the reference: (p - 1)² - p² = 1 - 2 p.
        squares = float((probabilities**2).sum()) + float((1.0 - 2.0 * of_truth).sum())
        self._add(probabilities[best, voxels], best == truth, of_truth, squares)

    def _add(self, confidence: Float64, is_hit: Bool, of_truth: Float64, squares: float) -> None:
        bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self.count += confidence.size
        self.gaps += np.bincount(bins, confidence - is_hit, NUM_BINS)
        self.squares += squares
        self.logarithms += float(np.log(np.maximum(of_truth, MIN_PROBABILITY)).sum())

    def ece(self) -> float:
        """Return the mean over voxels of the difference between confidence and accuracy in their bin (Guo et al. 2017, eq. 5)."""
        return float(np.abs(self.gaps).sum() / self.count)

    def brier(self) -> float:
        """Return the mean squared error of the probabilities (Brier 1950, Monthly Weather Review 78 (1), 1-3)."""
        return max(self.squares, 0.0) / self.count

    def nll(self) -> float:
        """Return the mean negative logarithm of the probability of the true outcome."""
        return max(-self.logarithms, 0.0) / self.count


def measure_calibration(
    probabilities: NDArray[np.floating[Any]],
    reference: Array,
    regions: Mapping[str, Iterable[int]],
    *,
    channels: Sequence[Iterable[int]] | None = None,
    ignore_label: int | None = None,
) -> RegionValues:
    """Measure how well probabilities agree with the observed frequencies, over all voxels.

    The probabilities, (L, *grid), should sum to 1; a label without a channel has probability 0. `channels`
    are the labels of each channel of overlapping regions, (R, *grid). The reference is (*grid) integers;
    voxels with `ignore_label` do not count. Returns CALIBRATION_METRICS of each named region, whose
    probability is the sum of its labels', and of ALL_LABELS; NaN where undefined. Raises GridMismatchError
    (shapes differ) or InputError (no integers).
    """
    members = {name: sorted(set(labels)) for name, labels in regions.items()}
    if channels is None:
        of_region = {
            name: [label for label in labels if label < len(probabilities)]
            for name, labels in members.items()
        }
    else:
        numbers = {tuple(sorted(set(labels))): number for number, labels in enumerate(channels)}
        of_region = {
            name: [numbers[tuple(labels)]]
            for name, labels in members.items()
            if tuple(labels) in numbers
        }
    sums = {name: ReliabilitySums() for name in (*regions, ALL_LABELS)}
    for block, truth in _blocks(probabilities, reference, ignore_label):
        for name, own in of_region.items():
            probability = (
                block[own[0]] if len(own) == 1 else np.minimum(block[own].sum(axis=0), 1.0)
            )
            sums[name].add_binary(probability, np.isin(truth, members[name]))
        if channels is None:
            sums[ALL_LABELS].add_labels(block, truth)
    return {
        name: {
            metric: getattr(own, metric)() if own.count else math.nan
            for metric in CALIBRATION_METRICS
        }
        for name, own in sums.items()
    }


def _blocks(
    probabilities: NDArray[np.floating[Any]], reference: Array, ignore_label: int | None
) -> Iterator[tuple[Float64, Array]]:
    """Yield probabilities (channels, n) and reference labels (n,), without the voxels that are ignored."""
    if probabilities.shape[1:] != reference.shape:
        raise GridMismatchError(
            f"probabilities of shape {probabilities.shape[1:]}, but a reference of shape {reference.shape}"
        )
    if reference.dtype.kind not in "biu":
        raise InputError(
            f"the reference has values of type {reference.dtype}; expected a label map of integers"
        )
    # In the order of files, whose values are not copied then.
    values = reverse_grid(probabilities).reshape(len(probabilities), -1)
    labels = reference.T.reshape(-1)
    for start in range(0, labels.size, _BLOCK_VOXELS):
        block, truth = (
            values[:, start : start + _BLOCK_VOXELS],
            labels[start : start + _BLOCK_VOXELS],
        )
        if ignore_label is not None and (truth == ignore_label).any():
            kept = truth != ignore_label
            block, truth = block[:, kept], truth[kept]
        if truth.size:
            yield np.clip(block, 0.0, 1.0, dtype=np.float64, casting="unsafe"), truth
