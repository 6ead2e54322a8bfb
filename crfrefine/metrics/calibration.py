"""The calibration of one case: probabilities against the reference, over all voxels (conventions: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Float64
from crfrefine.base.geometry import reverse_grid
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues
from crfrefine.metrics.reliability import ReliabilitySums

_BLOCK_VOXELS = 1 << 15  # A few arrays of a block fit into a processor's cache.


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
        of_region = {name: [label for label in labels if label < len(probabilities)] for name, labels in members.items()}
    else:
        numbers = {tuple(sorted(set(labels))): number for number, labels in enumerate(channels)}
        of_region = {name: [numbers[tuple(labels)]] for name, labels in members.items() if tuple(labels) in numbers}
    sums = {name: ReliabilitySums() for name in (*regions, ALL_LABELS)}
    for block, truth in _blocks(probabilities, reference, ignore_label):
        for name, own in of_region.items():
            probability = block[own[0]] if len(own) == 1 else np.minimum(block[own].sum(axis=0), 1.0)
            sums[name].add_binary(probability, np.isin(truth, members[name]))
        if channels is None:
            sums[ALL_LABELS].add_labels(block, truth)
    metrics = CALIBRATION_METRICS.items()
    return {name: {key: metric.measure(own) if own.count else math.nan for key, metric in metrics} for name, own in sums.items()}


def _blocks(probabilities: NDArray[np.floating[Any]], reference: Array, ignore_label: int | None) -> Iterator[tuple[Float64, Array]]:
    """Yield probabilities (channels, n) and reference labels (n,), without the voxels that are ignored."""
    if probabilities.shape[1:] != reference.shape:
        raise GridMismatchError(f"probabilities of shape {probabilities.shape[1:]}, but a reference of shape {reference.shape}")
    if reference.dtype.kind not in "biu":
        raise InputError(f"the reference has values of type {reference.dtype}; expected a label map of integers")
    # In the order of files, whose values are not copied then.
    values = reverse_grid(probabilities).reshape(len(probabilities), -1)
    labels = reference.T.reshape(-1)
    for start in range(0, labels.size, _BLOCK_VOXELS):
        block, truth = values[:, start : start + _BLOCK_VOXELS], labels[start : start + _BLOCK_VOXELS]
        if ignore_label is not None and (truth == ignore_label).any():
            kept = truth != ignore_label
            block, truth = block[:, kept], truth[kept]
        if truth.size:
            yield np.clip(block, 0.0, 1.0, dtype=np.float64, casting="unsafe"), truth
