"""Two masks of one region, counts of their voxels, and the metrics measured on them. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import label_components
from crfrefine.base.array_types import Bool, Float64


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


# In floating point, three voxels of 0.1 mm are slightly more than 0.3 mm, and an oblique 1 mm from a header with float32 or six digits
# is slightly more than 1 mm; both must still be within a tolerance of 0.3 mm or 1 mm.
_ROUNDING = 1e-5


@dataclass(eq=False)
class MaskPair:
    """A predicted mask and its reference, cut to a box around both; values that several metrics share are computed once."""

    prediction: Bool  # (*grid)
    reference: Bool  # (*grid)
    spacing: Sequence[float]  # mm, one per grid axis.
    voxel_volume: float  # Cubic mm.
    tolerance_mm: float  # Tolerance of the surface Dice.

    @cached_property
    def counts(self) -> OverlapCounts:
        """Voxels of both masks."""
        return OverlapCounts.of_masks(self.prediction, self.reference)

    @cached_property
    def directed_distances(self) -> tuple[Float64, Float64] | None:
        """Distances in mm from each boundary to the other one; None if a mask is empty."""
        if not self.counts.num_predicted or not self.counts.num_reference:
            return None
        return boundary_distances(self.prediction, self.reference, self.spacing)

    @cached_property
    def distances(self) -> Float64 | None:
        """The distances in both directions."""
        return None if self.directed_distances is None else np.concatenate(self.directed_distances)


def volume_ml(pair: MaskPair) -> float:
    """Return the volume of the prediction in ml."""
    return pair.counts.num_predicted * pair.voxel_volume / 1000.0


def volume_difference_ml(pair: MaskPair) -> float:
    """Return the volume of the prediction minus that of the reference, in ml."""
    return (pair.counts.num_predicted - pair.counts.num_reference) * pair.voxel_volume / 1000.0


def surface_dice(pair: MaskPair) -> float:
    """Return the share of all boundary voxels that are within the tolerance of the other boundary."""
    if pair.distances is None:
        # One boundary is empty, so no voxel of the other one is near it.
        return ratio(0, pair.counts.num_predicted + pair.counts.num_reference)
    return float(np.count_nonzero(pair.distances <= pair.tolerance_mm * (1 + _ROUNDING)) / pair.distances.size)


def hausdorff_mm(pair: MaskPair) -> float:
    """Return the largest distance from one boundary to the other, in mm."""
    return math.nan if pair.distances is None else float(pair.distances.max())


def hausdorff_95_mm(pair: MaskPair) -> float:
    """Return the larger of the two 95th percentiles, in mm."""
    if pair.directed_distances is None:
        return math.nan
    return max(float(np.percentile(one_way, 95)) for one_way in pair.directed_distances)


def average_distance_mm(pair: MaskPair) -> float:
    """Return the mean distance over both boundaries, in mm."""
    return math.nan if pair.distances is None else float(pair.distances.mean())


def num_components(pair: MaskPair) -> float:
    """Return the number of connected components of the prediction."""
    return float(label_components(pair.prediction)[1])


# A search tree costs about thirty times as much per boundary voxel as a distance transform per voxel of the box. The tree
# wins on smooth regions, where the boundary is a small part of the box; the transform bounds the time on noise.
_VOXELS_PER_POINT = 30


def boundary(mask: Bool) -> Bool:
    """Return the voxels of a mask that share a face with a voxel outside it, or with the border of the grid."""
    from scipy import ndimage

    edge: Bool = mask & ~ndimage.binary_erosion(mask)
    return edge


def boundary_distances(prediction: Bool, reference: Bool, spacing: Sequence[float]) -> tuple[Float64, Float64]:
    """Return the distances in mm from each boundary voxel of one mask to the nearest one of the other, center to center; both ways."""
    edges = boundary(prediction), boundary(reference)
    shared = edges[0] & edges[1]
    apart = edges[0] & ~shared, edges[1] & ~shared
    is_smooth = _VOXELS_PER_POINT * (np.count_nonzero(apart[0]) + np.count_nonzero(apart[1])) <= shared.size
    nearest = _nearest_by_tree if is_smooth else _nearest_by_transform
    zeros = np.zeros(np.count_nonzero(shared))
    there, back = nearest(apart[0], edges[1], spacing), nearest(apart[1], edges[0], spacing)
    return np.concatenate([zeros, there]), np.concatenate([zeros, back])


def _nearest_by_tree(points: Bool, targets: Bool, spacing: Sequence[float]) -> Float64:
    """Return the distance in mm from each point to the nearest target, in C order of the points."""
    from scipy.spatial import cKDTree

    tree = cKDTree(np.argwhere(targets) * np.asarray(spacing, np.float64))
    return np.asarray(tree.query(np.argwhere(points) * np.asarray(spacing, np.float64))[0], np.float64)


def _nearest_by_transform(points: Bool, targets: Bool, spacing: Sequence[float]) -> Float64:
    """Return the same as `_nearest_by_tree`, in a time that depends only on the size of the grid."""
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(~targets, sampling=tuple(spacing))[points], np.float64)
