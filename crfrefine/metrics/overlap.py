"""The metrics of one case: a label map against the reference, region by region. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import given_array, given_spacing
from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.array_types import Bool, Float64
from crfrefine.base.text import TIMES
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.metrics.registry import MASK_METRICS, RegionValues

_ONE_VOXEL = (slice(0, 1), ...)  # the box to measure if both masks are empty


@dataclass
class OverlapCounts:
    """Voxel counts of a predicted mask and its reference, and the metrics that follow; NaN where undefined."""

    num_predicted: int
    num_reference: int
    num_both: int

    @staticmethod
    def of_masks(prediction: Bool, reference: Bool) -> OverlapCounts:
        """Count the voxels of two masks of the same shape."""
        return OverlapCounts(
            *(
                int(np.count_nonzero(mask))
                for mask in (prediction, reference, prediction & reference)
            )
        )

    @staticmethod
    def of_confusion(confusion: NDArray[np.integer[Any]], labels: Sequence[int]) -> OverlapCounts:
        """Count a region of some labels in an (L, L) confusion matrix with reference labels in rows and predicted ones in columns."""
        members = list(labels)
        rows, columns = confusion[members], confusion[:, members]
        return OverlapCounts(int(columns.sum()), int(rows.sum()), int(rows[:, members].sum()))

    def dice(self) -> float:
        """Return 2 |A ∩ B| / (|A| + |B|): 1 is perfect, 0 no overlap."""
        return _ratio(2 * self.num_both, self.num_predicted + self.num_reference)

    def iou(self) -> float:
        """Return intersection over union."""
        return _ratio(self.num_both, self.num_predicted + self.num_reference - self.num_both)

    def sensitivity(self) -> float:
        """Return the share of the reference that is found."""
        return _ratio(self.num_both, self.num_reference)

    def precision(self) -> float:
        """Return the share of the prediction that is right."""
        return _ratio(self.num_both, self.num_predicted)


def _ratio(part: int, total: int) -> float:
    return part / total if total else math.nan


# In floating point, three voxels of 0.1 mm are slightly more than 0.3 mm, and an oblique 1 mm from a header with float32 or six digits
# is slightly more than 1 mm; both must still be within a tolerance of 0.3 mm or 1 mm.
_ROUNDING = 1e-5


class MaskPair(OverlapCounts):
    """A predicted mask and its reference, (*grid), cut to a box around both: a method for each metric, by its name."""

    def __init__(
        self,
        prediction: Bool,
        reference: Bool,
        spacing: Sequence[float],
        voxel_volume: float,
        tolerance_mm: float,
    ) -> None:
        """Count the voxels. `spacing` is in mm, one per grid axis, `voxel_volume` in mm³, `tolerance_mm` that of the surface Dice."""
        super().__init__(*astuple(OverlapCounts.of_masks(prediction, reference)))
        self._masks, self._spacing, self._voxel_volume, self._tolerance_mm = (
            (prediction, reference),
            spacing,
            voxel_volume,
            tolerance_mm,
        )

    @cached_property
    def _directed(self) -> tuple[Float64, Float64] | None:
        """Distances in mm from each boundary to the other one; None if a mask is empty."""
        return (
            boundary_distances(*self._masks, self._spacing)
            if self.num_predicted and self.num_reference
            else None
        )

    def volume_ml(self) -> float:
        """Return the volume of the prediction in ml."""
        return self.num_predicted * self._voxel_volume / 1000.0

    def volume_difference_ml(self) -> float:
        """Return the volume of the prediction minus that of the reference, in ml."""
        return (self.num_predicted - self.num_reference) * self._voxel_volume / 1000.0

    def surface_dice(self) -> float:
        """Return the share of all boundary voxels that are within the tolerance of the other boundary."""
        if self._directed is None:  # No voxel is near an empty boundary.
            return _ratio(0, self.num_predicted + self.num_reference)
        distances = np.concatenate(self._directed)
        return float(
            np.count_nonzero(distances <= self._tolerance_mm * (1 + _ROUNDING)) / distances.size
        )

    def hd_mm(self) -> float:
        """Return the largest distance from one boundary to the other, in mm."""
        return (
            math.nan
            if self._directed is None
            else max(float(one_way.max()) for one_way in self._directed)
        )

    def hd95_mm(self) -> float:
        """Return the larger of the two 95th percentiles, in mm."""
        return (
            math.nan
            if self._directed is None
            else max(float(np.percentile(one_way, 95)) for one_way in self._directed)
        )

    def assd_mm(self) -> float:
        """Return the mean distance over both boundaries, in mm."""
        return math.nan if self._directed is None else float(np.concatenate(self._directed).mean())

    def num_components(self) -> float:
        """Return the number of connected components of the prediction."""
        return float(label_components(self._masks[0])[1])


# A search tree costs about thirty times as much per boundary voxel as a distance transform per voxel of the box. The tree
# wins on smooth regions, where the boundary is a small part of the box; the transform bounds the time on noise.
_VOXELS_PER_POINT = 30


def boundary_distances(
    prediction: Bool, reference: Bool, spacing: Sequence[float]
) -> tuple[Float64, Float64]:
    """Return the distances in mm from each boundary voxel of one mask to the nearest one of the other, center to center; both ways.

    A boundary voxel shares a face with a voxel outside the mask, or with the border of the grid.
    """
    from scipy import ndimage

    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, reference)]
    shared = edges[0] & edges[1]
    apart = [edge & ~shared for edge in edges]
    is_smooth = (
        _VOXELS_PER_POINT * (np.count_nonzero(apart[0]) + np.count_nonzero(apart[1])) <= shared.size
    )
    nearest = _nearest_by_tree if is_smooth else _nearest_by_transform
    zeros = np.zeros(np.count_nonzero(shared))
    there, back = nearest(apart[0], edges[1], spacing), nearest(apart[1], edges[0], spacing)
    return np.concatenate([zeros, there]), np.concatenate([zeros, back])


def _nearest_by_tree(points: Bool, targets: Bool, spacing: Sequence[float]) -> Float64:
    """Return the distance in mm from each point to the nearest target, in C order of the points."""
    from scipy.spatial import cKDTree

    tree = cKDTree(np.argwhere(targets) * np.asarray(spacing, np.float64))
    return np.asarray(
        tree.query(np.argwhere(points) * np.asarray(spacing, np.float64))[0], np.float64
    )


def _nearest_by_transform(points: Bool, targets: Bool, spacing: Sequence[float]) -> Float64:
    """Return the same in a time that depends only on the size of the grid."""
    from scipy import ndimage

    return np.asarray(
        ndimage.distance_transform_edt(~targets, sampling=tuple(spacing))[points], np.float64
    )


def one_voxel(spacing: Sequence[float]) -> float:
    """Return a tolerance of one voxel in mm: its shortest side, since thick slices would forgive errors of many voxels in plane."""
    return min(spacing)


def measure_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    regions: Mapping[str, Iterable[int]],
    spacing: ArrayLike,
    *,
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = tuple(MASK_METRICS),
    ignore_label: int | None = None,
) -> RegionValues:
    """Measure how well a label map agrees with the reference, region by region.

    Args:
        prediction: (*grid) integers.
        reference: (*grid) integers.
        regions: the labels of each named region, 1 or larger.
        spacing: mm, one per grid axis or one for all.
        tolerance_mm: of the surface Dice.
        metrics: names of MASK_METRICS.
        ignore_label: voxels where the reference has this value count as background in both maps.

    Returns:
        The value of each metric for each region; NaN if undefined.

    Raises:
        GridMismatchError: the maps differ in shape.
        InputError: a map does not hold integers, or the spacing is not one positive number per axis.
        ConfigError: an unknown metric, a negative tolerance, or a region that does not consist of labels.
    """
    prediction, reference = (
        given_array(prediction, "the prediction"),
        given_array(reference, "the reference"),
    )
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.dtype.kind not in "biu":
            raise InputError(
                f"the {name} has values of type {labels.dtype}; expected a label map of integers"
            )
    if prediction.shape != reference.shape:
        shapes = (TIMES.join(map(str, labels.shape)) for labels in (prediction, reference))
        raise GridMismatchError(
            "the prediction has {} voxels, the reference {}; both must be on one grid".format(
                *shapes
            )
        )
    if prediction.size == 0:
        raise InputError(f"label maps of shape {prediction.shape} have no voxels")
    spacing = given_spacing(spacing, prediction.ndim)
    named = {
        name: np.asarray(list(region) if isinstance(region, Iterable) else 0)
        for name, region in regions.items()
    }
    if wrong := [
        name
        for name, labels in named.items()
        if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 1)
    ]:
        raise ConfigError(
            f"region {wrong[0]!r}: expected labels from 1 up, such as (1, 3), got {regions[wrong[0]]!r}"
        )
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"tolerance_mm: expected a number of mm, at least 0, got {tolerance_mm}")
    if unknown := [metric for metric in metrics if metric not in MASK_METRICS]:
        raise ConfigError(f"unknown metric {unknown[0]!r}; known are {', '.join(MASK_METRICS)}")
    box = bounding_box((prediction != 0) | (reference != 0)) or _ONE_VOXEL
    # Along an axis with a single voxel, every voxel of a slice would be boundary. The crop may have more of these axes.
    kept = [axis for axis, size in enumerate(prediction.shape) if size > 1]
    predicted, wanted = (
        labels[box].reshape([labels[box].shape[axis] for axis in kept] or [1])
        for labels in (prediction, reference)
    )
    is_measured = True if ignore_label is None else wanted != ignore_label
    values = {}
    sides, voxel_volume = tuple(spacing[axis] for axis in kept) or (1.0,), math.prod(spacing)
    for name, members in named.items():
        masks = np.isin(predicted, members) & is_measured, np.isin(wanted, members) & is_measured
        around = bounding_box(masks[0] | masks[1]) or _ONE_VOXEL
        pair = MaskPair(masks[0][around], masks[1][around], sides, voxel_volume, tolerance_mm)
        values[name] = {metric: getattr(pair, metric)() for metric in metrics}
    return values
