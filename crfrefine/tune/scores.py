"""The table of the page: voxels and Dice of each label before and after the CRF."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.array_types import Array
from crfrefine.metrics.overlap import MaskPair
from crfrefine.metrics.regions import Region

Row = dict[str, int | float | str | None]


def score_labels(
    network: Array,
    refined: Array,
    reference: Array | None,
    num_labels: int,
    regions: Sequence[Region] = (),
) -> tuple[list[Row], int]:
    """Return the rows of a table, and the number of changed voxels.

    There is a row of each label from 1 to `num_labels` - 1 that occurs, then of each region. It has
    the label or the region, its voxels before and after, and dice_before and dice_after; None means
    undefined, or no reference.
    """
    # Transposed, arrays of files are read in the order of memory.
    maps = [labels.T for labels in (network, refined, reference) if labels is not None]
    present: set[int] = set()
    for label_map in maps:
        present.update(foreground_labels(label_map))
    # Nearly all voxels are background in each map.
    somewhere = np.logical_or.reduce([labels != 0 for labels in maps])
    maps = [labels[somewhere] for labels in maps]

    groups: list[tuple[str, int | str, Sequence[int]]] = []
    for label in sorted(present):
        if label < num_labels:
            groups.append(("label", label, (label,)))
    for name, labels in regions:
        groups.append(("region", name, labels))
    rows = []
    for kind, title, members in groups:
        # Where each map has one of the labels.
        masks = []
        for label_map in maps:
            masks.append(np.logical_or.reduce([label_map == label for label in members]))
        row: Row = {kind: title}
        for when, mask in (("before", masks[0]), ("after", masks[1])):
            row[when] = int(np.count_nonzero(mask))
            dice = math.nan
            if reference is not None:
                dice = MaskPair(mask, masks[2]).dice()
            row[f"dice_{when}"] = None if math.isnan(dice) else dice
        rows.append(row)
    return rows, int(np.count_nonzero(maps[0] != maps[1]))
