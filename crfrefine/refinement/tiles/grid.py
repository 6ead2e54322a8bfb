"""A grid cut into tiles, how far the kernels reach, and which labels take part in which tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from crfrefine.arrays.label_maps import Box, dilated, whole_box
from crfrefine.base.array_types import Array, Bool, Float32, Integers, Shape
from crfrefine.base.limits import available_threads
from crfrefine.engines.cpu import load_engine

# Voxels of a tile along each axis in storage order; the last is a vector of the C++ engine.
TILE = (8, 8, 16)
TILE_VOXELS = math.prod(TILE)
MAX_DIMS = 3  # most axes of a grid that is cut into tiles

TileNumbers = Integers  # flat numbers of tiles in their grid
EntryNumbers = Integers  # numbers of entries of `LabelSets`


class TileGrid:
    """A grid in storage order, cut into tiles of TILE voxels; those at its end may be smaller.

    `shape` has three axes, slowest first; grids of fewer axes have leading axes of one voxel.
    `counts` is the number of tiles along each.
    """

    def __init__(self, grid_shape: Sequence[int]) -> None:
        """Cut a grid of one to three axes."""
        leading = (1,) * (MAX_DIMS - len(grid_shape))
        self.shape: Shape = leading + tuple(int(extent) for extent in grid_shape)
        counts = []
        for extent, tile in zip(self.shape, TILE, strict=True):
            counts.append(math.ceil(extent / tile))
        self.counts: Shape = tuple(counts)
        self.num_tiles = math.prod(self.counts)

    def engine(self, threads: int | None) -> Any:
        """Return the C++ engine's routines for these tiles."""
        return load_engine().Tiles(self.shape, TILE, threads or available_threads())

    def gather(self, values: Array, tiles: TileNumbers, threads: int | None) -> Array:
        """Return the values of some tiles of (*grid) values, (n, voxels of a tile).

        They are 0 beyond the grid.
        """
        gathered = np.empty((len(tiles), TILE_VOXELS), values.dtype)
        if len(tiles):
            self.engine(threads).gather(values, tiles, gathered)
        return gathered

    def mask(self, mask: Bool | None) -> Bool | None:
        """Return a mask, which may have fewer axes, on the axes of `shape`, C-contiguous."""
        if mask is None:
            return None
        return np.ascontiguousarray(mask).reshape(self.shape)

    def with_planes(self, planes: slice) -> TileGrid:
        """Return the grid of some of the planes, which begin with a tile."""
        return TileGrid((planes.stop - planes.start, *self.shape[1:]))

    @cached_property
    def numbers(self) -> TileNumbers:
        """(*tiles), the flat number of each tile."""
        return np.arange(self.num_tiles).reshape(self.counts)

    def cut(self, box: Box, values: Array) -> tuple[TileNumbers, Array]:
        """Return the numbers of the tiles of a box, ascending, and the values in each.

        The values are (*box), of whole tiles, and become (n, voxels of a tile).
        """
        tiles = self.numbers[tiles_around(box)].ravel()
        return tiles, TileGrid(values.shape).gather(values, np.arange(len(tiles)), 1)

    def tiles_in(self, planes: slice) -> slice:
        """Return the flat numbers of the tiles that hold some planes."""
        layers = tile_layers(planes)
        tiles_of_layer = self.counts[1] * self.counts[2]
        return slice(layers.start * tiles_of_layer, layers.stop * tiles_of_layer)

    def slabs(self, num_layers: int = 1) -> list[slice]:
        """Return the planes of each slab of so many layers of tiles; the last may have fewer."""
        num_planes = self.shape[0]
        height = num_layers * TILE[0]
        starts = range(0, num_planes, height)
        return [slice(start, min(start + height, num_planes)) for start in starts]

    def voxels_in(self, tile_box: Box) -> Box:
        """Return the voxels of a box of tiles."""
        box = []
        for along, tile, extent in zip(tile_box, TILE, self.shape, strict=True):
            stop = min(along.stop * tile, extent)
            box.append(slice(along.start * tile, stop))
        return tuple(box)

    def to_voxels(self, values: Array) -> Array:
        """Return (*grid), at each voxel the value of its tile, from (*tiles) values."""
        for axis, extent in enumerate(self.shape):
            tile_of_voxel = np.arange(extent) // TILE[axis]
            values = values.take(tile_of_voxel, axis=axis)
        return values

    def scatter(self, tiles: TileNumbers, values: Float32, elsewhere: float = np.nan) -> Float32:
        """Return (*grid) with values of some tiles, as `gather` has them, and a value elsewhere."""
        by_tile = np.full((self.num_tiles, *TILE), elsewhere, np.float32)
        by_tile[tiles] = values.reshape(-1, *TILE)
        return np.ascontiguousarray(self.joined(by_tile))

    def joined(self, by_tile: Array) -> Array:
        """Return (z, y, n) from the values of all tiles, (tiles, planes, rows, values of a row).

        Tiles of one value in each row give n = tiles along the last axis; those of whole rows give
        the grid.
        """
        shape_of_tile = by_tile.shape[1:]
        by_axis = by_tile.reshape(*self.counts, *shape_of_tile).transpose(0, 3, 1, 4, 2, 5)
        whole_tiles = by_axis.reshape(np.multiply(self.counts, shape_of_tile).tolist())
        return whole_tiles[whole_box(self.shape)]

    def reduced(
        self, ufunc: np.ufunc, values: Array, dtype: DTypeLike, where: Bool | None = None
    ) -> Array:
        """Return the voxels of each tile reduced by a ufunc, such as a sum, (*tiles).

        Voxels where `where` is False count as 0.
        """
        reduced = np.empty(self.counts, dtype)
        for layer, planes in enumerate(self.slabs()):
            part = values[planes]
            if where is not None:
                part = np.where(where[planes], part, values.dtype.type(0))
            of_tiles = ufunc.reduce(part, axis=0, dtype=dtype)
            for axis in (0, 1):
                starts = range(0, of_tiles.shape[axis], TILE[axis + 1])
                of_tiles = ufunc.reduceat(of_tiles, starts, axis=axis)
            reduced[layer] = of_tiles
        return reduced


