"""Voxels and Dice of each label, and of labels that count together, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.axes import StorageOrder
from crfrefine.metrics.counts import OverlapCounts, dice

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array
    from crfrefine.metrics.regions import Region

Row = dict[str, int | float | str | None]


def score_labels(
    network: Array, refined: Array, reference: Array | None, num_labels: int, regions: Sequence[Region] = ()
) -> tuple[list[Row], int]:
    """Return a row of each label from 1 to `num_labels` - 1 that occurs, then of each region; and the number of changed voxels.

    A row has the label or the region, its voxels before and after, and dice_before and dice_after; None means undefined, or no reference.
    """
    order = StorageOrder.of_memory(network)
    maps = [order.to_storage(labels) for labels in (network, refined, reference) if labels is not None]
    somewhere = np.logical_or.reduce([labels != 0 for labels in maps])  # Nearly all voxels are background in each map.
    maps = [labels[somewhere] for labels in maps]
    occurs = np.zeros(1 + max(int(labels.max(initial=0)) for labels in maps), bool)
    occurs[0] = True
    for labels in maps:
        occurs[labels] = True
    present, places = np.flatnonzero(occurs), np.cumsum(occurs) - 1
    before, after, truth = (places[maps[number]] for number in (0, 1, -1))
    tables = [
        np.bincount(truth * len(present) + labels, minlength=len(present) ** 2).reshape(2 * [len(present)]) for labels in (before, after)
    ]

    def row(members: list[int], **name: Any) -> Row:
        counts = [OverlapCounts.of_confusion(table, members) for table in tables]
        dices = [None if reference is None or math.isnan(dice(each)) else dice(each) for each in counts]
        return {
            **name,
            "before": counts[0].num_predicted,
            "after": counts[1].num_predicted,
            "dice_before": dices[0],
            "dice_after": dices[1],
        }

    rows = [row([place], label=int(label)) for place, label in enumerate(present) if 0 < label < num_labels]
    rows += [
        row([int(places[label]) for label in region.labels if label < len(occurs) and occurs[label]], region=region.name)
        for region in regions
    ]
    return rows, int(np.count_nonzero(before != after))
