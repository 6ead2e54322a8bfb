"""Notes on data that look wrong, although training is possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crfrefine.train.baselines import network_dice
from crfrefine.train.crops import Crop

LOW_DICE = 0.05
"""A mean Dice below this most likely means that the logits do not belong to the reference."""


def oddities(crops: Sequence[Crop], regions: Sequence[tuple[int, ...]]) -> list[str]:
    """Return one sentence per suspicious finding: almost no agreement, padded logits, cases without foreground."""
    dice = network_dice(crops, regions)
    notes = []
    defined = dice[~np.isnan(dice).all(axis=1)]
    if defined.size and float(np.nanmean(defined)) < LOW_DICE:
        channels = "labels" if crops[0].regions is None else "regions"
        notes.append(
            f"the network agrees with the reference to a mean Dice of {np.nanmean(defined):.3f}: "
            f"are the logits' channels in the order of the {channels}, and do logits and labels belong together?"
        )
    padded = [crop.case_id for crop in crops if crop.num_padding_voxels]
    if padded:
        share = sum(crop.num_padding_voxels for crop in crops) / max(1, sum(crop.num_case_voxels for crop in crops))
        notes.append(
            f"{len(padded)} of {len(crops)} cases have voxels whose logits are equal for all labels, as where a cropped output was "
            f"padded ({share:.1%} of all voxels); they take no part and count as background: {_first_names(padded)}"
        )
    empty = [crop.case_id for crop, row in zip(crops, dice, strict=True) if np.isnan(row).all()]
    if empty:
        notes.append(f"{len(empty)} of {len(crops)} cases have no foreground in reference and network: {_first_names(empty)}")
    return notes


def _first_names(case_ids: Sequence[str]) -> str:
    return ", ".join(case_ids[:3]) + (" ..." if len(case_ids) > 3 else "")
