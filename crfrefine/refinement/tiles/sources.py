"""Where the logits of a label in some tiles come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.refinement.tiles.grid import Extents


class ChannelSource(Protocol):
    """The channels of a network's output."""

    is_probability: bool
    """Whether the values are probabilities, whose logarithm is taken."""

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Make sure that labels can be had in some tiles, (L, *tiles), which may take another reading of a file."""
        ...

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """Write a label's logits in some tiles, named by flat numbers, to entries of `out`, (entries, voxels of a tile) float32."""
        ...

    def planes(self, start: int, stop: int) -> ChannelSource:
        """Return the source of some planes of the slowest axis, which begin and end with a tile (or with the grid)."""
        ...


class DenseChannels:
    """Channels in an array: a box of its grid."""

    def __init__(self, values: Float32, box: tuple[slice, ...], *, is_probability: bool = False) -> None:
        """Take (L, *grid) float32 channels of three grid axes, cut to a box."""
        self.values = values
        self.box = box
        self.is_probability = is_probability

    @property
    def shape(self) -> Extents:
        """Voxels along each axis of the box."""
        return tuple(axis.stop - axis.start for axis in self.box)

    def channel(self, label: int) -> Float32:
        """Return a label's values in the box, with consecutive voxels along the last axis."""
        channel: Float32 = self.values[label][self.box]
        rows_are_contiguous = channel.strides[-1] == channel.itemsize and not any(stride % channel.itemsize for stride in channel.strides)
        return channel if rows_are_contiguous else np.ascontiguousarray(channel)

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Do nothing: the whole array is in memory."""

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """Write a label's logits in some tiles to the entries of an array; see `ChannelSource.fill_entries`."""
        engine.fill_entries(self.channel(label), True, tiles, self.is_probability, entries, out)

    def planes(self, start: int, stop: int) -> DenseChannels:
        """Return the source of some planes; see `ChannelSource.planes`."""
        first = self.box[0].start + start
        return DenseChannels(self.values, (slice(first, first + stop - start), *self.box[1:]), is_probability=self.is_probability)
