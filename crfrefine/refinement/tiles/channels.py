"""The channels that a mean field on tiles starts from, as sources of logits at some tiles.

`ChannelSource` is what they have in common; here are those of an array and of a label map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import (
    ABSENT_LOGIT,
    CONFIDENCE,
    Box,
    dilated,
    grown,
    log_shares,
    relative,
)
from crfrefine.base.array_types import Bool, Float32, Labels, Shape
from crfrefine.base.limits import run_all
from crfrefine.refinement.tiles.grid import (
    TILE,
    TILE_VOXELS,
    EntryNumbers,
    LabelSets,
    TileGrid,
    TileNumbers,
    box_between,
)


class ChannelSource(ABC):
    """The channels of a network's output on a grid of tiles."""

    grid: TileGrid
    num_bytes = 0  # of memory that the channels take beside the input of the case

    def ensure(self, domains: Bool) -> None:
        """Make sure that labels can be had in some tiles, (L, *tiles).

        Channels in a file may be read once more for that.
        """
        return  # Channels in memory are there.

    def of_entries(self, sets: LabelSets, threads: int | None, first_tile: int = 0) -> Float32:
        """Return the logits of the labels that take part in tiles, (entries, voxels of a tile).

        The sets may be those of a slab, whose tiles begin with `first_tile`.
        """
        values = np.empty((sets.num_entries, TILE_VOXELS), np.float32)
        engine = self.grid.engine(threads)
        for label, (tiles, entries) in enumerate(sets.entries):
            if len(tiles):
                self.fill_entries(engine, label, tiles + first_tile, entries, values)
        return values

    @abstractmethod
    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """Write a label's logits in some tiles to entries of `out`, (entries, voxels of a tile).

        `engine` has the C++ engine's routines for the tiles of the grid.
        """


class DenseChannels(ChannelSource):
    """Channels in an array, (L, *grid) of up to three grid axes.

    With `is_probability` they are probabilities, whose logarithm is taken.
    """

    def __init__(self, values: Float32, *, is_probability: bool) -> None:
        """Keep the values, or a copy in which the voxels of a row are consecutive."""
        *strides, stride_of_row = values.strides
        size = values.itemsize
        if stride_of_row != size or any(stride % size for stride in strides):
            values = np.ascontiguousarray(values)
        self.grid = TileGrid(values.shape[1:])
        self.values = values.reshape(len(values), *self.grid.shape)
        self.is_probability = is_probability

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        engine.fill_entries(self.values[label], True, tiles, self.is_probability, entries, out)


class BoxedChannels(ChannelSource):
    """Channels that are made for boxes of the grid, a few layers of tiles at a time."""

    num_layers = 1
    threads = 1

    @abstractmethod
    def of_box(self, label: int, box: Box) -> Float32:
        """Return the logits of a label at the voxels of a box."""

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        grid = self.grid
        places = np.stack(np.unravel_index(tiles, grid.counts))
        group_of = places[0] // self.num_layers

        def fill(group: int) -> None:
            is_in_group = group_of == group
            of_group = places[:, is_in_group]
            first = of_group.min(axis=1)
            end = of_group.max(axis=1) + 1
            box = grid.voxels_in(box_between(first, end))
            values = np.ascontiguousarray(self.of_box(label, box))

            part = TileGrid(values.shape)
            in_part = np.ravel_multi_index(tuple(of_group - first[:, None]), part.counts)
            out[entries[is_in_group]] = part.gather(values, in_part, 1)

        jobs = [partial(fill, group) for group in np.unique(group_of)]
        run_all(jobs, self.threads)


# Voxels of a tile and its surroundings up to which each tile is searched for a label by itself.
MAX_NEIGHBORHOOD = 1 << 17


class LabelMapChannels(BoxedChannels):
    """The logits of a label map (`crfrefine.arrays.label_maps`), made where they are asked for.

    They are those of each voxel's own label, or the logarithms of shares in the map of a coarse
    network.
    """

    num_layers = 4

    def __init__(self, numbers: Labels, reach: Shape, sigma: Sequence[float] | None) -> None:
        """Take the channel of each voxel's label, (z, y, x) C-contiguous.

        `reach` are the voxels within which a label takes part, or has a share. `sigma` is the
        result of `share_sigma` along three axes; None means that labels have no shares.
        """
        self.grid = TileGrid(numbers.shape)
        self.numbers = numbers
        self.reach = reach
        self.sigma = sigma

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        size = np.prod(np.array(TILE) + 2 * np.array(self.reach))
        if self.sigma is not None or size > MAX_NEIGHBORHOOD:
            super().fill_entries(engine, label, tiles, entries, out)
            return
        logits = (CONFIDENCE, 0.0, ABSENT_LOGIT)
        engine.fill_labels(self.numbers, label, self.reach, logits, tiles, entries, out)

    def of_box(self, label: int, box: Box) -> Float32:
        """Return the logits of a label at the voxels of a box."""
        if self.sigma is not None:
            return log_shares(self.numbers, label, self.sigma, box)
        around = grown(box, self.reach, self.grid.shape)
        occurs = self.numbers[around] == label
        logits = np.full(occurs.shape, ABSENT_LOGIT, np.float32)
        logits[dilated(occurs, self.reach)] = 0.0
        logits[occurs] = CONFIDENCE
        return logits[relative(box, around)]