def box_between(start: Integers, stop: Integers) -> Box:
    """Return the box with these first places and ends, one per axis."""
    ends = zip(start.tolist(), stop.tolist(), strict=True)
    return tuple(slice(first, end) for first, end in ends)


def tile_layers(planes: slice) -> slice:
    """Return the layers of tiles that hold some planes."""
    return slice(planes.start // TILE[0], -(-planes.stop // TILE[0]))


def tiles_around(box: Box) -> Box:
    """Return the box of tiles that hold a box of voxels."""
    tile_box = []
    for along, tile in zip(box, TILE, strict=True):
        end = math.ceil(along.stop / tile)
        tile_box.append(slice(along.start // tile, end))
    return tuple(tile_box)


def num_rings(reach: Shape) -> Shape:
    """Return by how many tiles per axis a label's domain exceeds those where it is present."""
    # The rings hold twice the reach: messages come from within the reach, and so do their
    # normalizations.
    rings = []
    for extent, tile in zip(reach, TILE, strict=True):
        rings.append(math.ceil(2 * extent / tile))
    return tuple(rings)


class LabelSets:
    """The labels that take part in each tile.

    An *active* tile has two labels or more; each pair of an active tile and a label in it is an
    entry. A tile with one label is settled: that label's marginal is 1.
    """

    def __init__(self, grid: TileGrid, domains: Bool) -> None:
        self.grid = grid
        self.domains = domains  # (L, *tiles), where labels take part
        self.num_labels_of: Integers = domains.sum(axis=0, dtype=np.int64)  # (*tiles)
        self.active: Bool = self.num_labels_of > 1  # (*tiles)
        self.tiles = np.flatnonzero(self.active)  # flat numbers of the active tiles, ascending
        # (active tiles + 1), the first entry of each active tile, and the number of entries.
        ends = np.cumsum(self.num_labels_of[self.active])
        self.first_entry: EntryNumbers = np.append(np.int64(0), ends)
        self.num_entries = int(self.first_entry[-1])

    @cached_property
    def settled(self) -> NDArray[np.int32]:
        """(*tiles), the only label of a tile; -1 for tiles with no label or several."""
        labels = np.full(self.grid.counts, -1, np.int32)
        single = self.num_labels_of == 1
        for label, tiles in enumerate(self.domains):
            labels[tiles & single] = label
        return labels

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(entries), the label of each entry; ascending in a tile."""
        labels = np.empty(self.num_entries, np.int32)
        for label, (_, entries) in enumerate(self.entries):
            labels[entries] = label
        return labels

    @cached_property
    def tile_of_entry(self) -> NDArray[np.int64]:
        """(entries), the number of each entry's tile among the active ones."""
        return np.repeat(np.arange(len(self.tiles)), np.diff(self.first_entry))

    @cached_property
    def entries(self) -> list[tuple[TileNumbers, EntryNumbers]]:
        """For each label, the active tiles where it takes part, and its entries there."""
        next_entry = self.first_entry[:-1].copy()
        places = []
        for domain in self.domains:
            among = np.flatnonzero(domain[self.active])
            places.append((self.tiles[among], next_entry[among]))
            next_entry[among] += 1
        return places

    def find_entries(
        self, label: int, searched: TileNumbers
    ) -> tuple[EntryNumbers, NDArray[np.intp]]:
        """Return a label's entries in searched tiles, and which of these tiles they are in.

        It may take part in some of them only; others may lie beyond the grid.
        """
        tiles, entries = self.entries[label]
        places = np.flatnonzero(np.isin(searched, tiles))
        return entries[np.searchsorted(tiles, searched[places])], places

    def voxels_inside(self, mask: Bool | None) -> Bool:
        """Return which voxels of active tiles count, (active tiles, voxels of a tile).

        Those count that are in the grid and in the mask, (*grid), if there is one.
        """
        grid = self.grid
        inside = np.ones(grid.shape, np.float16) if mask is None else mask.astype(np.float16)
        return grid.gather(inside, self.tiles, 1) != 0

    def entries_in(self, planes: slice) -> slice:
        """Return the entries of some planes, which begin and end with a tile, or with the grid."""
        tiles = self.grid.tiles_in(planes)
        ends = np.searchsorted(self.tiles, [tiles.start, tiles.stop])
        return slice(*self.first_entry[ends])

    def engine(self, mask: Bool | None, threads: int | None) -> Any:
        """Return the C++ engine's routines for these sets.

        `mask` (*grid) is True where the model applies, or None.
        """
        return load_engine().LabelSets(
            self.grid.shape,
            TILE,
            mask,
            self.tiles,
            self.first_entry,
            self.labels,
            self.settled,
            threads or available_threads(),
        )


def label_sets(grid: TileGrid, present: Bool, may_matter: Bool, reach: Shape) -> LabelSets:
    """Return the labels of each tile: those that are present around it and may matter there.

    Where labels are is (L, *tiles) each; kernels end after `reach` voxels.
    """
    # Farther away than that a label cannot rise, as the C++ engine confirms.
    domains = np.zeros_like(present)
    rings = num_rings(reach)
    for label in np.flatnonzero(present.any(axis=(1, 2, 3))):
        near = dilated(present[label], rings)
        domains[label] = near & may_matter[label]
    return LabelSets(grid, domains)
