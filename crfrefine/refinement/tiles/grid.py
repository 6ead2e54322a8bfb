"""A grid cut into tiles, and how far the kernels reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.threads import available_threads
from crfrefine.engines.compiled import load_engine

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from crfrefine.base.array_types import Array, Bool, Float32
    from crfrefine.parameters.specs import KernelSetSpec

TILE = (8, 8, 16)
"""Voxels of a tile along each axis in storage order; the last is a vector of the C++ engine."""

MAX_DIMS = 3
"""Most axes of a grid that is cut into tiles."""

Extents = tuple[int, ...]


@dataclass(frozen=True)
class TileGrid:
    """A grid of three axes in storage order, cut into tiles of TILE voxels; those at its end may be smaller."""

    shape: Extents  # voxels along each axis, slowest first; grids of fewer axes have leading axes of one voxel

    @classmethod
    def of(cls, grid_shape: Sequence[int]) -> TileGrid:
        """Return the tiles of a grid of one to three axes."""
        return cls((1,) * (MAX_DIMS - len(grid_shape)) + tuple(int(extent) for extent in grid_shape))

    @cached_property
    def counts(self) -> Extents:
        """Number of tiles along each axis."""
        return tuple(-(-extent // tile) for extent, tile in zip(self.shape, TILE, strict=True))

    @property
    def num_tiles(self) -> int:
        """Number of tiles of the grid."""
        return math.prod(self.counts)

    def engine(self, threads: int | None) -> Any:
        """Return the C++ engine's routines for these tiles."""
        return load_engine().Tiles(self.shape, TILE, threads or available_threads())

    def voxels(self, tiles: Array, box: Box | None = None) -> Array:
        """Spread values per tile over the voxels of a box; None means the grid."""
        for axis, part in enumerate(box or tuple(slice(0, extent) for extent in self.shape)):
            tiles = tiles.take(np.arange(part.start, part.stop) // TILE[axis], axis=axis)
        return tiles

    def by_tile(self, inside: Bool | None, tiles: NDArray[np.int64]) -> Bool:
        """Return (n, voxels of a tile), True at the voxels of n tiles that are in the grid and in a mask.

        The mask is (*grid); None means everywhere.
        """
        padded = np.zeros(tuple(count * tile for count, tile in zip(self.counts, TILE, strict=True)), np.bool_)
        padded[tuple(slice(0, extent) for extent in self.shape)] = True if inside is None else inside
        shape = [part for pair in zip(self.counts, TILE, strict=True) for part in pair]
        whole = padded.reshape(shape).transpose(0, 2, 4, 1, 3, 5)
        found: Bool = whole[np.unravel_index(tiles, self.counts)].reshape(len(tiles), math.prod(TILE))
        return found

    def spread(self, tiles: NDArray[np.int64], values: Float32, otherwise: np.float32) -> Float32:
        """Return (*grid) from (n, voxels of a tile) values of n tiles, named by their flat numbers; other voxels are `otherwise`."""
        padded = np.full((self.num_tiles, *TILE), otherwise, np.float32)
        padded[tiles] = values.reshape(-1, *TILE)
        whole = padded.reshape(*self.counts, *TILE).transpose(0, 3, 1, 4, 2, 5)
        whole = whole.reshape(tuple(count * tile for count, tile in zip(self.counts, TILE, strict=True)))
        return np.ascontiguousarray(whole[tuple(slice(0, extent) for extent in self.shape)])

    def reduced(self, ufunc: np.ufunc, values: Array, dtype: DTypeLike, where: Bool | None = None) -> Array:
        """Return the sum, or what else a ufunc makes, of the voxels of each tile, (*tiles); those that do not count are 0."""
        reduced = np.empty(self.counts, dtype)
        for row in range(self.counts[0]):
            planes = slice(row * TILE[0], (row + 1) * TILE[0])
            part = values[planes] if where is None else np.where(where[planes], values[planes], values.dtype.type(0))
            of_tiles = ufunc.reduce(part, axis=0, dtype=dtype)
            for axis in (0, 1):
                of_tiles = ufunc.reduceat(of_tiles, range(0, of_tiles.shape[axis], TILE[axis + 1]), axis=axis)
            reduced[row] = of_tiles
        return reduced


def kernel_reach(spec: KernelSetSpec, spacing: Sequence[float], grid: TileGrid) -> Extents:
    """Return the voxels along each axis of the tiles' grid after which every kernel ends, or the grid; all in storage order."""
    leading = MAX_DIMS - len(spacing)
    return (0,) * leading + spec.reach(spacing, grid.shape[leading:])
