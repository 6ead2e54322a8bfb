"""The order and the direction of voxel axes: of arrays, positions, values for each, and affines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Float64

WORLD_AXES = ("LR", "PA", "IS")  # letters of the negative and the positive direction of x, y, z
_OPPOSITES = dict(zip("LRPAIS", "RLAPSI", strict=True))

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Axes:
    """How the axes of a grid become those of another one: exchanged, mirrored, or both.

    Arrays are turned as views, and not copied.
    """

    sources: tuple[int, ...]  # the number of the axis that becomes each axis of the other grid
    mirrored: tuple[int, ...] = ()  # the axes of the other grid that run the other way

    @classmethod
    def of_memory(cls, grid: Array) -> Axes:
        """Return the memory order of the axes of an array (*grid); axes of one voxel come first."""
        # Sorted by the last key first; of equal axes the first one stays first.
        slowest_first = np.lexsort((-np.abs(grid.strides), np.greater(grid.shape, 1)))
        return cls(tuple(slowest_first.tolist()))

    @classmethod
    def toward(cls, letters: str, codes: str) -> Axes:
        """Return how the axes of a grid become those that run toward some letters, such as RAS.

        `codes` are those of the grid, as of `geometry.orientation_codes`. A letter of no axis is
        left out.
        """
        sources: list[int] = []
        mirrored = []
        for letter in letters:
            pair = next((pair for pair in WORLD_AXES if letter in pair), "")
            for axis, code in enumerate(codes):
                if code in pair:
                    if code != letter:
                        mirrored.append(len(sources))
                    sources.append(axis)
        return cls(tuple(sources), tuple(mirrored))

    @property
    def inverse(self) -> Axes:
        """How the axes of the other grid become those of the first one."""
        places = sorted(range(len(self.sources)), key=self.sources.__getitem__)
        return Axes(tuple(places), tuple(self.sources[place] for place in self.mirrored))

    @property
    def reversed(self) -> Axes:
        """The same of arrays whose axes are in the reversed order, as in files, (z, y, x)."""
        last = len(self.sources) - 1
        sources = tuple(last - axis for axis in reversed(self.sources))
        return Axes(sources, tuple(last - place for place in self.mirrored))

    def apply(self, array: Array) -> Array:
        """Return a view of an array (*grid) or (channels, *grid), with the axes turned."""
        first = array.ndim - len(self.sources)
        turned = array.transpose(*range(first), *(axis + first for axis in self.sources))
        if not self.mirrored:
            return turned
        return np.flip(turned, tuple(place + first for place in self.mirrored))

    def undo(self, array: Array) -> Array:
        """Return a view of an array that `apply` turned, or one like it, with its first axes."""
        return self.inverse.apply(array)

    def along(self, values: Sequence[_Value]) -> tuple[_Value, ...]:
        """Return the values of the axes, one each, in the order of those of the other grid."""
        return tuple(values[axis] for axis in self.sources)

    def letters(self, codes: str) -> str:
        """Return the codes of the axes of the other grid, from those of this one."""
        letters = ""
        for place, axis in enumerate(self.sources):
            code = codes[axis : axis + 1]  # A 2-D grid has no third one.
            letters += _OPPOSITES.get(code, "") if place in self.mirrored else code
        return letters

    def affine(self, affine: Float64, shape: Sequence[int]) -> Float64:
        """Return the affine of the other grid, (4, 4), from that of this one and its shape."""
        turned = np.array(affine, np.float64)
        for place, axis in enumerate(self.sources):
            step = affine[:3, axis]
            if place in self.mirrored:
                turned[:3, 3] += step * (shape[axis] - 1)
                step = -step
            turned[:3, place] = step
        return turned

    def find(
        self, positions: Sequence[NDArray[np.intp]], shape: Sequence[int]
    ) -> tuple[NDArray[np.intp], ...]:
        """Return the indices in this grid of voxels of the other one, which has a shape.

        Both are an array of indices along each axis.
        """
        found = []
        for axis in self.inverse.sources:
            along = positions[axis]
            found.append(shape[axis] - 1 - along if axis in self.mirrored else along)
        return tuple(found)

    def find_box(self, box: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the box of this grid that a box of the other one is, which has a shape."""
        found = []
        for axis in self.inverse.sources:
            part = box[axis]
            if axis in self.mirrored:
                part = slice(shape[axis] - part.stop, shape[axis] - part.start)
            found.append(part)
        return tuple(found)


def all_axes() -> Iterator[Axes]:
    """Yield how three axes may be exchanged and mirrored; the first one leaves them as they are."""
    for sources in permutations(range(3)):
        for is_mirrored in product((False, True), repeat=3):
            yield Axes(sources, tuple(np.flatnonzero(is_mirrored).tolist()))
