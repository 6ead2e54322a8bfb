"""Sums over voxels that measure the reliability of probabilities, and their metrics. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

import numpy as np

from crfrefine.base.array_types import Array, Bool, Float64

NUM_BINS = 15  # Bins of equal width between 0 and 1, as in Guo et al. 2017 and most later work.
MIN_PROBABILITY = 1e-7  # Smallest probability of the true outcome: a single exact zero would make the mean infinite.


class ReliabilitySums:
    """Sums over voxels, block by block: of confidence minus hits in each bin, of squared errors, of logarithms."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps = np.zeros(NUM_BINS)
        self.squares = self.logarithms = 0.0

    def add_binary(self, probability: Float64, truth: Bool) -> None:
        """Add the probabilities of a region, and where it is."""
        self._add_to_bins(probability, truth)
        # 1 - p outside the region: the probability of the true outcome.
        of_truth = np.where(truth, probability, 1.0 - probability)
        self.squares += float(((1.0 - of_truth) ** 2).sum())
        self._add_logarithms(of_truth)

    def add_labels(self, probabilities: Float64, truth: Array) -> None:
        """Add the probability of the most probable label, and where it is right; squares and logarithms are over all labels."""
        best = probabilities.argmax(axis=0)
        voxels = np.arange(truth.size)
        self._add_to_bins(probabilities[best, voxels], best == truth)
        has_channel = truth < len(probabilities)
        of_truth = np.where(has_channel, probabilities[np.where(has_channel, truth, 0), voxels], 0.0)
        # The sum of (p - y)² over labels is that of p², except for the label of the reference: (p - 1)² - p² = 1 - 2 p.
        self.squares += float((probabilities**2).sum()) + float((1.0 - 2.0 * of_truth).sum())
        self._add_logarithms(of_truth)

    def _add_to_bins(self, confidence: Float64, is_hit: Bool) -> None:
        bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self.count += confidence.size
        self.gaps += np.bincount(bins, confidence - is_hit, NUM_BINS)

    def _add_logarithms(self, of_truth: Float64) -> None:
        self.logarithms += float(np.log(np.maximum(of_truth, MIN_PROBABILITY)).sum())


def expected_calibration_error(sums: ReliabilitySums) -> float:
    """Return the mean over voxels of the difference between confidence and accuracy in their bin.

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
    """Return the mean negative logarithm of the probability of the true outcome."""
    return max(-sums.logarithms, 0.0) / sums.count
