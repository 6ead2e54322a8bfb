"""The calibration of one case: probabilities against the reference, over all voxels (conventions: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.axes import file_order
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues
from crfrefine.metrics.reliability import ReliabilitySums

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_VOXELS = 1 << 15  # A handful of arrays of a block fit into a processor's cache.


def measure_calibration(
    probabilities: NDArray[np.floating[Any]],
    reference: NDArray[Any],
    regions: Mapping[str, Iterable[int]],
    *,
    ignore_label: int | None = None,
) -> RegionValues:
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
    sums = {name: ReliabilitySums() for name in regions}
    together = ReliabilitySums()
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
    return {name: _metrics_of(of_region) for name, of_region in (*sums.items(), (ALL_LABELS, together))}


def _metrics_of(sums: ReliabilitySums) -> dict[str, float]:
    return {name: metric.measure(sums) if sums.count else math.nan for name, metric in CALIBRATION_METRICS.items()}


def _region_probability(block: NDArray[np.float64], channels: list[int]) -> NDArray[np.float64]:
    probability: NDArray[np.float64] = block[channels[0]] if len(channels) == 1 else np.minimum(block[channels].sum(axis=0), 1.0)
    return probability


def _is_any(truth: NDArray[Any], members: NDArray[Any]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = truth == members[0]
    for member in members[1:]:
        found |= truth == member
    return found
