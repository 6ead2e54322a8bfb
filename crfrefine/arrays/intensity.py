"""Image intensities on a common scale, in which kernels measure distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.limits import available_threads, run_all
from crfrefine.parameters.sections import IntensityParameters

_BLOCK = 1 << 16  # elements processed at a time: later passes find them in the second-level cache
# share of voxels outside of a window from which on the window does not fit the image
MAX_CLIPPED = 0.95
# largest negative value beside 0 that filters leave in an image that is not CT, in shares of its
# largest value
RIPPLE = 0.1
MIN_NEGATIVE = 0.001  # smallest share of voxels below 0, beyond ripples, in CT
# a spread whose inverse does not fit into float32 counts as zero
_CONSTANT = float(np.finfo(np.float32).tiny)


def normalize_intensity(
    image: NDArray[np.floating | np.integer],
    parameters: IntensityParameters,
    mask: Bool | None = None,
    *,
    box: Box | None = None,
    threads: int | None = None,
) -> Float32:
    """Map raw intensities to the scale that theta_beta is measured in, as float32 in the order of memory."""
    # The image is (M, *grid); statistics are those inside the (*grid) mask, and only the box is
    # mapped.
    image = np.asarray(image)
    settings = parameters.spread({"modality": len(image)})
    part = image if box is None else image[(slice(None), *box)]
    if set(settings["normalization"]) == {"none"}:
        return part.astype(np.float32, order="K", copy=False)
    result = np.empty_like(part, dtype=np.float32, order="K", subok=False)
    order = StorageOrder.of_memory(image[0])
    stored_mask = None if mask is None else order.to_storage(mask)

    def run(modality: int) -> None:
        fitted = _fit_modality(order.to_storage(image[modality]), settings, modality, stored_mask)
        fitted.apply(order.to_storage(part[modality]), order.to_storage(result[modality]))

    run_all(
        [partial(run, modality) for modality in range(len(image))], threads or available_threads()
    )
    return result


@dataclass(frozen=True)
class IntensityMap:
    """The map of a modality's intensities: (value - offset - shift) * scale."""

    shift: float = 0.0  # subtracted in float32
    scale: float = 1.0  # multiplied; 0 for a constant modality
    clip: bool = False  # whether the result is clipped to [0, 1]
    # subtracted in float64 beforehand, where the type has more digits than float32; None: nothing
    # is
    offset: float | None = None

    def apply(self, source: NDArray[np.generic], target: Float32) -> None:
        """Write the mapped intensities of an array to another one of the same shape, in one pass over memory."""
        rows = max(1, _BLOCK * source.shape[0] // max(1, source.size)) if source.ndim else 1
        for start in range(0, source.shape[0], rows):
            part = target[start : start + rows]
            values = source[start : start + rows]
            if self.offset is not None:
                values = (values.astype(np.float64) - self.offset).astype(np.float32)
            if self.shift == 0.0 and self.scale == 1.0:
                part[...] = values
            else:
                np.subtract(values, np.float32(self.shift), out=part, casting="unsafe")
                np.multiply(part, np.float32(self.scale), out=part)
            if self.clip:
                np.clip(part, np.float32(0.0), np.float32(1.0), out=part)


def fit_intensity(
    image: NDArray[np.floating | np.integer],
    parameters: IntensityParameters,
    mask: Bool | None = None,
) -> tuple[IntensityMap, ...]:
    """Return the maps that `normalize_intensity` applies, one per modality, for an image in storage order."""
    settings = parameters.spread({"modality": len(image)})
    return tuple(
        _fit_modality(values, settings, modality, mask) for modality, values in enumerate(image)
    )


def window_notes(
    image: NDArray[np.floating | np.integer],
    parameters: IntensityParameters,
    mask: Bool | None = None,
) -> tuple[str, ...]:
    """Return a note for each modality of (M, *grid) whose window does not fit, such as a window of Hounsfield units for MRI."""
    # A window does not fit if it clips at least MAX_CLIPPED of the voxels inside the mask, or
    # begins below 0 where hardly any value is: CT has air and fat, and MRI has at most ripples
    # around 0.
    notes = []
    settings = parameters.spread({"modality": len(image)})
    for modality, (values, kind, window) in enumerate(
        zip(image, settings["normalization"], settings["window"], strict=True)
    ):
        if kind != "window" or window is None:
            continue
        low = float(values.min())
        high = float(values.max())
        inside = values if mask is None else values[mask]
        clipped = (
            np.count_nonzero(inside < window[0]) + np.count_nonzero(inside > window[1])
        ) / max(1, inside.size)
        if clipped >= MAX_CLIPPED:
            problem = f"{clipped:.0%} of the voxels are outside of it"
        elif (
            window[0] < 0.0
            and np.count_nonzero(values < min(0.0, -RIPPLE * high)) < MIN_NEGATIVE * values.size
        ):
            problem = "hardly any value is below 0, where air and fat are in Hounsfield units"
        else:
            continue
        notes.append(
            f"intensity.window does not seem to fit modality {modality}: it is [{window[0]:g}, {window[1]:g}], and the image has "
            f"values from {low:g} to {high:g}: {problem}. For images other than CT, intensity.normalization = percentile is usual"
        )
    return tuple(notes)


def _fit_modality(
    source: Array, settings: Mapping[str, Any], modality: int, mask: Bool | None
) -> IntensityMap:
    """Return the map of one modality, (*grid) in storage order, with statistics inside the mask.

    Settings have a value per modality.
    """
    kind, percentiles, window = (
        settings[key][modality] for key in ("normalization", "percentiles", "window")
    )
    if kind == "none":
        return IntensityMap()
    if kind == "window" and window is not None:
        return IntensityMap(window[0], 1.0 / (window[1] - window[0]), clip=True)
    values = source.reshape(-1)
    if mask is not None:
        values = values[mask.reshape(-1)]
    # Types with more digits than float32 keep their texture on a large offset only if it is
    # subtracted first, in float64: that of a voxel inside the mask, as the outside must not matter.
    is_wide = source.dtype.itemsize >= 4 and source.dtype.newbyteorder("=") != np.float32
    offset = float(values[0]) if is_wide else None
    if offset is not None:
        values = (values.astype(np.float64) - offset).astype(np.float32)
    if kind == "zscore":
        # Mean and (population) standard deviation, summed in blocks: float32 within one, float64
        # over all; relative to the first value, so that a small spread on a large offset keeps its
        # digits.
        values = values.astype(np.float32, copy=False)
        pivot = values[0]
        total = 0.0
        squares = 0.0
        for first in range(0, values.size, _BLOCK):
            part = values[first : first + _BLOCK] - pivot
            total += float(part.sum(dtype=np.float64))
            squares += float(np.dot(part, part))
        mean = total / values.size
        shift = float(pivot) + mean
        width = math.sqrt(max(0.0, squares / values.size - mean * mean))
    else:
        # As numpy's percentiles, which import numpy.ma: that takes as long as all else for a small
        # case.
        places = (values.size - 1) * (np.array(percentiles) / 100.0)
        below = np.floor(places).astype(np.intp)
        above = np.minimum(below + 1, values.size - 1)
        ordered = np.partition(values, [*below, *above])
        start = ordered[below].astype(np.float64)
        end = ordered[above].astype(np.float64)
        low, high = (start + (end - start) * (places - below)).tolist()
        if high <= low:
            low = float(values.min())
            high = float(values.max())
        shift = low
        width = high - low
    # A constant modality becomes 0.
    return IntensityMap(shift, 1.0 / width if width > _CONSTANT else 0.0, offset=offset)
