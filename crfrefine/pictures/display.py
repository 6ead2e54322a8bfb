"""Volumes as people look at them: upright, cropped around what matters, windowed, and a color for each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.io.volume import orientation_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Okabe & Ito 2008: told apart with every common color vision deficiency, and on gray.
LABEL_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
"""Of the labels 1 to 7; the next seven use them again."""

PLANES = (("axial", 0, 1), ("coronal", 0, 2), ("sagittal", 1, 2))
"""Name, axis across the picture and axis up the picture, of an upright volume."""


SIDES = ("RL", "PA", "IS")
"""Letters at the low and the high end of each axis of an upright volume."""


def label_color(label: int) -> str:
    """Return the color of a label above 0."""
    return LABEL_COLORS[(label - 1) % len(LABEL_COLORS)]


@dataclass(frozen=True)
class Upright:
    """How an array is turned to (right to left, posterior to anterior, inferior to superior), as nearly as its axes allow.

    The patient's right is shown at the left, as radiologists look at it.

    Attributes:
        axis_order: the axis of the array that becomes each axis of the upright one.
        flips: whether it is reversed.
        sides: the letters of both ends of each upright axis, such as "RL"; empty where it is not known what is up.
    """

    axis_order: tuple[int, ...]
    flips: tuple[bool, ...]
    sides: tuple[str, ...]

    @classmethod
    def of(cls, affine: NDArray[np.float64] | None, num_dims: int) -> Upright:
        """Return how an array on a grid is turned; of a grid without an affine, and of one that is not 3-D, not at all."""
        if affine is None or num_dims != 3:
            return cls(tuple(range(num_dims)), (False,) * num_dims, ())
        codes = orientation_codes(affine)
        axis_order = tuple(next(axis for axis in range(3) if codes[axis] in pair) for pair in ("LR", "PA", "IS"))
        flips = (codes[axis_order[0]] == "R", codes[axis_order[1]] == "P", codes[axis_order[2]] == "I")
        return cls(axis_order, flips, SIDES)

    def turn(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array upright, a view; axes beyond those of the grid stay where they are."""
        array = array.transpose(*self.axis_order, *range(len(self.axis_order), array.ndim))
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


def find_largest_change(before: NDArray[Any], after: NDArray[Any], spacing: Sequence[float], window_mm: float = 12.0) -> tuple[int, ...]:
    """Return the voxel with the most changed voxels around it; without a change the middle of the foreground, or of the grid.

    Args:
        before: (*grid) labels.
        after: (*grid) labels.
        spacing: mm, one a grid axis.
        window_mm: edge of the box in which changed voxels are counted.
    """
    from scipy.ndimage import uniform_filter

    changed = before != after
    if changed.any():
        box = [2 * round(window_mm / 2 / step) + 1 for step in spacing]  # odd, so that it has a middle
        # Only voxels that changed themselves: a plane next to the change would show nothing.
        density = np.where(changed, uniform_filter(changed.astype(np.float32), box, mode="constant"), -1)
        return tuple(int(i) for i in np.unravel_index(int(density.argmax()), density.shape))
    foreground = np.argwhere(after > 0)
    if len(foreground):
        return tuple(int(i) for i in foreground.mean(axis=0).round())
    return tuple(n // 2 for n in after.shape)


def crop_around(foreground: NDArray[np.bool_], steps: Sequence[float]) -> list[slice]:
    """Return slices around all of the foreground with a margin, so that small structures are not lost in a large field of view.

    Args:
        foreground: (*grid); the whole grid is kept where it is empty.
        steps: mm, one a grid axis.
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
    """Return the intensities shown black and white: nearly all of those that are finite and not exactly zero, which is often no tissue."""
    sample = image[np.isfinite(image) & (image != 0)]
    if sample.size < 2:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample[:: max(1, sample.size // 200_000)], (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
