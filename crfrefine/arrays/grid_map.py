"""Where the voxels of one grid lie on another grid of the same world; `resampling` takes values there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32, Float64

POSITION_TOLERANCE = 1e-4
"""In voxels: headers keep float32, exact to 3e-5 after 500 voxels. A position this close below a tie or beyond an edge counts as on it."""

TILT_TOLERANCE = 1e-4
"""In voxels: axes that drift apart by no more than this from one end of the volume to the other count as parallel."""


@dataclass(frozen=True)
class AxisMap:
    """Where the indices of one axis lie on the parallel axis of the other grid."""

    positions: Float64  # (n,) float64 index on the other grid, not limited to its samples
    size: int  # samples of the other grid along the axis

    @property
    def inside(self) -> Bool:
        """(n,) True within half a voxel of the samples."""
        return _is_inside(self.positions, self.size)

    def nearest(self) -> NDArray[np.intp]:
        """Return the index of the nearest sample, (n,); halfway between two, the one with the larger index."""
        return np.clip(np.floor(self.positions + (0.5 + POSITION_TOLERANCE)), 0, self.size - 1).astype(np.intp)

    def neighbors(self) -> tuple[NDArray[np.intp], NDArray[np.intp], Float32]:
        """Return the samples below and above, and the weight of the upper one, (n,) each; beyond the outermost samples, their value."""
        clipped = np.clip(self.positions, 0, self.size - 1)
        below = np.minimum(np.floor(clipped), max(self.size - 2, 0)).astype(np.intp)
        return below, np.minimum(below + 1, self.size - 1), (clipped - below).astype(np.float32)


@dataclass(frozen=True, eq=False)
class GridMap:
    """Where the voxels of a grid lie on another one, the source. Axes are in storage order, (z, y, x); planes have one slice."""

    shape: tuple[int, int, int]  # voxels of the grid to fill, (z, y, x)
    source_shape: tuple[int, int, int]  # voxels of the source, (z, y, x)
    matrix: Float64  # (3, 3) index on the source = matrix @ index + offset
    offset: Float64  # (3,) see `matrix`

    @cached_property
    def source_axes(self) -> tuple[int, ...] | None:
        """For each axis, the number of the parallel axis of the source; None if axes are oblique."""
        # A direct sum over six orders; the largest entries could name one axis twice.
        order = max(permutations(range(3)), key=lambda axes: sum(abs(self.matrix[source, axis]) for axis, source in enumerate(axes)))
        drift = np.abs(self.matrix) * (np.array(self.shape) - 1)
        for axis, source in enumerate(order):
            drift[source, axis] = 0.0
        return order if drift.sum(axis=1).max() <= TILT_TOLERANCE else None

    def axis_maps(self, axes: Sequence[int]) -> tuple[AxisMap, ...]:
        """Return the map of each axis of a grid whose `source_axes` are `axes`."""
        return tuple(
            AxisMap(self.matrix[source, axis] * np.arange(self.shape[axis]) + self.offset[source], self.source_shape[source])
            for axis, source in enumerate(axes)
        )

    def inside(self, plane: int) -> Bool:
        """Return where a plane of the grid lies on the source, within half a voxel of its samples: (y, x), True there."""
        y, x = np.ogrid[: self.shape[1], : self.shape[2]]
        found: Bool = np.ones(self.shape[1:], np.bool_)
        for (along_z, along_y, along_x), start, size in zip(self.matrix, self.offset, self.source_shape, strict=True):
            found &= _is_inside(along_y * y + along_x * x + (along_z * plane + start), size)
        return found

    @cached_property
    def num_inside(self) -> int:
        """Number of voxels that lie on the source."""
        axes = self.source_axes
        if axes is None:
            return sum(int(np.count_nonzero(self.inside(plane))) for plane in range(self.shape[0]))
        return int(np.prod([np.count_nonzero(axis.inside) for axis in self.axis_maps(axes)]))

    @property
    def num_voxels(self) -> int:
        """Number of voxels of the grid."""
        return self.shape[0] * self.shape[1] * self.shape[2]


def map_grid(shape: Sequence[int], affine: Float64, source_shape: Sequence[int], source_affine: Float64) -> GridMap:
    """Return where the voxels of a grid lie on another one; shapes are voxels along x, y(, z), affines lead from voxels to world mm."""
    to_source = np.linalg.solve(_in_space(source_shape, source_affine), _in_space(shape, affine)).astype(np.float64, copy=False)
    return GridMap(_stored(shape), _stored(source_shape), to_source[2::-1, 2::-1].copy(), to_source[2::-1, 3].copy())


def world_box(shape: Sequence[int], affine: Float64) -> Float64:
    """Return the smallest world box of all voxels, edges included: (2, 3) lowest and highest x, y, z in mm."""
    sizes = np.array([*shape, 1][:3])
    corners = np.array([[*corner, 1.0] for corner in np.ndindex(2, 2, 2)])
    corners[:, :3] = corners[:, :3] * sizes - 0.5
    world = (corners @ _in_space(shape, affine).T)[:, :3]
    return np.stack([world.min(axis=0), world.max(axis=0)])


def boxes_overlap(box: Float64, other: Float64) -> bool:
    """Return whether two boxes of `world_box` have a volume in common."""
    return bool((np.minimum(box[1], other[1]) > np.maximum(box[0], other[0])).all())


def _is_inside(positions: Float64, size: int) -> Bool:
    inside: Bool = (positions >= -0.5 - POSITION_TOLERANCE) & (positions <= size - 0.5 + POSITION_TOLERANCE)
    return inside


def _in_space(shape: Sequence[int], affine: Array) -> Float64:
    """Return the affine; that of a plane with a slice 1 mm thick at right angles, whatever the file says about an axis it lacks."""
    full = np.array(affine, np.float64)
    if len(shape) < 3:
        normal = np.cross(full[:3, 0], full[:3, 1])
        full[:3, 2] = normal / np.linalg.norm(normal)
    return full


def _stored(shape: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = [*shape, 1][:3]
    return int(z), int(y), int(x)
