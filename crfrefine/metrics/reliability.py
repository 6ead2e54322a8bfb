"""Sums over voxels that tell how far probabilities can be trusted, and metrics of them. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_BINS = 15
"""Of equal width, between 0 and 1: what Guo et al. 2017 and most after them took."""

SMALLEST_PROBABILITY = 1e-7
"""What happened counts as at least so probable: a single exact zero would make the mean infinite."""


class ReliabilitySums:
    """Sums over voxels, block by block: of confidence minus hits in each bin, of squared errors, of logarithms."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps = np.zeros(NUM_BINS)
        self.squares = self.logarithms = 0.0

    def add_binary(self, probability: NDArray[np.float64], truth: NDArray[np.bool_]) -> None:
        """Count how probable a region was said to be, and where it is."""
        self._add_to_bins(probability, truth)
        # 1 - p where the region is not: the probability of what is the case.
        of_truth = np.where(truth, probability, 1.0 - probability)
        self.squares += float(((1.0 - of_truth) ** 2).sum())
        self._add_logarithms(of_truth)

    def add_labels(self, probabilities: NDArray[np.float64], truth: NDArray[Any]) -> None:
        """Count how probable the likeliest label was said to be, and where it is right; squares and logarithms are those of all labels."""
        best = probabilities.argmax(axis=0)
        voxels = np.arange(truth.size)
        self._add_to_bins(probabilities[best, voxels], best == truth)
        has_channel = truth < len(probabilities)
        of_truth = np.where(has_channel, probabilities[np.where(has_channel, truth, 0), voxels], 0.0)
        # The sum of (p - y)² over labels is that of p², but for the label of the reference: (p - 1)² - p² = 1 - 2 p.
        self.squares += float((probabilities**2).sum()) + float((1.0 - 2.0 * of_truth).sum())
        self._add_logarithms(of_truth)

    def _add_to_bins(self, confidence: NDArray[np.float64], is_hit: NDArray[np.bool_]) -> None:
        bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self.count += confidence.size
        self.gaps += np.bincount(bins, confidence - is_hit, NUM_BINS)

    def _add_logarithms(self, of_truth: NDArray[np.float64]) -> None:
        self.logarithms += float(np.log(np.maximum(of_truth, SMALLEST_PROBABILITY)).sum())


def expected_calibration_error(sums: ReliabilitySums) -> float:
    """Return the mean over voxels of how far confidence and share of hits differ in their bin.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, eq. 5.
    """
    return float(np.abs(sums.gaps).sum() / sums.count)


def brier_score(sums: ReliabilitySums) -> float:
    """Return the mean squared error of the probabilities.

    Source:
        Brier 1950, Monthly Weather Review 78 (1), 1-3.
    """
    return max(sums.squares, 0.0) / sums.count


def negative_log_likelihood(sums: ReliabilitySums) -> float:
    """Return the mean of the negative logarithm of the probability of what is the case."""
    return max(-sums.logarithms, 0.0) / sums.count
