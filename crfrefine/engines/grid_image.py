"""The image of a case as engines take it, and the origin of its features: given, or chosen by the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array, Bool


@dataclass(frozen=True)
class FeatureOrigin:
    """The point that the features of appearance kernels count from.

    Kernels depend only on differences of features, but the points of a lattice and the cells of a bilateral grid do not. Parts of a volume
    that share an origin share these points, so their messages agree wherever the cut is out of reach.
    """

    position: tuple[int, ...]  # a voxel, one index per grid axis from the first voxel of the grid; it may lie outside
    intensity: tuple[float, ...]  # one normalized intensity per modality


@dataclass(frozen=True, eq=False)
class GridImage:
    """The image of a case, or a part of one, and where the model applies; axes in storage order."""

    values: Array  # (M, *grid). Engines take normalized intensities, float32 or float64, which set the precision.
    mask: Bool | None  # (*grid), True where the model applies; None: everywhere
    spacing: Sequence[float]  # mm, one per grid axis
    # The user's number of each grid axis, where the arrays are transposed views of the user's: the cells of a lattice depend on the order
    # of its features, and must not depend on the memory order. None: the axes are in the user's order.
    axes: Sequence[int] | None = None
    # The point that features count from; None: `default_origin`. Axes along which the mask is one voxel long have no feature. With `filter
    # = "auto"` parts of a volume may get different filters.
    origin: FeatureOrigin | None = None

    @property
    def num_voxels(self) -> int:
        """Voxels inside the mask."""
        return math.prod(self.values.shape[1:]) if self.mask is None else int(np.count_nonzero(self.mask))

    def in_box(self, box: Box) -> GridImage:
        """Return views of a box of the grid."""
        return replace(self, values=self.values[(slice(None), *box)], mask=None if self.mask is None else self.mask[box])

    def origin_from(self, first: int) -> FeatureOrigin:
        """Return the origin, which is given, as planes from some plane on have it."""
        assert self.origin is not None
        return replace(self.origin, position=(self.origin.position[0] - first, *self.origin.position[1:]))


def default_origin(image: GridImage) -> FeatureOrigin:
    """Return the origin that engines take by themselves: the first corner of the mask's bounding box, and the lowest intensities inside.

    Raises:
        InputError: the mask is empty.
    """
    values, mask = image.values, image.mask
    if mask is None:
        return FeatureOrigin((0,) * (values.ndim - 1), tuple(float(modality.min()) for modality in values))
    return FeatureOrigin(first_inside(mask), tuple(float(modality.min(where=mask, initial=np.inf)) for modality in values))


def first_inside(mask: Bool) -> tuple[int, ...]:
    """Return the first corner of a mask's bounding box; raise InputError if the mask is empty."""
    box = bounding_box(mask)
    if box is None:
        raise InputError("the mask is empty")
    return tuple(axis.start for axis in box)
