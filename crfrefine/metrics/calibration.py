"""How far probabilities can be trusted: calibration error, Brier score, log likelihood. `docs/metrics.md` has the conventions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.axes import file_order
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.metrics.regions import ALL_LABELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALIBRATION_METRICS = ("ece", "brier", "nll")
"""What `measure_calibration` measures, in the order of reports."""

NUM_BINS = 15
"""Of equal width, between 0 and 1: what Guo et al. 2017 and most after them took."""

SMALLEST_PROBABILITY = 1e-7
"""What happened counts as at least so probable: a single exact zero would make the mean infinite."""

_BLOCK_VOXELS = 1 << 15  # A handful of arrays of a block fit into a processor's cache.


def measure_calibration(
    probabilities: NDArray[np.floating[Any]],
    reference: NDArray[Any],
    regions: Mapping[str, Iterable[int]],
    *,
    ignore_label: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure how well probabilities of labels agree with how often the labels are right, over all voxels.

    A label without a channel has the probability 0 everywhere.

    Args:
        probabilities: (L, *grid) of the labels 0 … L - 1, background first; they should sum to 1 at each voxel. Values a little outside of
            [0, 1] are moved to its ends.
        reference: (*grid) integers.
        regions: the labels that make up each named region; its probability is the sum of theirs.
        ignore_label: voxels where the reference has this value do not count.

    Returns:
        For each region, and for all labels together under the name ALL_LABELS, the values of CALIBRATION_METRICS; NaN where no voxel
        counts.

    Raises:
        GridMismatchError: probabilities and reference differ in shape.
        InputError: the reference does not hold integers.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, eq. 5 (binning); Brier 1950, Monthly Weather Review 78 (1), 1-3.
    """
    if probabilities.shape[1:] != reference.shape:
        raise GridMismatchError(f"probabilities of shape {probabilities.shape[1:]}, but a reference of shape {reference.shape}")
    if reference.dtype.kind not in "biu":
        raise InputError(f"the reference has values of type {reference.dtype}; expected a label map of integers")
    order = file_order(probabilities)  # of what files hold nothing is copied then
    values = order.to_storage(probabilities).reshape(len(probabilities), -1)
    labels = order.to_storage(reference).reshape(-1)
    channels = {name: [label for label in sorted(set(members)) if label < len(values)] for name, members in regions.items()}
    members = {name: np.array(sorted(set(numbers))) for name, numbers in regions.items()}
    sums = {name: _Sums() for name in regions}
    together = _Sums()
    for start in range(0, labels.size, _BLOCK_VOXELS):
        block, truth = values[:, start : start + _BLOCK_VOXELS], labels[start : start + _BLOCK_VOXELS]
        if ignore_label is not None and (truth == ignore_label).any():
            kept = truth != ignore_label
            block, truth = block[:, kept], truth[kept]
        if not truth.size:
            continue
        block = np.clip(block, 0.0, 1.0, dtype=np.float64, casting="unsafe")
        for name, of_region in sums.items():
            of_region.add_binary(_region_probability(block, channels[name]), _is_any(truth, members[name]))
        together.add_labels(block, truth)
    return {**{name: of_region.result() for name, of_region in sums.items()}, ALL_LABELS: together.result()}


class _Sums:
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

    def result(self) -> dict[str, float]:
        """Return the means."""
        if not self.count:
            return dict.fromkeys(CALIBRATION_METRICS, math.nan)
        return {
            "ece": float(np.abs(self.gaps).sum() / self.count),
            "brier": max(self.squares, 0.0) / self.count,
            "nll": max(-self.logarithms, 0.0) / self.count,
        }

    def _add_to_bins(self, confidence: NDArray[np.float64], is_hit: NDArray[np.bool_]) -> None:
        bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self.count += confidence.size
        self.gaps += np.bincount(bins, confidence - is_hit, NUM_BINS)

    def _add_logarithms(self, of_truth: NDArray[np.float64]) -> None:
        self.logarithms += float(np.log(np.maximum(of_truth, SMALLEST_PROBABILITY)).sum())


def _region_probability(block: NDArray[np.float64], channels: list[int]) -> NDArray[np.float64]:
    probability: NDArray[np.float64] = block[channels[0]] if len(channels) == 1 else np.minimum(block[channels].sum(axis=0), 1.0)
    return probability


def _is_any(truth: NDArray[Any], members: NDArray[Any]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = truth == members[0]
    for member in members[1:]:
        found |= truth == member
    return found
