"""The table of the page: voxels and Dice of each label before and after the CRF."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.array_types import Array, Bool
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
    reference_in_mask = maps[2] if reference is not None else None

    rows: list[Row] = []
    for label in sorted(present):
        if label < num_labels:
            row = _score((label,), maps[0], maps[1], reference_in_mask)
            rows.append({"label": label, **row})
    for name, labels in regions:
        row = _score(labels, maps[0], maps[1], reference_in_mask)
        rows.append({"region": name, **row})
    return rows, int(np.count_nonzero(maps[0] != maps[1]))


def _score(labels: Sequence[int], network: Array, refined: Array, reference: Array | None) -> Row:
    """Return the voxels and the Dice of labels that count together, before and after."""
    row: Row = {}
    target = None if reference is None else _mask_of(labels, reference)
    for when, label_map in (("before", network), ("after", refined)):
        mask = _mask_of(labels, label_map)
        row[when] = int(np.count_nonzero(mask))
        row[f"dice_{when}"] = None
        if target is not None:
            dice = MaskPair(mask, target).dice()
            if not math.isnan(dice):
                row[f"dice_{when}"] = dice
    return row


def _mask_of(labels: Sequence[int], label_map: Array) -> Bool:
    """Return where a label map has one of the labels."""
    mask: Bool = label_map == labels[0]
    for label in labels[1:]:
        mask |= label_map == label
    return mask
