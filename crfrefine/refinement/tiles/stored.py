"""A network's channels, streamed from a file: only the tiles where a label may take part are kept, in the file's type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.refinement.tiles.bricks import Brick, Piece, cut_bricks
from crfrefine.refinement.tiles.grid import TILE, TileGrid
from crfrefine.refinement.tiles.label_sets import num_rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.grid import Extents
    from crfrefine.refinement.tiles.survey import Survey
    from crfrefine.refinement.tiles.threshold import Thresholds

ReadPieces = Callable[[], Iterable[Piece]]
"""Returns the pieces of a network's output, from the beginning at each call."""


class StoredChannels:
    """Some tiles of each label's channel; a `ChannelSource`."""

    def __init__(self, grid: TileGrid, num_labels: int, *, is_probability: bool = False, read: ReadPieces | None = None) -> None:
        """Start with no tile.

        Args:
            grid: the tiles.
            num_labels: L.
            is_probability: whether the values are probabilities.
            read: returns the pieces, for tiles that are wanted later; None: none will be.
        """
        self._read = read
        self.grid = grid
        self.num_labels = num_labels
        self.is_probability = is_probability
        self._parts: list[list[tuple[NDArray[np.int64], NDArray[Any]]]] = [[] for _ in range(num_labels)]

    @property
    def num_bytes(self) -> int:
        """Size of the tiles."""
        return sum(values.nbytes for parts in self._parts for _, values in parts)

    def keep(self, label: int, tiles: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Keep tiles of a label.

        Args:
            label: the label.
            tiles: (n,) flat numbers, none of which is kept already.
            values: (n, voxels of a tile) float32 or float16.
        """
        if len(tiles):
            self._parts[label].append((tiles, values))

    def tiles_of(self, label: int) -> NDArray[np.int64]:
        """Return the flat numbers of the tiles that are kept of a label, ascending."""
        return self._joined(label)[0]

    def retain(self, label: int, wanted: NDArray[np.bool_]) -> None:
        """Forget a label's tiles except those that are True in `wanted`, (*tiles)."""
        tiles, values = self._joined(label)
        chosen = wanted.reshape(-1)[tiles]
        if not chosen.all():
            self._parts[label] = [(tiles[chosen], values[chosen])]

    def ensure(self, domains: NDArray[np.bool_], threads: int | None) -> None:
        """Read tiles that are not kept yet; see `ChannelSource.ensure`."""
        missing = domains.copy()
        for label, tiles in enumerate(missing):
            tiles.reshape(-1)[self.tiles_of(label)] = False
        if not missing.any():
            return
        assert self._read is not None
        for brick in read_bricks(self._read, self.grid):
            own, first = TileGrid.of(brick.values.shape), first_tile(self.grid, brick.first_plane)
            tiles = np.flatnonzero(missing[brick.label].reshape(-1)[first : first + own.num_tiles])
            if len(tiles):
                values = np.empty((len(tiles), math.prod(TILE)), brick.values.dtype)
                own.engine(threads).gather(brick.values, tiles, values)
                self.keep(brick.label, tiles + first, values)

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write a label's logits in some tiles to the entries of an array; see `ChannelSource.fill_entries`."""
        kept, values = self._joined(label)
        if len(tiles) != len(kept):
            values = values[np.searchsorted(kept, tiles)]
        engine.fill_entries(values, False, tiles, self.is_probability, entries, out)

    def planes(self, start: int, stop: int) -> StoredChannels:
        """Return the source of some planes; see `ChannelSource.planes`."""
        first, end = first_tile(self.grid, start), first_tile(self.grid, stop + TILE[0] - 1)
        part = StoredChannels(TileGrid((stop - start, *self.grid.shape[1:])), self.num_labels, is_probability=self.is_probability)
        for label in range(self.num_labels):
            tiles, values = self._joined(label)
            chosen = slice(*np.searchsorted(tiles, (first, end)))
            part.keep(label, tiles[chosen] - first, values[chosen])
        return part

    def _joined(self, label: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        parts = self._parts[label]
        if not parts:
            return np.zeros(0, np.int64), np.zeros((0, math.prod(TILE)), np.float32)
        if len(parts) > 1:
            joined, values = np.concatenate([tiles for tiles, _ in parts]), np.concatenate([values for _, values in parts])
            if (np.diff(joined) < 0).any():
                order = np.argsort(joined)
                joined, values = joined[order], values[order]
            parts[:] = [(joined, values)]
        return parts[0]


def first_tile(grid: TileGrid, plane: int) -> int:
    """Return the flat number of the first tile of the row of tiles that holds a plane."""
    return plane // TILE[0] * grid.counts[1] * grid.counts[2]


def read_bricks(read: ReadPieces, grid: TileGrid) -> Iterator[Brick]:
    """Yield the bricks of a network's output in float32 or float16: other types are converted, exactly."""
    for brick in cut_bricks(read(), grid.shape[1:], grid.shape[0]):
        known = brick.values.dtype in (np.float32, np.float16)
        yield brick if known else Brick(brick.label, brick.first_plane, brick.values.astype(np.float32))


def store_channels(
    read: ReadPieces, survey: Survey, thresholds: Thresholds, reach: Extents, threads: int | None
) -> tuple[StoredChannels, NDArray[np.bool_], NDArray[np.bool_]]:
    """Read all channels once more, and keep the tiles where labels may take part.

    Args:
        read: returns the pieces.
        survey: of all channels.
        thresholds: of the model.
        reach: of the kernels.
        threads: None: the cores this process may use.

    Returns:
        (the channels, where labels are present, where they may matter), the latter (L, *tiles).
    """
    grid = survey.grid
    store = StoredChannels(grid, survey.num_labels, is_probability=survey.is_probability, read=read)
    present, may_matter = np.zeros((2, *survey.margins.shape), np.bool_)
    for brick in read_bricks(read, grid):
        own, label = TileGrid.of(brick.values.shape), brick.label
        first = first_tile(grid, brick.first_plane)
        # The bound was taken before later labels added to the sum.
        bound = survey.margins[label].reshape(-1)[first : first + own.num_tiles]
        tiles = np.flatnonzero(bound > thresholds.may_matter[label])
        if len(tiles):
            values = np.empty((len(tiles), math.prod(TILE)), brick.values.dtype)
            own.engine(threads).gather(brick.values, tiles, values)
            exact = survey.margins_of(label, values, tiles + first, is_whole_grid=False)
            chosen = exact > thresholds.may_matter[label]
            present[label].reshape(-1)[tiles + first] = exact > thresholds.present[label]
            may_matter[label].reshape(-1)[tiles + first] = chosen
            store.keep(label, tiles[chosen] + first, values[chosen])
        if brick.first_plane + len(brick.values) == grid.shape[0]:
            store.retain(label, widen(present[label], num_rings(reach)) & may_matter[label])
    return store, present, may_matter
