"""The calibration of one case over all voxels (conventions: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Bool, Float64
from crfrefine.base.geometry import reverse_grid
from crfrefine.errors import GridMismatchError
from crfrefine.metrics.overlap import require_label_map
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues

_BLOCK_VOXELS = 1 << 15  # A few arrays of a block fit into a processor's cache.
NUM_BINS = 15  # Bins of equal width between 0 and 1, as in Guo et al. 2017 and most later work.
# Smallest probability of the true outcome: a single exact zero would make the mean infinite.
MIN_PROBABILITY = 1e-7


class ReliabilitySums:
    """Sums over voxels, added block by block; each metric is the method of its name."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps = np.zeros(NUM_BINS)  # Confidence minus hits in each bin.
        self.squares = 0.0
        self.logarithms = 0.0

    def add_binary(self, probability: Float64, truth: Bool) -> None:
        """Add the probabilities of a region, and the voxels where it is in the reference."""
        p_truth = np.where(truth, probability, 1.0 - probability)
        self._add(probability, truth, p_truth, float(((1.0 - p_truth) ** 2).sum()))

    def add_labels(self, probabilities: Float64, truth: Array) -> None:
        """Add the probability of the most probable label, and where it is right.

        Squares and logarithms are over all labels.
        """
        voxels = np.arange(truth.size)
        has_channel = truth < len(probabilities)
        channels = np.where(has_channel, truth, 0)
        p_truth = np.where(has_channel, probabilities[channels, voxels], 0.0)
        # The sum of (p - y)² over labels is that of p², plus (p - 1)² - p² = 1 - 2 p for the label
        # of the reference.
        squares = float((probabilities**2).sum()) + float((1.0 - 2.0 * p_truth).sum())
        best = probabilities.argmax(axis=0)
        self._add(probabilities[best, voxels], best == truth, p_truth, squares)

    def _add(self, confidence: Float64, is_hit: Bool, p_truth: Float64, squares: float) -> None:
        bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self.count += confidence.size
        self.gaps += np.bincount(bins, confidence - is_hit, NUM_BINS)
        self.squares += squares
        self.logarithms += float(np.log(np.maximum(p_truth, MIN_PROBABILITY)).sum())

    def values(self) -> dict[str, float]:
        """Return the value of each of CALIBRATION_METRICS; NaN without a voxel."""
        if self.count == 0:
            return dict.fromkeys(CALIBRATION_METRICS, math.nan)
        return {metric: getattr(self, metric)() for metric in CALIBRATION_METRICS}

    def ece(self) -> float:
        """Return the mean gap between confidence and accuracy of bins (Guo et al. 2017, eq. 5)."""
        return float(np.abs(self.gaps).sum() / self.count)

    def brier(self) -> float:
        """Return the mean squared error (Brier 1950, Monthly Weather Review 78 (1), 1-3)."""
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
    channel_labels: Sequence[int] | None = None,
    ignore_label: int | None = None,
) -> RegionValues:
    """Measure how well probabilities agree with the observed frequencies, over all voxels.

    Args:
        probabilities: (L, *grid), which should sum to 1; a label without a channel has 0. With
            `channels` they are (R, *grid).
        reference: (*grid) integers.
        regions: the labels of each named region; its probability is the sum of its labels'.
        channels: the labels of each channel of overlapping regions.
        channel_labels: the label of each channel; None means their numbers.
        ignore_label: voxels where the reference has this value do not count.

    Returns:
        CALIBRATION_METRICS of each region, and of ALL_LABELS; NaN where undefined.

    Raises:
        GridMismatchError: the shapes differ.
        InputError: the reference does not hold integers.
    """
    members = {name: sorted(set(labels)) for name, labels in regions.items()}
    # The numbers of the channels that make up each region. An overlapping region has one, that with
    # the same labels, or is left out.
    region_channels = {}
    labels_of_channels = range(len(probabilities)) if channel_labels is None else channel_labels
    number_of_label = {label: number for number, label in enumerate(labels_of_channels)}
    if channels is None:
        for name, labels in members.items():
            numbers = [number_of_label[label] for label in labels if label in number_of_label]
            region_channels[name] = numbers
    else:
        number_of = {tuple(sorted(set(of))): number for number, of in enumerate(channels)}
        for name, labels in members.items():
            if tuple(labels) in number_of:
                region_channels[name] = [number_of[tuple(labels)]]

    sums = {name: ReliabilitySums() for name in (*regions, ALL_LABELS)}
    for block, truth in _blocks(probabilities, reference, ignore_label):
        for name, numbers in region_channels.items():
            if len(numbers) == 1:
                probability: Float64 = block[numbers[0]]
            else:
                probability = np.minimum(block[numbers].sum(axis=0), 1.0)
            sums[name].add_binary(probability, np.isin(truth, members[name]))
        if channels is None:
            if channel_labels is not None:
                # Labels without a channel have the number behind the last one.
                largest = max(int(truth.max(initial=0)), *channel_labels)
                channel_of = np.full(largest + 1, len(channel_labels))
                channel_of[list(channel_labels)] = np.arange(len(channel_labels))
                truth = channel_of[truth]
            sums[ALL_LABELS].add_labels(block, truth)
    return {name: region_sums.values() for name, region_sums in sums.items()}


def _blocks(
    probabilities: NDArray[np.floating[Any]], reference: Array, ignore_label: int | None
) -> Iterator[tuple[Float64, Array]]:
    """Yield probabilities (channels, n) and reference labels (n,), without ignored voxels."""
    if probabilities.shape[1:] != reference.shape:
        raise GridMismatchError(
            f"probabilities of shape {probabilities.shape[1:]}, "
            f"but a reference of shape {reference.shape}"
        )
    require_label_map("the reference", reference)
    # Values from files are in this order, and thus not copied.
    values = reverse_grid(probabilities).reshape(len(probabilities), -1)
    labels = reference.T.reshape(-1)
    for start in range(0, labels.size, _BLOCK_VOXELS):
        voxels = slice(start, start + _BLOCK_VOXELS)
        block = values[:, voxels]
        truth = labels[voxels]
        if ignore_label is not None and (truth == ignore_label).any():
            kept = truth != ignore_label
            block = block[:, kept]
            truth = truth[kept]
        if truth.size:
            yield np.clip(block, 0.0, 1.0, dtype=np.float64, casting="unsafe"), truth
