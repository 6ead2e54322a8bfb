"""Prepare volumes for display: upright, cropped around the foreground, with a color for each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.geometry import orientation_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.base.array_types import Array, Bool, Float64

# Okabe & Ito 2008: distinguishable with every common color vision deficiency, and on gray.
LABEL_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
"""Colors of the labels 1 to 7; the next seven reuse them."""

SIDES = ("RL", "PA", "IS")
"""Letters at the low and the high end of each axis of an upright volume."""


def label_color(label: int) -> str:
    """Return the color of a label above 0."""
    return LABEL_COLORS[(label - 1) % len(LABEL_COLORS)]


@dataclass(frozen=True)
class Upright:
    """How to turn an array to (right to left, posterior to anterior, inferior to superior), as nearly as its axes allow.

    The patient's right is shown at the left, as in radiology.
    """

    axis_order: tuple[int, ...]  # The axis of the array that becomes each axis of the upright one.
    flips: tuple[bool, ...]  # Whether each of these axes is reversed.
    sides: tuple[str, ...]  # The letters of both ends of each upright axis, such as "RL"; empty if the orientation is unknown.

    @classmethod
    def of(cls, affine: Float64 | None, num_dims: int) -> Upright:
        """Return how to turn an array on a grid; grids without an affine and grids that are not 3-D are not turned."""
        if affine is None or num_dims != 3:
            return cls(tuple(range(num_dims)), (False,) * num_dims, ())
        codes = orientation_codes(affine)
        axis_order = tuple(next(axis for axis in range(3) if codes[axis] in pair) for pair in ("LR", "PA", "IS"))
        flips = (codes[axis_order[0]] == "R", codes[axis_order[1]] == "P", codes[axis_order[2]] == "I")
        return cls(axis_order, flips, SIDES)

    def turn(self, array: Array) -> Array:
        """Return the array upright, a view; further axes stay in place."""
        array = array.transpose(*self.axis_order, *range(len(self.axis_order), array.ndim))
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


def crop_around(foreground: Bool, steps: Sequence[float]) -> list[slice]:
    """Return slices around the foreground, (*grid), with a margin: small structures become visible. Without foreground: the whole grid."""
    box = bounding_box(foreground)
    if box is None:
        return [slice(0, size) for size in foreground.shape]
    extent = max(n * step for n, step in zip(foreground.shape, steps, strict=True))
    slices = []
    for occupied, size, step in zip(box, foreground.shape, steps, strict=True):
        margin = int(np.ceil(0.12 * extent / step))
        slices.append(slice(max(0, occupied.start - margin), min(size, occupied.stop + margin)))
    return slices
