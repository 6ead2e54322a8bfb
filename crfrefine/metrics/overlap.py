"""The metrics of one case's label map (conventions: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import given_array, given_spacing
from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.array_types import Array, Bool, Float64, Integers
from crfrefine.base.text import text_of_sizes
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.metrics.registry import MASK_METRICS, RegionValues

_ONE_VOXEL = (slice(0, 1), ...)  # the box to measure if both masks are empty


def ratio(part: float, total: int) -> float:
    """Return the share that a part has of a total; NaN if the total is 0."""
    if total == 0:
        return math.nan
    return part / total


# In floating point, three voxels of 0.1 mm are slightly more than 0.3 mm, and an oblique 1 mm from
# a header with float32 or six digits is slightly more than 1 mm; both must still be within a
# tolerance of 0.3 mm or 1 mm.
_ROUNDING = 1e-5


class MaskPair:
    """A predicted mask and its reference, cut to a box around both: a method for each metric."""

    def __init__(
        self,
        prediction: Bool,
        reference: Bool,
        spacing: Sequence[float] = (),
        voxel_volume: float = 1.0,
        tolerance_mm: float = 1.0,
    ) -> None:
        """Count the voxels.

        Args:
            prediction: (*grid).
            reference: (*grid).
            spacing: mm, one per grid axis; only distances need it.
            voxel_volume: mm³.
            tolerance_mm: that of the surface Dice.
        """
        self.num_predicted = int(np.count_nonzero(prediction))
        self.num_reference = int(np.count_nonzero(reference))
        self.num_both = int(np.count_nonzero(prediction & reference))
        self._prediction = prediction
        self._reference = reference
        self._spacing = spacing
        self._voxel_volume = voxel_volume
        self._tolerance_mm = tolerance_mm

    @cached_property
    def _distances(self) -> tuple[Float64, Float64]:
        """Distances in mm from each boundary to the other one; NaN if a mask is empty."""
        if self.num_predicted == 0 or self.num_reference == 0:
            undefined = np.array([math.nan])
            return undefined, undefined
        return boundary_distances(self._prediction, self._reference, self._spacing)

    def dice(self) -> float:
        """Return 2 |A ∩ B| / (|A| + |B|): 1 is perfect, 0 no overlap."""
        return ratio(2 * self.num_both, self.num_predicted + self.num_reference)

    def iou(self) -> float:
        """Return intersection over union."""
        return ratio(self.num_both, self.num_predicted + self.num_reference - self.num_both)

    def sensitivity(self) -> float:
        """Return the share of the reference that is found."""
        return ratio(self.num_both, self.num_reference)

    def precision(self) -> float:
        """Return the share of the prediction that is right."""
        return ratio(self.num_both, self.num_predicted)

    def volume_ml(self) -> float:
        """Return the volume of the prediction in ml."""
        return self.num_predicted * self._voxel_volume / 1000.0

    def volume_difference_ml(self) -> float:
        """Return the volume of the prediction minus that of the reference, in ml."""
        return (self.num_predicted - self.num_reference) * self._voxel_volume / 1000.0

    def surface_dice(self) -> float:
        """Return the share of all boundary voxels within the tolerance of the other boundary."""
        if self.num_predicted + self.num_reference == 0:
            return math.nan
        distances = np.concatenate(self._distances)  # No voxel is near an empty boundary.
        is_near = distances <= self._tolerance_mm * (1 + _ROUNDING)
        return float(np.count_nonzero(is_near) / distances.size)

    def hd_mm(self) -> float:
        """Return the largest distance from one boundary to the other, in mm."""
        from_prediction, from_reference = self._distances
        return float(max(from_prediction.max(), from_reference.max()))

    def hd95_mm(self) -> float:
        """Return the larger of the two 95th percentiles, in mm."""
        from_prediction, from_reference = self._distances
        return float(max(np.percentile(from_prediction, 95), np.percentile(from_reference, 95)))

    def assd_mm(self) -> float:
        """Return the mean distance over both boundaries, in mm."""
        return float(np.concatenate(self._distances).mean())

    def num_components(self) -> float:
        """Return the number of connected components of the prediction."""
        _, number = label_components(self._prediction)
        return float(number)


def dice_of(confusion: NDArray[np.integer[Any]], regions: Iterable[Sequence[int]]) -> Float64:
    """Return the Dice of each region from counts (L, L) by reference and predicted label.

    It is NaN for a region that neither has.
    """
    values = []
    for region in regions:
        members = list(region)
        reference_rows = confusion[members]
        num_both = int(reference_rows[:, members].sum())
        num_in_maps = int(reference_rows.sum()) + int(confusion[:, members].sum())
        values.append(ratio(2 * num_both, num_in_maps))
    return np.array(values)


def mean_defined(values: Float64 | Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN without such values."""
    array = np.asarray(values, dtype=np.float64)
    defined = array[~np.isnan(array)]
    if defined.size:
        return float(defined.mean())
    return float("nan")


def mean_dice(confusion: Integers, regions: Iterable[Sequence[int]]) -> float:
    """Return the mean Dice over the regions that the case has; NaN for a case without regions."""
    return mean_defined(dice_of(confusion, regions))


# A search tree costs about thirty times as much per boundary voxel as a distance transform per
# voxel of the box. The tree wins on smooth regions, where the boundary is a small part of the box;
# the transform bounds the time on noise.
_VOXELS_PER_POINT = 30


