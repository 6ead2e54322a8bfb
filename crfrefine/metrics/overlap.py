"""The metrics of one case: a label map against the reference, region by region. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.text import TIMES
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.metrics.masks import MaskPair
from crfrefine.metrics.registry import MASK_METRICS, RegionValues

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ONE_VOXEL = (slice(0, 1), ...)
"""The box to measure if both masks are empty."""


def measure_case(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    regions: Mapping[str, Iterable[int]],
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = tuple(MASK_METRICS),
    ignore_label: int | None = None,
) -> RegionValues:
    """Measure how well a label map agrees with the reference, region by region.

    Args:
        prediction: (*grid) integers.
        reference: (*grid) integers.
        regions: the labels of each named region.
        spacing: mm, one per grid axis.
        tolerance_mm: of the surface Dice.
        metrics: names of MASK_METRICS.
        ignore_label: voxels where the reference has this value count as background in both maps.

    Returns:
        The value of each metric for each region; NaN if undefined.

    Raises:
        GridMismatchError: the maps differ in shape.
        InputError: a map does not hold integers, or the spacing is not one positive number per axis.
        ConfigError: an unknown metric or a negative tolerance.
    """
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.dtype.kind not in "biu":
            raise InputError(f"the {name} has values of type {labels.dtype}; expected a label map of integers")
    _check(prediction, reference, spacing, tolerance_mm, metrics)
    occupied = (prediction != 0) | (reference != 0)
    box = bounding_box(occupied) or _ONE_VOXEL
    # On the full grid: its axes of a single voxel are unknown after the crop.
    kept = tuple(axis for axis, size in enumerate(occupied.shape) if size > 1)
    found, wanted = _without_flat_axes(prediction[box], kept), _without_flat_axes(reference[box], kept)
    ignored = wanted == ignore_label if ignore_label is not None else None
    values = {}
    sides, voxel_volume = tuple(float(spacing[axis]) for axis in kept) or (1.0,), math.prod(map(float, spacing))
    for name, region in regions.items():
        labels_of_region = tuple(region)
        one, other = np.isin(found, labels_of_region), np.isin(wanted, labels_of_region)
        if ignored is not None:
            one, other = one & ~ignored, other & ~ignored
        around = bounding_box(one | other) or _ONE_VOXEL
        pair = MaskPair(one[around], other[around], sides, voxel_volume, tolerance_mm)
        values[name] = {metric: MASK_METRICS[metric].measure(pair) for metric in metrics}
    return values


def measure_masks(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = tuple(MASK_METRICS),
) -> dict[str, float]:
    """Measure how well one mask agrees with the reference; arguments, result and errors as in `measure_case`, with (*grid) bool masks."""
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != np.bool_:
            raise InputError(f"the {name} has values of type {mask.dtype}; expected a mask of booleans")
    regions = {"mask": (1,)}
    return measure_case(prediction, reference, regions, spacing, tolerance_mm=tolerance_mm, metrics=metrics)["mask"]


def _without_flat_axes(labels: NDArray[Any], kept: Sequence[int]) -> NDArray[Any]:
    """Drop the axes along which the grid has a single voxel: along them, every voxel of a slice would be boundary."""
    return labels.reshape([labels.shape[axis] for axis in kept] or [1])


def _check(
    prediction: NDArray[Any], reference: NDArray[Any], spacing: Sequence[float], tolerance_mm: float, metrics: Sequence[str]
) -> None:
    if prediction.shape != reference.shape:
        shapes = (TIMES.join(str(size) for size in labels.shape) for labels in (prediction, reference))
        raise GridMismatchError("the prediction has {} voxels, the reference {}; both must be on one grid".format(*shapes))
    if prediction.size == 0:
        raise InputError(f"label maps of shape {prediction.shape} have no voxels")
    if len(spacing) != prediction.ndim or not all(0 < size < math.inf for size in spacing):
        raise InputError(f"spacing: expected {prediction.ndim} positive numbers in mm, one per axis, got {tuple(spacing)}")
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"tolerance_mm: expected a number of mm, at least 0, got {tolerance_mm}")
    unknown = next((metric for metric in metrics if metric not in MASK_METRICS), None)
    if unknown is not None:
        raise ConfigError(f"unknown metric {unknown!r}; known are {', '.join(MASK_METRICS)}")
