"""Where the logits of a label in some tiles come from: an array, a label map, or the label map of a coarse network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, widen
from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE, log_shares
from crfrefine.refinement.tiles.grid import TILE, TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Bool, Float32, Labels
    from crfrefine.refinement.tiles.grid import Extents


class ChannelSource(ABC):
    """The channels of a network's output."""

    is_probability = False
    """Whether the values are probabilities, whose logarithm is taken."""

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Make sure that labels can be had in some tiles, (L, *tiles), which may take another reading of a file."""
        return  # Channels in memory are there.

    @abstractmethod
    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """Write a label's logits in some tiles, named by flat numbers, to entries of `out`, (entries, voxels of a tile) float32."""

    @abstractmethod
    def planes(self, start: int, stop: int) -> ChannelSource:
        """Return the source of some planes of the slowest axis, which begin and end with a tile (or with the grid)."""


@dataclass(eq=False)
class DenseChannels(ChannelSource):
    """Channels in an array: a box of its grid."""

    values: Float32  # (L, *grid), of three grid axes
    box: Box
    is_probability: bool = False

    def channel(self, label: int) -> Float32:
        """Return a label's values in the box, with consecutive voxels along the last axis."""
        channel: Float32 = self.values[label][self.box]
        rows_are_contiguous = channel.strides[-1] == channel.itemsize and not any(stride % channel.itemsize for stride in channel.strides)
        return channel if rows_are_contiguous else np.ascontiguousarray(channel)

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """See `ChannelSource`."""
        engine.fill_entries(self.channel(label), True, tiles, self.is_probability, entries, out)

    def planes(self, start: int, stop: int) -> DenseChannels:
        """See `ChannelSource`."""
        first = self.box[0].start + start
        return DenseChannels(self.values, (slice(first, first + stop - start), *self.box[1:]), is_probability=self.is_probability)


MAX_NEIGHBORHOOD = 1 << 17
"""Voxels of a tile and its surroundings up to which each tile looks for a label by itself; else the whole grid is searched."""


class LabelMapChannels(ChannelSource):
    """The logits that `crfrefine.arrays.one_hot` describes, made where they are asked for."""

    def __init__(self, numbers: Labels, reach: Sequence[Any], first_plane: int = 0, num_planes: int | None = None) -> None:
        """Take a label map.

        Args:
            numbers: (z, y, x) channel of each voxel's label, uint8 or uint16, C-contiguous.
            reach: voxels along each axis within which a label takes part.
            first_plane: the first plane that is asked for; the planes before and after count as neighbors.
            num_planes: number of planes; None means all from there on.
        """
        self.numbers, self.reach = numbers, reach
        self._first_plane = first_plane
        self._num_planes = len(numbers) - first_plane if num_planes is None else num_planes

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """See `ChannelSource`."""
        if math.prod(tile + 2 * extent for tile, extent in zip(TILE, self.reach, strict=True)) > MAX_NEIGHBORHOOD:
            engine.fill_entries(self.channel(label), True, tiles, self.is_probability, entries, out)
            return
        logits = (CONFIDENCE, 0.0, ABSENT_LOGIT)
        engine.fill_labels(self.numbers, self._first_plane, label, self.reach, logits, tiles, entries, out)

    def planes(self, start: int, stop: int) -> LabelMapChannels:
        """See `ChannelSource`."""
        return type(self)(self.numbers, self.reach, self._first_plane + start, stop - start)

    def channel(self, label: int) -> NDArray[np.float16]:
        """Return a label's logits in the planes that are asked for."""
        first, stop = self._first_plane, self._first_plane + self._num_planes
        start = max(0, first - self.reach[0])
        occurs = self.numbers[start : stop + self.reach[0]] == label
        logits = np.full(occurs.shape, ABSENT_LOGIT, np.float16)
        box = bounding_box(occurs)
        if box is not None:
            wider = tuple(slice(max(0, axis.start - extent), axis.stop + extent) for axis, extent in zip(box, self.reach, strict=True))
            logits[wider][widen(occurs[wider], self.reach)] = 0.0
            logits[occurs] = CONFIDENCE
        return logits[first - start : stop - start]


def find_tiles_near_labels(grid: TileGrid, numbers: Labels, num_channels: int, reach: Extents, threads: int | None) -> Bool:
    """Return the tiles where a label may take part, (channels, *tiles): those with voxels within reach of it, and few others."""
    near = np.zeros((num_channels, *grid.counts), np.bool_)
    grid.engine(threads).mark_near(numbers, reach, near.view(np.uint8))
    return near


_MAX_ROWS = 4
"""Rows of tiles whose shares are computed at once."""


class ShareChannels(LabelMapChannels):
    """Logarithms of the shares of labels in the map of a coarse network; `reach` is the result of `share_sigma`."""

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """See `ChannelSource`."""
        grid = TileGrid((self._num_planes, *self.numbers.shape[1:]))
        places = np.stack(np.unravel_index(tiles, grid.counts))
        for rows in np.unique(places[0] // _MAX_ROWS):
            some = np.flatnonzero(places[0] // _MAX_ROWS == rows)
            first, last = places[:, some].min(axis=1), places[:, some].max(axis=1) + 1
            box = [
                slice(start * tile, min(stop * tile, extent))
                for start, stop, tile, extent in zip(first.tolist(), last.tolist(), TILE, grid.shape, strict=True)
            ]
            planes = slice(box[0].start + self._first_plane, box[0].stop + self._first_plane)
            values = log_shares(self.numbers, label, self.reach, (planes, *box[1:]))
            part = TileGrid(values.shape)
            inner = np.ravel_multi_index(tuple(places[:, some] - first[:, None]), part.counts)
            gathered = np.empty((len(some), out.shape[1]), np.float32)
            part.engine(None).gather(np.ascontiguousarray(values), inner, gathered)
            out[entries[some]] = gathered