def boundary_distances(
    prediction: Bool, reference: Bool, spacing: Sequence[float]
) -> tuple[Float64, Float64]:
    """Return the distances in mm from each boundary voxel of one mask to the other mask, both ways.

    They are to the nearest boundary voxel, center to center. A boundary voxel shares a face with a
    voxel outside the mask, or with the border of the grid.
    """
    from scipy import ndimage

    predicted_edge = prediction & ~ndimage.binary_erosion(prediction)
    reference_edge = reference & ~ndimage.binary_erosion(reference)
    shared = predicted_edge & reference_edge
    only_predicted = predicted_edge & ~shared
    only_reference = reference_edge & ~shared

    num_points = np.count_nonzero(only_predicted) + np.count_nonzero(only_reference)
    by_tree = _VOXELS_PER_POINT * num_points <= shared.size
    sides = np.asarray(spacing, np.float64)
    zeros = np.zeros(np.count_nonzero(shared))
    both = []
    for points, targets in ((only_predicted, reference_edge), (only_reference, predicted_edge)):
        if by_tree:
            from scipy.spatial import cKDTree

            tree = cKDTree(np.argwhere(targets) * sides)
            distances, _ = tree.query(np.argwhere(points) * sides)
        else:
            distances = ndimage.distance_transform_edt(~targets, sampling=tuple(spacing))[points]
        both.append(np.concatenate([zeros, distances]))
    from_prediction, from_reference = both
    return from_prediction, from_reference


def one_voxel(spacing: Sequence[float]) -> float:
    """Return a tolerance of one voxel in mm: its shortest side.

    Thick slices would forgive errors of many voxels in plane.
    """
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
        InputError: a map does not hold integers, or the spacing is not a positive number per axis.
        ConfigError: an unknown metric, a negative tolerance, or a region without proper labels.
    """
    maps = LabelMapPair(prediction, reference, spacing, ignore_label)
    members = {name: members_of(name, labels) for name, labels in regions.items()}
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"tolerance_mm: expected a number of mm, at least 0, got {tolerance_mm}")
    unknown = set(metrics) - MASK_METRICS.keys()
    if unknown:
        raise ConfigError(f"unknown metric {min(unknown)!r}; known are {', '.join(MASK_METRICS)}")

    box = bounding_box((maps.prediction != 0) | (maps.reference != 0)) or _ONE_VOXEL
    values = {}
    for name, labels in members.items():
        predicted_mask, wanted_mask = maps.masks_in(box, labels)
        around = bounding_box(predicted_mask | wanted_mask) or _ONE_VOXEL
        pair = MaskPair(
            predicted_mask[around],
            wanted_mask[around],
            maps.spacing,
            maps.voxel_volume,
            tolerance_mm,
        )
        values[name] = {metric: getattr(pair, metric)() for metric in metrics}
    return values


class LabelMapPair:
    """A label map and its reference on one grid, without axes of a single voxel.

    Along such axes, every voxel would be boundary.
    """

    def __init__(
        self,
        prediction: ArrayLike,
        reference: ArrayLike,
        spacing: ArrayLike,
        ignore_label: int | None,
    ) -> None:
        """Check the arguments of `measure_case`; raise as it does."""
        predicted = given_array(prediction, "the prediction")
        wanted = given_array(reference, "the reference")
        require_label_map("the prediction", predicted)
        require_label_map("the reference", wanted)
        if predicted.shape != wanted.shape:
            predicted_shape = text_of_sizes(predicted.shape)
            wanted_shape = text_of_sizes(wanted.shape)
            raise GridMismatchError(
                f"the prediction has {predicted_shape} voxels, the reference {wanted_shape}; "
                "both must be on one grid"
            )
        if predicted.size == 0:
            raise InputError(f"label maps of shape {predicted.shape} have no voxels")
        sides = given_spacing(spacing, predicted.ndim)
        self.voxel_volume = math.prod(sides)  # mm³
        self.num_axes = predicted.ndim  # of the maps as they were given
        self.axes = [axis for axis, size in enumerate(predicted.shape) if size > 1]  # those left
        self.spacing = tuple(sides[axis] for axis in self.axes) or (1.0,)  # mm
        shape = [predicted.shape[axis] for axis in self.axes] or [1]
        self.prediction = predicted.reshape(shape)
        self.reference = wanted.reshape(shape)
        self._ignore_label = ignore_label

    def masks_in(self, box: tuple[Any, ...], labels: NDArray[np.integer[Any]]) -> tuple[Bool, Bool]:
        """Return where the map and its reference have one of the labels, in a box.

        Neither has where voxels are ignored.
        """
        wanted = self.reference[box]
        predicted_mask = np.isin(self.prediction[box], labels)
        wanted_mask = np.isin(wanted, labels)
        if self._ignore_label is not None:
            is_measured = wanted != self._ignore_label
            predicted_mask &= is_measured
            wanted_mask &= is_measured
        return predicted_mask, wanted_mask


def require_label_map(what: str, labels: Array) -> None:
    """Raise InputError unless an array holds integers."""
    if labels.dtype.kind not in "biu":
        raise InputError(
            f"{what} has values of type {labels.dtype}; expected a label map of integers"
        )


def members_of(name: str, region: Iterable[int]) -> NDArray[np.integer[Any]]:
    """Return the labels of a region; raises ConfigError unless they are whole numbers from 1 up."""
    labels = np.asarray(list(region) if isinstance(region, Iterable) else 0)
    if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 1):
        raise ConfigError(
            f"region {name!r}: expected labels from 1 up, such as (1, 3), got {region!r}"
        )
    return labels
