"""Voxels and Dice of each label, before and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import count_labels
from crfrefine.metrics.counts import OverlapCounts, dice

if TYPE_CHECKING:
    from numpy.typing import NDArray


def score_labels(
    network: NDArray[Any], refined: NDArray[Any], reference: NDArray[Any] | None, num_labels: int
) -> list[dict[str, int | float | None]]:
    """Return voxels and Dice of each label that occurs, background aside.

    Args:
        network: (*grid) labels before.
        refined: (*grid) labels after.
        reference: (*grid); None: there are no Dice.
        num_labels: L, background included.

    Returns:
        One table per label: label, before and after (voxels), dice_before and dice_after (None if undefined).
    """
    maps = [labels for labels in (network, refined, reference) if labels is not None]
    counts = [count_labels(labels, num_labels) for labels in maps]
    scores = [_dice(labels, reference, num_labels) for labels in (network, refined)]
    return [
        {
            "label": label,
            "before": counts[0][label],
            "after": counts[1][label],
            "dice_before": scores[0][label],
            "dice_after": scores[1][label],
        }
        for label in range(1, num_labels)
        if any(of_map[label] for of_map in counts)
    ]


def _dice(labels: NDArray[Any], reference: NDArray[Any] | None, num_labels: int) -> list[float | None]:
    if reference is None:
        return [None] * num_labels
    both = count_labels(np.where(labels == reference, labels, labels.dtype.type(0)), num_labels)
    of_each = zip(count_labels(labels, num_labels), count_labels(reference, num_labels), both, strict=True)
    values = [dice(OverlapCounts(*counts)) for counts in of_each]
    return [None if math.isnan(value) else value for value in values]
