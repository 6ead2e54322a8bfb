"""Voxels that the program finds for a stroke: alike around a seed, between slices, islands.

Places and boxes are those of the upright grid. Islands are connected components, as the rules for
small objects have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import ndimage

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import Box, bounding_box, grown
from crfrefine.arrays.strokes import BACKGROUND
from crfrefine.base.array_types import Array, Bool, Float64, Integers
from crfrefine.errors import InputError
from crfrefine.pictures.planes import PLANES, planes_of
from crfrefine.pictures.projection import draw_projection
from crfrefine.tune.brush import Limits
from crfrefine.tune.case import TuneCase
from crfrefine.tune.values import Json, Place

# Shapes of strokes whose voxels are found: alike around the seed, in the plane or through planes;
# between slices; the island at the seed, and all others of its label.
FOUND = ("fill", "flood", "between", "island", "others")

# Voxels that are found at most: each wrong voxel of the network takes 70 µs of a refinement.
MAX_FOUND = 100_000
REACH = 150  # voxels that a fill reaches to each side of its seed
_SMALLEST = 1 / 50  # share of a projection's longer side that its smallest island has


def fill_alike(
    seed: Place, axes: Sequence[int], grid: Sequence[int], is_alike: Callable[[Box], Bool]
) -> tuple[Box, Bool]:
    """Return a box, and in it the voxels that are alike and connected to a seed over faces.

    Args:
        seed: the voxel to begin at.
        axes: those that the fill grows along, at most `REACH` voxels to each side.
        grid: voxels along each axis.
        is_alike: returns which voxels of a box may be filled, (*box).

    Raises InputError if the seed may not.
    """
    margin = np.zeros(len(grid), np.int64)
    margin[list(axes)] = REACH
    box = grown(tuple(slice(at, at + 1) for at in seed), margin.tolist(), grid)
    numbers, _ = ndimage.label(is_alike(box))
    number = numbers[tuple(at - part.start for at, part in zip(seed, box, strict=True))]
    if number == 0:
        raise InputError("nothing is filled: the voxel itself is out of the range, or protected")
    return box, numbers == number


def fill_between(
    values: Array, value: int, through: int, spacing: Sequence[float]
) -> tuple[Box, Bool]:
    """Return a box, and in it the voxels between slices in which a value is drawn.

    On each slice between two drawn ones, the signed distance to the border of the shape is
    interpolated; where something is drawn already, nothing is added. Source: Raya & Udupa 1990,
    shape-based interpolation.

    Args:
        values: (*grid) strokes.
        value: the value whose slices are taken.
        through: the axis across the slices.
        spacing: mm, one per axis.

    Raises InputError if there is nothing between two slices.
    """
    is_drawn = values == value
    box = bounding_box(is_drawn)
    if box is None:
        raise InputError("nothing to fill: draw the label in two slices first")
    slices = np.moveaxis(is_drawn[box], through, 0)
    steps = [step for axis, step in enumerate(spacing) if axis != through]
    is_filled = np.zeros(slices.shape, np.bool_)
    drawn = np.flatnonzero(slices.any(axis=(1, 2))).tolist()
    for first, last in pairwise(drawn):
        if last - first > 1:
            depth_first = _depth(slices[first], steps)
            depth_last = _depth(slices[last], steps)
            for number in range(first + 1, last):
                share = (number - first) / (last - first)
                is_filled[number] = (1 - share) * depth_first + share * depth_last > 0
    is_filled = np.moveaxis(is_filled, 0, through) & (values[box] == 0)
    if not is_filled.any():
        raise InputError(
            "nothing to fill: draw the label in two slices parallel to this plane, with others "
            "between them, on places that overlap"
        )
    return box, is_filled


def _depth(shape: Bool, steps: Sequence[float]) -> Float64:
    """Return the mm from each pixel to the border of a shape, below 0 outside of it."""
    padded = np.pad(shape, 1)
    inside = ndimage.distance_transform_edt(padded, sampling=steps)
    outside = ndimage.distance_transform_edt(~padded, sampling=steps)
    return np.asarray(inside - outside, np.float64)[1:-1, 1:-1]


class Islands:
    """The islands of a mask, (*grid). Raises InputError for an empty one."""

    def __init__(self, mask: Bool) -> None:
        box = bounding_box(mask)
        if box is None:
            raise InputError("nothing is found: no voxel has the label, or has changed")
        self._mask = mask
        self.box = box
        self.corner = [part.start for part in box]
        self.numbers, _ = label_components(mask[box])  # (*box), 0 outside of the mask
        sizes = np.bincount(self.numbers.ravel())  # in voxels, by number
        # the numbers, the largest island first; of equal ones the first in C order
        self.by_size = (np.argsort(-sizes[1:], kind="stable") + 1).tolist()

    def number_at(self, place: Place) -> int:
        """Return the number of the island at a voxel; 0 without any."""
        if not self._mask[tuple(place)]:
            return 0
        return int(self.numbers[tuple(np.subtract(place, self.corner))])

    def following(self, place: Place) -> Json:
        """Return the island after the one at a voxel, by size, and a voxel in its middle.

        It is the largest one after the smallest one, and where no island is.
        """
        number = self.number_at(place)
        rank = 0
        if number:
            rank = (self.by_size.index(number) + 1) % len(self.by_size)
        number = self.by_size[rank]
        voxels = np.argwhere(self.numbers == number)
        middle = np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()
        found = voxels[middle] + self.corner
        return {
            "place": found.tolist(),
            "rank": rank + 1,
            "islands": len(self.by_size),
            "voxels": len(voxels),
        }


class Tools:
    """A case for searching, with its newest labels and strokes, (*grid) each."""

    def __init__(self, case: TuneCase, labels: Array, drawn: Array) -> None:
        self._case = case
        self._labels = labels
        self._drawn = drawn

    def labels_at(self, index: Any) -> Array:
        """Return the labels at an index of the arrays, with strokes that no result has yet."""
        drawn = self._drawn[index]
        values = np.where(drawn == BACKGROUND, 0, drawn)
        return np.where(drawn > 0, values, self._labels[index])

    def _upright_labels(self) -> Array:
        return self._case.upright.apply(self.labels_at(()))

    def voxels(self, shape: str, plane: int, place: Place, value: int, limits: Limits) -> Integers:
        """Return the sorted places in the flattened arrays that a stroke draws, as of `FOUND`.

        Args:
            shape: of the stroke.
            plane: the plane that was pointed at.
            place: the voxel that was pointed at.
            value: the stroke's label.
            limits: where it may draw, which a fill does not leave.
        """
        case = self._case
        if not case.has_plane(plane, place):
            raise InputError("nothing is found: the place lies outside of the image")
        _, across, up, through = PLANES[plane]
        if shape in ("fill", "flood"):
            axes = (across, up) if shape == "fill" else range(len(place))

            def is_alike(box: Box) -> Bool:
                return case.upright.apply(limits.allow(case.stored_box(box)))

            box, is_found = fill_alike(place, axes, case.upright_grid, is_alike)
        elif shape == "between":
            if len(place) < 3:
                raise InputError("nothing to fill: an image of two axes has no slices")
            strokes = case.upright.apply(self._drawn)
            box, is_found = fill_between(strokes, value, through, case.upright_spacing)
        else:
            labels = self._upright_labels()
            islands = Islands(labels == labels[tuple(place)])
            box = islands.box
            is_found = islands.numbers == islands.number_at(place)
            if shape == "others":
                is_found = (islands.numbers > 0) & ~is_found
        found = np.array(np.nonzero(is_found)) + [[part.start] for part in box]
        number = found.shape[1]
        if number > MAX_FOUND:
            raise InputError(
                f"nothing is drawn: {number:,} voxels were found, and more than {MAX_FOUND:,} make "
                "each answer slow; narrow the range, fill in one plane, or draw in the middle"
            )
        if 2 * (np.count_nonzero(self._drawn) + number) > self._drawn.size:
            raise InputError("nothing is drawn: half of the image would be, and not a few strokes")
        return case.stored_places(list(found))

    def find(self, label: int, place: Place) -> Json:
        """Return the next island of a label after the one at a voxel, as of `Islands.following`.

        With label 0 it is an island of the label at the voxel; with -1 it is a part of what differs
        from the network.
        """
        case = self._case
        if not case.has_voxel(place):
            raise InputError("the place lies outside of the image")
        labels = self._upright_labels()
        if label < 0:
            return Islands(labels != case.upright.apply(case.network_labels)).following(place)
        label = label or int(labels[tuple(place)])
        if label == 0:
            raise InputError("choose a label, or move the crosshair to one")
        return Islands(labels == label).following(place)

    def projection(self, plane: int, label: int) -> bytes:
        """Return the picture of a label seen across a plane, as of `draw_projection`.

        Islands beside the largest one are enlarged, so that a single voxel is seen.
        """
        case = self._case
        if plane not in planes_of(case.upright_grid):
            raise InputError("no such plane")
        shown = PLANES[plane][1:3]
        mask = self._upright_labels() == label
        through = tuple(axis for axis in range(mask.ndim) if axis not in shown)
        thickness = np.zeros([mask.shape[axis] for axis in shown])
        is_other = np.zeros(thickness.shape, np.bool_)
        if mask.any():
            islands = Islands(mask)
            part = tuple(islands.box[axis] for axis in shown)
            is_largest = islands.numbers == islands.by_size[0]
            thickness[part] = is_largest.sum(axis=through)
            is_other[part] = ((islands.numbers > 0) & ~is_largest).any(axis=through)
        steps = [case.upright_spacing[axis] for axis in shown]
        length = max(np.multiply(thickness.shape, steps)) * _SMALLEST
        size = [max(1, round(length / step)) for step in steps]
        return draw_projection(thickness, ndimage.maximum_filter(is_other, size))
