"""A label map as the channels of its labels: a label takes part at the voxels within reach of one that has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, widen
from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.refinement.tiles.grid import TILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.grid import Extents, TileGrid


LARGEST_NEIGHBORHOOD = 1 << 17
"""Voxels of a tile and what is within its reach up to which each tile looks for a label by itself; else the whole grid is searched."""


class LabelMapChannels:
    """The logits that `crfrefine.arrays.one_hot` describes, made where they are asked for; a `ChannelSource`.

    Attributes:
        is_probability: False.
        numbers: (*grid) channel of each voxel's label.
        reach: voxels along each axis within which a label takes part.
    """

    is_probability = False

    def __init__(
        self, numbers: NDArray[np.unsignedinteger[Any]], reach: Extents, first_plane: int = 0, num_planes: int | None = None
    ) -> None:
        """Take a label map.

        Args:
            numbers: (*grid) channel of each voxel's label, uint8 or uint16, C-contiguous; three axes.
            reach: voxels along each axis within which a label takes part.
            first_plane: from which on the map is asked for; the planes before and after count as neighbors.
            num_planes: that are asked for; None: all from there on.
        """
        self.numbers = numbers
        self.reach = reach
        self._first_plane = first_plane
        self._num_planes = len(numbers) - first_plane if num_planes is None else num_planes

    def ensure(self, domains: NDArray[np.bool_], threads: int | None) -> None:
        """Do nothing: the label map is in memory."""

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write a label's logits in some tiles to the entries of an array; see `ChannelSource.fill_entries`."""
        if math.prod(tile + 2 * extent for tile, extent in zip(TILE, self.reach, strict=True)) > LARGEST_NEIGHBORHOOD:
            engine.fill_entries(self.channel(label), True, tiles, self.is_probability, entries, out)
            return
        logits = (CONFIDENCE, 0.0, ABSENT_LOGIT)
        engine.fill_labels(self.numbers, self._first_plane, label, self.reach, logits, tiles, entries, out)

    def planes(self, start: int, stop: int) -> LabelMapChannels:
        """Return the source of some planes; see `ChannelSource.planes`."""
        return LabelMapChannels(self.numbers, self.reach, self._first_plane + start, stop - start)

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


def find_tiles_near_labels(
    grid: TileGrid, numbers: NDArray[np.unsignedinteger[Any]], num_channels: int, reach: Extents, threads: int | None
) -> NDArray[np.bool_]:
    """Return the tiles where a label may take part, (channels, *tiles): those with voxels within reach of it, and few others.

    Args:
        grid: the tiles.
        numbers: (*grid) channel of each voxel's label, uint8 or uint16, C-contiguous.
        num_channels: more than the largest number.
        reach: voxels along each axis.
        threads: None: the cores this process may use.
    """
    near = np.zeros((num_channels, *grid.counts), np.bool_)
    grid.engine(threads).mark_near(numbers, reach, near.view(np.uint8))
    return near
