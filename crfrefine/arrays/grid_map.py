"""Where the voxels of a grid lie on another grid of the same world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from crfrefine.base.array_types import Array, Bool, Float32, Float64, Indices
from crfrefine.base.geometry import GRID_TOLERANCE, nearest_axes

# (taps, n) ascending samples of n voxels, and their weights
Taps = tuple[Indices, Float32]

# A position so few voxels below a tie or beyond an edge counts as on it: headers keep float32.
POSITION_TOLERANCE = 1e-4
# Axes that drift apart by at most so many voxels over the whole volume count as parallel.
TILT_TOLERANCE = 1e-4
# Weights of the samples at 0 and 1, or at -1, 0, 1 and 2, a row each, as polynomials of the
# position from 0 to 1.
LINEAR = np.array([[1, -1], [0, 1]], np.float32)
CATMULL_ROM = np.array([[0, -1, 2, -1], [2, 0, -5, 3], [0, 1, 4, -3], [0, 0, -1, 1]]) / 2


@dataclass(frozen=True, eq=False)
class GridMap:
    """Where the voxels of a grid lie on another one, the source.

    Axes are in storage order, (z, y, x); planes have one slice.
    """

    shape: tuple[int, int, int]  # voxels of the grid to fill, (z, y, x)
    source_shape: tuple[int, int, int]  # voxels of the source, (z, y, x)
    matrix: Float64  # (3, 3) index on the source = matrix @ index + offset
    offset: Float64  # (3,) see `matrix`

    @cached_property
    def source_axes(self) -> tuple[int, ...] | None:
        """The axis of the source that is parallel to each axis; None if axes are oblique."""
        order = nearest_axes(self.matrix)
        drift = np.abs(self.matrix) * (np.array(self.shape) - 1)
        for axis, source in enumerate(order):
            drift[source, axis] = 0.0
        if drift.sum(axis=1).max() <= TILT_TOLERANCE:
            return order
        return None

    @cached_property
    def _positions(self) -> list[tuple[Float64, int]]:
        """Along each axis, the voxels' indices on the parallel axis of the source, and its size."""
        assert self.source_axes is not None
        positions = []
        for axis, source in enumerate(self.source_axes):
            step = self.matrix[source, axis]
            along = step * np.arange(self.shape[axis]) + self.offset[source]
            positions.append((along, self.source_shape[source]))
        return positions

    @cached_property
    def inside_along(self) -> tuple[Bool, ...]:
        """Along each axis, which voxels are within half a voxel of the source's parallel axis."""
        return tuple(_is_inside(along, size) for along, size in self._positions)

    @property
    def nearest_along(self) -> tuple[Indices, ...]:
        """Along each axis, the index of the nearest sample; of two equally near, the larger."""
        return tuple(nearest_sample(along, size - 1) for along, size in self._positions)

    def taps_along(self, *, is_cubic: bool) -> list[Taps]:
        """Return the samples and weights of each value along each axis.

        Beyond the edge, the outermost samples count.
        """
        polynomials = CATMULL_ROM if is_cubic else LINEAR
        count = len(polynomials)
        taps: list[Taps] = []
        for positions, size in self._positions:
            last = size - 1
            clipped = np.clip(positions, 0, last)
            below = np.floor(clipped).astype(np.intp)
            below = np.minimum(below, max(last - 1, 0))
            samples = below + np.arange(1 - count // 2, 1 + count // 2)[:, None]
            fraction = (clipped - below).astype(polynomials.dtype)
            powers = np.stack([np.ones_like(fraction), fraction, fraction**2, fraction**3])
            weights = (polynomials @ powers[:count]).astype(np.float32)
            taps.append((np.clip(samples, 0, last), weights))
        return taps

    def inside(self, plane: int) -> Bool:
        """Return (y, x), True where a plane of the grid is within half a voxel of the source."""
        if self.source_axes is not None:
            planes, rows, columns = self.inside_along
            return planes[plane] & rows[:, None] & columns
        _, height, width = self.shape
        y, x = np.ogrid[:height, :width]
        inside: Bool = np.ones((height, width), np.bool_)
        for axis, size in enumerate(self.source_shape):
            along_z, along_y, along_x = self.matrix[axis]
            of_plane = along_z * plane + self.offset[axis]
            inside &= _is_inside(along_y * y + along_x * x + of_plane, size)
        return inside

    def all_inside(self) -> Bool:
        """Return (z, y, x), True where a voxel is within half a voxel of the source."""
        inside = np.empty(self.shape, np.bool_)
        for plane, target in enumerate(inside):
            target[...] = self.inside(plane)
        return inside

    @cached_property
    def num_inside(self) -> int:
        """Number of voxels that lie on the source."""
        if self.source_axes is not None:  # The grid may be too large to look at its planes.
            return math.prod(int(np.count_nonzero(line)) for line in self.inside_along)
        return sum(int(np.count_nonzero(self.inside(plane))) for plane in range(self.shape[0]))

    @cached_property
    def in_whole_voxels(self) -> GridMap | None:
        """This map in whole numbers, if voxels of both grids are at the same places; else None.

        Both have the same axes, perhaps exchanged or mirrored, and the same spacing. Places are
        compared at the corners of the source.
        """
        matrix = self.matrix.copy()
        for axis, size in enumerate(self.shape):
            if size == 1:  # A step along it leads nowhere, and a plane may have any thickness.
                matrix[:, axis] /= np.abs(matrix[:, axis]).max()
        whole = GridMap(self.shape, self.source_shape, np.rint(matrix), np.rint(self.offset))
        # Of whole numbers, only a step of 1 along each axis is at right angles to the others.
        if not np.array_equal(whole.matrix @ whole.matrix.T, np.eye(3)):
            return None
        corners = np.array(list(product(*({0, size - 1} for size in self.source_shape))))
        voxels = (corners - whole.offset) @ whole.matrix
        distances = voxels @ matrix.T + self.offset - corners
        if np.abs(distances).max() > GRID_TOLERANCE:
            return None
        return whole

    def source_spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return mm between samples of the source along each axis of the grid, in order x, y, z.

        Args:
            spacing: mm between voxels of the grid, x, y, z; the result is at least that.
        """
        lengths = np.linalg.norm(self.matrix, axis=0)[::-1]
        steps = zip(spacing, lengths, strict=False)  # A plane has no spacing along z.
        return tuple(float(step / min(1.0, length)) for step, length in steps)

    @property
    def num_voxels(self) -> int:
        """Number of voxels of the grid."""
        return math.prod(self.shape)


def map_grid(
    shape: Sequence[int], affine: Float64, source_shape: Sequence[int], source_affine: Float64
) -> GridMap:
    """Return where the voxels of a grid lie on another one.

    Shapes are voxels along x, y(, z), affines lead from voxels to world mm.
    """
    from_source = _in_space(source_shape, source_affine)
    to_source = np.linalg.solve(from_source, _in_space(shape, affine))
    matrix = to_source[2::-1, 2::-1].astype(np.float64)
    offset = to_source[2::-1, 3].astype(np.float64)
    return GridMap(stored_sizes(shape), stored_sizes(source_shape), matrix, offset)


def _is_inside(positions: Float64, size: int) -> Bool:
    """Return which positions are within half a voxel of the samples of an axis."""
    is_above = positions >= -0.5 - POSITION_TOLERANCE
    is_below = positions <= size - 0.5 + POSITION_TOLERANCE
    return is_above & is_below


def nearest_sample(positions: Float64, last: int | Indices) -> Indices:
    """Return the index of the sample nearest to each position, at most the last."""
    rounded = np.floor(positions + (0.5 + POSITION_TOLERANCE))
    return np.clip(rounded, 0, last).astype(np.intp)


def _in_space(shape: Sequence[int], affine: Array) -> Float64:
    """Return the affine, in which a plane has a slice 1 mm thick at right angles to it.

    Files may say anything about the axis that a plane lacks.
    """
    full = np.array(affine, np.float64)
    if len(shape) < 3:
        along_x, along_y, _ = full[:3, :3].T
        normal = np.cross(along_x, along_y)
        full[:3, 2] = normal / np.linalg.norm(normal)
    return full


def stored_sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return voxels along z, y, x from those along x, y(, z); a plane has one slice."""
    x, y, z = [*shape, 1][:3]
    return int(z), int(y), int(x)
