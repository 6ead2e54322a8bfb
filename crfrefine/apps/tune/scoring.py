"""Voxels and Dice of each label, and of labels that count together, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import count_labels
from crfrefine.base.axes import StorageOrder
from crfrefine.metrics.counts import OverlapCounts, dice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.metrics.regions import Region


@dataclass(frozen=True)
class Scores:
    """What a table says of two label maps.

    Attributes:
        rows: of each label that occurs, then of each region: label or region, before and after (voxels), dice_before and dice_after (None:
            undefined, or there is no reference).
        voxels_changed: with another label after than before.
    """

    rows: list[dict[str, int | float | str | None]]
    voxels_changed: int


def score_labels(
    network: NDArray[Any], refined: NDArray[Any], reference: NDArray[Any] | None, num_labels: int, regions: Sequence[Region] = ()
) -> Scores:
    """Count voxels and Dice, background aside.

    Args:
        network: (*grid) labels before.
        refined: (*grid) labels after.
        reference: (*grid); None: there are no Dice.
        num_labels: L, background included.
        regions: labels that count together.
    """
    order = StorageOrder.of_memory(network)
    maps = [order.to_storage(labels) for labels in (network, refined, reference) if labels is not None]
    # Nearly all voxels are background in each map.
    somewhere = maps[0] != 0
    for labels in maps[1:]:
        somewhere |= labels != 0
    before, after, *truth = (labels[somewhere] for labels in maps)
    counts = [count_labels(labels, num_labels) for labels in (before, after, *truth)]
    rows: list[dict[str, int | float | str | None]] = []
    overlaps = [count_labels(labels[labels == truth[0]], num_labels) for labels in (before, after)] if truth else []
    for label in range(1, num_labels):
        if any(of_map[label] for of_map in counts):
            triples = [OverlapCounts(of_map[label], counts[2][label], both[label]) for of_map, both in zip(counts, overlaps, strict=False)]
            rows.append({"label": label, **_row(counts[0][label], counts[1][label], triples)})
    for region in regions:
        is_in = np.zeros(max(num_labels, *(int(labels.max(initial=0)) + 1 for labels in (before, after, *truth))), np.bool_)
        is_in[[label for label in region.labels if label < len(is_in)]] = True
        old, new, *true = (is_in[labels] for labels in (before, after, *truth))
        triples = [OverlapCounts.of_masks(one, true[0]) for one in (old, new)] if true else []
        rows.append({"region": region.name, **_row(int(old.sum()), int(new.sum()), triples)})
    return Scores(rows, int(np.count_nonzero(before != after)))


def _row(num_before: int, num_after: int, overlaps: Sequence[OverlapCounts]) -> dict[str, int | float | str | None]:
    values: list[float | None] = [None if math.isnan(value) else value for value in map(dice, overlaps)] or [None, None]
    return {"before": num_before, "after": num_after, "dice_before": values[0], "dice_after": values[1]}
