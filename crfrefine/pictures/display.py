"""Prepare volumes for display: upright, cropped around the foreground, windowed, with a color for each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.io.volume import orientation_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Okabe & Ito 2008: distinguishable with every common color vision deficiency, and on gray.
LABEL_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
"""Colors of the labels 1 to 7; the next seven reuse them."""

PLANES = (("axial", 0, 1), ("coronal", 0, 2), ("sagittal", 1, 2))
"""Name, axis across the picture and axis up the picture, of an upright volume."""


SIDES = ("RL", "PA", "IS")
"""Letters at the low and the high end of each axis of an upright volume."""


def label_color(label: int) -> str:
    """Return the color of a label above 0."""
    return LABEL_COLORS[(label - 1) % len(LABEL_COLORS)]


@dataclass(frozen=True)
class Upright:
    """How to turn an array to (right to left, posterior to anterior, inferior to superior), as nearly as its axes allow.

    The patient's right is shown at the left, as in radiology.

    Attributes:
        axis_order: the axis of the array that becomes each axis of the upright one.
        flips: whether each of these axes is reversed.
        sides: the letters of both ends of each upright axis, such as "RL"; empty if the orientation is unknown.
    """

    axis_order: tuple[int, ...]
    flips: tuple[bool, ...]
    sides: tuple[str, ...]

    @classmethod
    def of(cls, affine: NDArray[np.float64] | None, num_dims: int) -> Upright:
        """Return how to turn an array on a grid; grids without an affine and grids that are not 3-D are not turned."""
        if affine is None or num_dims != 3:
            return cls(tuple(range(num_dims)), (False,) * num_dims, ())
        codes = orientation_codes(affine)
        axis_order = tuple(next(axis for axis in range(3) if codes[axis] in pair) for pair in ("LR", "PA", "IS"))
        flips = (codes[axis_order[0]] == "R", codes[axis_order[1]] == "P", codes[axis_order[2]] == "I")
        return cls(axis_order, flips, SIDES)

    def turn(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array upright, a view; further axes stay in place."""
        array = array.transpose(*self.axis_order, *range(len(self.axis_order), array.ndim))
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


def find_largest_change(before: NDArray[Any], after: NDArray[Any], spacing: Sequence[float], window_mm: float = 12.0) -> tuple[int, ...]:
    """Return the voxel with the most changed voxels around it; without changes, the middle of the foreground, or of the grid.

    Args:
        before: (*grid) labels.
        after: (*grid) labels.
        spacing: mm, one per grid axis.
        window_mm: edge of the box in which changed voxels are counted.
    """
    from scipy.ndimage import uniform_filter

    changed = before != after
    if changed.any():
        box = [2 * round(window_mm / 2 / step) + 1 for step in spacing]  # odd, so that it has a middle
        # Only changed voxels qualify: a plane next to the change would show nothing.
        density = np.where(changed, uniform_filter(changed.astype(np.float32), box, mode="constant"), -1)
        return tuple(int(i) for i in np.unravel_index(int(density.argmax()), density.shape))
    foreground = np.argwhere(after > 0)
    if len(foreground):
        return tuple(int(i) for i in foreground.mean(axis=0).round())
    return tuple(n // 2 for n in after.shape)


def crop_around(foreground: NDArray[np.bool_], steps: Sequence[float]) -> list[slice]:
    """Return slices around the foreground with a margin, so that small structures are visible in a large field of view.

    Args:
        foreground: (*grid); if it is empty, the whole grid is kept.
        steps: mm, one per grid axis.
    """
    box = bounding_box(foreground)
    if box is None:
        return [slice(0, size) for size in foreground.shape]
    extent = max(n * step for n, step in zip(foreground.shape, steps, strict=True))
    slices = []
    for occupied, size, step in zip(box, foreground.shape, steps, strict=True):
        margin = int(np.ceil(0.12 * extent / step))
        slices.append(slice(max(0, occupied.start - margin), min(size, occupied.stop + margin)))
    return slices


def display_range(image: NDArray[np.float32]) -> tuple[float, float]:
    """Return the black and white levels: they span nearly all finite intensities except exact zeros, which are often not tissue."""
    sample = image[np.isfinite(image) & (image != 0)]
    if sample.size < 2:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample[:: max(1, sample.size // 200_000)], (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
