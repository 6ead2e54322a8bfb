"""The metrics of one case: a label map against the reference, region by region. Conventions: `docs/reference/metrics.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.text import TIMES
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.metrics.masks import MaskPair
from crfrefine.metrics.registry import MASK_METRICS, RegionValues

_ONE_VOXEL = (slice(0, 1), ...)  # the box to measure if both masks are empty


def one_voxel(spacing: Sequence[float]) -> float:
    """Return a tolerance of one voxel in mm: its shortest side, since thick slices would forgive errors of many voxels in plane."""
    return min(spacing)


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
    if prediction.shape != reference.shape:
        shapes = (TIMES.join(map(str, labels.shape)) for labels in (prediction, reference))
        raise GridMismatchError("the prediction has {} voxels, the reference {}; both must be on one grid".format(*shapes))
    if prediction.size == 0:
        raise InputError(f"label maps of shape {prediction.shape} have no voxels")
    if len(spacing) != prediction.ndim or not all(0 < size < math.inf for size in spacing):
        raise InputError(f"spacing: expected {prediction.ndim} positive numbers in mm, one per axis, got {tuple(spacing)}")
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"tolerance_mm: expected a number of mm, at least 0, got {tolerance_mm}")
    if unknown := [metric for metric in metrics if metric not in MASK_METRICS]:
        raise ConfigError(f"unknown metric {unknown[0]!r}; known are {', '.join(MASK_METRICS)}")
    box = bounding_box((prediction != 0) | (reference != 0)) or _ONE_VOXEL
    # Along an axis with a single voxel, every voxel of a slice would be boundary. The crop may have more of these axes.
    kept = [axis for axis, size in enumerate(prediction.shape) if size > 1]
    predicted, wanted = (labels[box].reshape([labels[box].shape[axis] for axis in kept] or [1]) for labels in (prediction, reference))
    is_measured = True if ignore_label is None else wanted != ignore_label
    values = {}
    sides, voxel_volume = tuple(float(spacing[axis]) for axis in kept) or (1.0,), math.prod(map(float, spacing))
    for name, region in regions.items():
        members = tuple(region)
        masks = np.isin(predicted, members) & is_measured, np.isin(wanted, members) & is_measured
        around = bounding_box(masks[0] | masks[1]) or _ONE_VOXEL
        pair = MaskPair(masks[0][around], masks[1][around], sides, voxel_volume, tolerance_mm)
        values[name] = {metric: getattr(pair, metric)() for metric in metrics}
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
