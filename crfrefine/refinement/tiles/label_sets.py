"""Which labels take part in which tiles."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.threads import available_threads
from crfrefine.engines.compiled import load_engine
from crfrefine.refinement.tiles.grid import TILE, Extents, TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool


def num_rings(reach: Extents) -> Extents:
    """Return the number of tiles along each axis by which a label's domain is wider than the tiles where it is present.

    Twice the reach: messages at a voxel come from within the reach, and their normalization from within the reach of those.
    """
    return tuple(math.ceil(2 * extent / tile) for extent, tile in zip(reach, TILE, strict=True))


class LabelSets:
    """The labels that take part in each tile.

    An *active* tile has two labels or more; each pair of an active tile and a label in it is an entry. A tile with one label is settled:
    that label's marginal is 1.

    Attributes:
        grid: the tiles.
        domains: (L, *tiles), where labels take part.
        num_labels_of: (*tiles), number of labels that take part.
        active: (*tiles), True where two labels or more take part.
        tiles: flat numbers of the active tiles, ascending.
        first_entry: (active tiles + 1), the first entry of each active tile, and the number of entries.
        num_entries: pairs of an active tile and a label that takes part in it.
    """

    def __init__(self, grid: TileGrid, domains: Bool) -> None:
        """Take where labels take part, (L, *tiles)."""
        self.grid, self.domains = grid, domains
        self.num_labels_of: NDArray[np.int64] = np.zeros(grid.counts, np.int64)
        for label in domains:
            self.num_labels_of += label
        self.active: Bool = self.num_labels_of > 1
        self.tiles = np.flatnonzero(self.active)
        self.first_entry = np.concatenate([[0], np.cumsum(self.num_labels_of.reshape(-1)[self.tiles])]).astype(np.int64)
        self.num_entries = int(self.first_entry[-1])

    @cached_property
    def settled(self) -> NDArray[np.int32]:
        """(*tiles), the only label of a tile; -1: none, or several."""
        labels = np.full(self.grid.counts, -1, np.int32)
        single = self.num_labels_of == 1
        for label, tiles in enumerate(self.domains):
            labels[tiles & single] = label
        return labels

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(entries), the label of each entry; ascending in a tile."""
        labels = np.empty(self.num_entries, np.int32)
        for label in range(len(self.domains)):
            labels[self.entries_of(label)[1]] = label
        return labels

    @cached_property
    def _places(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        next_entry = self.first_entry[:-1].copy()
        places = []
        for domain in self.domains:
            among = np.flatnonzero(domain.reshape(-1)[self.tiles])
            places.append((self.tiles[among], next_entry[among].copy()))
            next_entry[among] += 1
        return places

    def entries_of(self, label: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the active tiles where a label takes part, as flat numbers, and its entries there."""
        return self._places[label]

    def flagged(self, flags: NDArray[np.uint8]) -> Bool | None:
        """Return (L, *tiles), the labels and tiles of the entries whose flag is not 0; None if no entry is flagged."""
        if not flags.any():
            return None
        found = np.zeros_like(self.domains)
        for label in np.unique(self.labels[flags != 0]):
            tiles, entries = self.entries_of(int(label))
            found[label].flat[tiles[flags[entries] != 0]] = True
        return found

    def engine(self, mask: Bool | None, threads: int | None) -> Any:
        """Return the C++ engine's routines for these sets; `mask` (*grid) is True where the model applies, None: everywhere."""
        return load_engine().LabelSets(
            self.grid.shape, TILE, mask, self.tiles, self.first_entry, self.labels, self.settled, threads or available_threads()
        )
