"""The label map of a coarse network as the channels of its labels' shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.shares import log_shares
from crfrefine.refinement.tiles.grid import TILE, TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool, Float32, Labels

_MAX_ROWS = 4
"""Rows of tiles whose shares are computed at once."""


class ShareChannels:
    """Logarithms of shares, computed where they are asked for; a `ChannelSource`.

    Attributes:
        is_probability: False.
    """

    is_probability = False

    def __init__(self, numbers: Labels, sigma: Sequence[float], first_plane: int = 0, num_planes: int | None = None) -> None:
        """Take a label map.

        Args:
            numbers: (*grid) channel of each voxel's label; three axes.
            sigma: result of `crfrefine.arrays.shares.share_sigma` for these axes.
            first_plane: first plane of the part; a multiple of the height of a tile.
            num_planes: planes of the part; None means all from the first one.
        """
        self._numbers, self._sigma, self._first_plane = numbers, sigma, first_plane
        self._grid = TileGrid((len(numbers) - first_plane if num_planes is None else num_planes, *numbers.shape[1:]))

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Do nothing: the label map is in memory."""

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """Write a label's logits in some tiles to the entries of an array; see `ChannelSource.fill_entries`."""
        places = np.stack(np.unravel_index(tiles, self._grid.counts))
        for rows in np.unique(places[0] // _MAX_ROWS):
            some = np.flatnonzero(places[0] // _MAX_ROWS == rows)
            first, last = places[:, some].min(axis=1), places[:, some].max(axis=1) + 1
            box = [
                slice(start * tile, min(stop * tile, extent))
                for start, stop, tile, extent in zip(first.tolist(), last.tolist(), TILE, self._grid.shape, strict=True)
            ]
            planes = slice(box[0].start + self._first_plane, box[0].stop + self._first_plane)
            values = log_shares(self._numbers, label, self._sigma, (planes, *box[1:]))
            part = TileGrid(values.shape)
            inner = np.ravel_multi_index(tuple(places[:, some] - first[:, None]), part.counts)
            found = np.empty((len(some), out.shape[1]), np.float32)
            part.engine(None).gather(np.ascontiguousarray(values), inner, found)
            out[entries[some]] = found

    def planes(self, start: int, stop: int) -> ShareChannels:
        """Return the source of some planes; see `ChannelSource.planes`."""
        return ShareChannels(self._numbers, self._sigma, self._first_plane + start, stop - start)
