"""Overlap of two masks from three voxel counts: the only Dice of the package, for counts from masks or a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool


@dataclass(frozen=True)
class OverlapCounts:
    """Voxel counts of a predicted mask and its reference."""

    num_predicted: int
    num_reference: int
    num_both: int

    @classmethod
    def of_masks(cls, prediction: Bool, reference: Bool) -> Self:
        """Count the voxels of two masks of the same shape."""
        return cls(int(np.count_nonzero(prediction)), int(np.count_nonzero(reference)), int(np.count_nonzero(prediction & reference)))

    @classmethod
    def of_confusion(cls, confusion: NDArray[np.integer[Any]], labels: Sequence[int]) -> Self:
        """Count a region of some labels in an (L, L) confusion matrix with reference labels in rows and predicted ones in columns."""
        members = list(labels)
        rows, columns = confusion[members], confusion[:, members]
        return cls(int(columns.sum()), int(rows.sum()), int(confusion[np.ix_(members, members)].sum()))


def ratio(part: int, total: int) -> float:
    """Return part / total; NaN if the total is 0."""
    return part / total if total else math.nan


def dice(counts: OverlapCounts) -> float:
    """Return 2 |A ∩ B| / (|A| + |B|): 1 is perfect, 0 no overlap."""
    return ratio(2 * counts.num_both, counts.num_predicted + counts.num_reference)


def iou(counts: OverlapCounts) -> float:
    """Return intersection over union."""
    return ratio(counts.num_both, counts.num_predicted + counts.num_reference - counts.num_both)


def sensitivity(counts: OverlapCounts) -> float:
    """Return the share of the reference that is found."""
    return ratio(counts.num_both, counts.num_reference)


def precision(counts: OverlapCounts) -> float:
    """Return the share of the prediction that is right."""
    return ratio(counts.num_both, counts.num_predicted)
