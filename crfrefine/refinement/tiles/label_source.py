"""A label map as the channels of its labels: a label takes part at the voxels within reach of a voxel that has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, widen
from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.refinement.tiles.grid import TILE, TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool, Float32, Labels
    from crfrefine.refinement.tiles.grid import Extents


MAX_NEIGHBORHOOD = 1 << 17
"""Voxels of a tile and its surroundings up to which each tile looks for a label by itself; else the whole grid is searched."""


class LabelMapChannels:
    """The logits that `crfrefine.arrays.one_hot` describes, made where they are asked for; a `ChannelSource`.

    Attributes:
        is_probability: False.
        numbers: (*grid) channel of each voxel's label.
        reach: voxels along each axis within which a label takes part.
    """

    is_probability = False

    def __init__(self, numbers: Labels, reach: Extents, first_plane: int = 0, num_planes: int | None = None) -> None:
        """Take a label map.

        Args:
            numbers: (*grid) channel of each voxel's label, uint8 or uint16, C-contiguous; three axes.
            reach: voxels along each axis within which a label takes part.
            first_plane: from which on the map is asked for; the planes before and after count as neighbors.
            num_planes: number of planes; None means all from there on.
        """
        self.numbers = numbers
        self.reach = reach
        self._first_plane = first_plane
        self._num_planes = len(numbers) - first_plane if num_planes is None else num_planes

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Do nothing: the label map is in memory."""

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """Write a label's logits in some tiles to the entries of an array; see `ChannelSource.fill_entries`."""
        if math.prod(tile + 2 * extent for tile, extent in zip(TILE, self.reach, strict=True)) > MAX_NEIGHBORHOOD:
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


def find_tiles_near_labels(grid: TileGrid, numbers: Labels, num_channels: int, reach: Extents, threads: int | None) -> Bool:
    """Return the tiles where a label may take part, (channels, *tiles): those with voxels within reach of it, and few others.

    The numbers, (*grid) C-contiguous, are the channel of each voxel's label.
    """
    near = np.zeros((num_channels, *grid.counts), np.bool_)
    grid.engine(threads).mark_near(numbers, reach, near.view(np.uint8))
    return near


class OutsideLogits:
    """The logits over the temperature, and their softmax, at the voxels that a mask leaves out."""

    def __init__(self, source: LabelMapChannels, mask: Bool, num_labels: int, temperature: float, threads: int | None) -> None:
        """Keep the parts; the mask has three axes, and is True where the model applies."""
        self._source = source
        self._outside = ~mask
        self._num_labels = num_labels
        self._temperature = np.float32(temperature)
        self._threads = threads
        self._sums: dict[float, Float32] = {}

    def write(self, label: int, planes: slice, to: Float32, *, output_temperature: float | None) -> None:
        """Write a label's probabilities at the voxels outside the mask into planes; without an output temperature its logits."""
        outside = self._outside[planes]
        if not outside.any():
            return
        values = self._source.planes(planes.start, planes.stop).channel(label)[outside].astype(np.float32) / self._temperature
        if output_temperature is None:
            to[outside] = values
        else:
            to[outside] = np.exp(values / np.float32(output_temperature) - self._log_sums(output_temperature)[planes][outside])

    def _log_sums(self, output_temperature: float) -> Float32:
        """Return what `_sum` does, once for each output temperature."""
        if output_temperature not in self._sums:
            self._sums[output_temperature] = self._sum(self._temperature * np.float32(output_temperature))
        return self._sums[output_temperature]

    def _sum(self, temperature: np.float32) -> Float32:
        """Return (*grid), logarithm of the sum of exp(logit / temperature) over the labels; anything inside the mask."""
        grid = TileGrid.of(self._outside.shape)
        source, engine = self._source, grid.engine(self._threads)
        near = find_tiles_near_labels(grid, source.numbers, self._num_labels, source.reach, self._threads)
        near &= grid.reduced(np.add, self._outside, np.int64) > 0
        # Relative to a voxel's own label, whose logit is the largest; labels that are not near add as much as an absent one.
        absent = np.exp((np.float32(ABSENT_LOGIT) - np.float32(CONFIDENCE)) / temperature)
        sums = np.full((grid.num_tiles, math.prod(TILE)), np.float32(self._num_labels) * absent, np.float32)
        for label in range(self._num_labels):
            tiles = np.flatnonzero(near[label])
            if len(tiles):
                values = np.empty((len(tiles), math.prod(TILE)), np.float32)
                source.fill_entries(engine, label, tiles, np.arange(len(tiles)), values)
                sums[tiles] += np.exp((values - np.float32(CONFIDENCE)) / temperature) - absent
        everywhere = np.arange(grid.num_tiles)
        return grid.spread(everywhere, np.float32(CONFIDENCE) / temperature + np.log(sums), np.float32(0.0))
