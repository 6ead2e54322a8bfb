"""Where to cut a case for display, upright: planes through the structure, and the place of the largest change.

Planes through only the largest change can miss the structure: a small island that the CRF removes far away from a tumor is often the
densest change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.geometry import orientation_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.base.array_types import Array, Bool, Float64

SIDES = ("RL", "PA", "IS")
"""Letters at the low and the high end of each axis of an upright volume."""

PLANES = (("axial", 0, 1, 2), ("coronal", 0, 2, 1), ("sagittal", 1, 2, 0))
"""Name and axes of each plane of an upright volume: across the picture, up the picture, and through it."""


def planes_of(grid: Sequence[int]) -> list[int]:
    """Return the numbers of the planes that are more than a line, as with a single slice; of a 2-D grid, or without one, the first."""
    return [number for number, (_, across, up, _) in enumerate(PLANES) if len(grid) == 3 and grid[across] > 1 and grid[up] > 1] or [0]


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
        axis_order = tuple(next(axis for axis in range(3) if codes[axis] in pair) for pair in SIDES)
        return cls(axis_order, tuple(codes[axis] == pair[0] for axis, pair in zip(axis_order, SIDES, strict=True)), SIDES)

    def describe(self, plane: int) -> tuple[str, str]:
        """Return the name of a plane of `PLANES`, and the letters at its left, right, bottom and top.

        If the orientation is unknown, the name has the numbers of the axes, and there are no letters.
        """
        name, across, up, _ = PLANES[plane]
        return (name, self.sides[across] + self.sides[up]) if self.sides else (f"axes {across + 1}, {up + 1}", "")

    def turn(self, array: Array) -> Array:
        """Return the array upright, a view; further axes stay in place."""
        array = array.transpose(*self.axis_order, *range(len(self.axis_order), array.ndim))
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


CHANGE_WINDOW_MM = 12.0
"""Edge of the box in which changed voxels are counted."""

_LARGE_SECTION = 0.8
"""Planes with this share of the largest cross-section show the structure equally well; the plane that changed most among them is shown."""


@dataclass(frozen=True)
class Places:
    """Where to cut a volume."""

    structure: tuple[int, ...]  # One index per axis: the planes through the structure. They need not meet inside it.
    change: tuple[int, ...] | None = None  # The voxel of the largest change, if no plane through the structure passes by it; else None.
    change_plane: int = 0  # The plane of `PLANES` that shows most of that change, by its number.


def choose_places(maps: Sequence[Array], changed: Bool, steps: Sequence[float]) -> Places:
    """Choose the planes that show a case: label maps (0 is background), where they changed, and mm per grid axis.

    The structure is the largest connected part of what all maps have in common: false islands of one map are not part of it, however many
    there are. Along each axis, the planes with a large cross-section of it qualify, and of these the one with the most changed voxels is
    taken. Without foreground the planes go through the largest change, and without that through the middle.
    """
    peak = find_largest_change(changed, steps)
    structure = find_structure(maps)
    if structure is None:
        return Places(peak or tuple(size // 2 for size in changed.shape))
    point = tuple(_best_plane(structure, changed, axis) for axis in range(changed.ndim))
    if peak is None or changed.ndim != 3:
        return Places(point)
    shown = planes_of(changed.shape)
    if any(abs(peak[axis] - point[axis]) * steps[axis] <= CHANGE_WINDOW_MM / 2 for axis in [PLANES[plane][-1] for plane in shown]):
        return Places(point)
    reach = [round(CHANGE_WINDOW_MM / 2 / step) for step in steps]
    around = [slice(max(0, place - most), place + most + 1) for place, most in zip(peak, reach, strict=True)]

    def count_changes(plane: int) -> int:
        cut = tuple(peak[axis] if axis == PLANES[plane][-1] else around[axis] for axis in range(3))
        return int(np.count_nonzero(changed[cut]))

    return Places(point, peak, max(shown, key=count_changes))


def find_structure(maps: Sequence[Array]) -> Bool | None:
    """Return the largest connected part of the foreground of most maps, (*grid); None without any foreground."""
    from scipy.ndimage import label

    votes = np.add.reduce([labels > 0 for labels in maps], dtype=np.uint8)
    box = bounding_box(votes > 0)
    if box is None:
        return None
    parts, _ = label(votes[box] == votes.max())  # connected over faces: fewer bridges to its surroundings
    sizes = np.bincount(parts.ravel(order="K"))
    sizes[0] = 0
    structure = np.zeros(votes.shape, bool)
    structure[box] = parts == sizes.argmax()
    return structure


def find_largest_change(changed: Bool, steps: Sequence[float]) -> tuple[int, ...] | None:
    """Return the changed voxel with the most changed voxels around it; None without changes."""
    from scipy.ndimage import uniform_filter

    box = bounding_box(changed)
    if box is None:
        return None
    inside = changed[box]
    reach = [min(round(CHANGE_WINDOW_MM / 2 / step), extent - 1) for step, extent in zip(steps, inside.shape, strict=True)]
    size = [2 * most + 1 for most in reach]  # odd, so that it has a middle
    # Only changed voxels qualify: a plane next to the change would show nothing.
    density = np.where(inside, uniform_filter(inside.astype(np.float32), size, mode="constant"), -1)
    densest = np.unravel_index(int(density.argmax()), density.shape)
    return tuple(int(index) + part.start for index, part in zip(densest, box, strict=True))


def _best_plane(structure: Bool, changed: Bool, axis: int) -> int:
    """Return the place along an axis: of those with a large cross-section the one with the most changes, of equal ones the middle one."""
    others = tuple(other for other in range(structure.ndim) if other != axis)
    sections, changes = structure.sum(axis=others), changed.sum(axis=others)
    changes = np.where(sections >= _LARGE_SECTION * sections.max(), changes, -1)
    candidates = np.flatnonzero(changes == changes.max())
    largest = candidates[sections[candidates] == sections[candidates].max()]
    return int(largest[len(largest) // 2])


def crop_around(foreground: Bool, steps: Sequence[float]) -> list[slice]:
    """Return slices around the foreground, (*grid), with a margin: small structures become visible. Without foreground: the whole grid."""
    box = bounding_box(foreground) or tuple(slice(0, size) for size in foreground.shape)
    margin_mm = 0.12 * max(size * step for size, step in zip(foreground.shape, steps, strict=True))
    margins = [int(np.ceil(margin_mm / step)) for step in steps]
    return [
        slice(max(0, part.start - margin), min(size, part.stop + margin))
        for part, margin, size in zip(box, margins, foreground.shape, strict=True)
    ]
