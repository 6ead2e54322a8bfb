"""The voxels of a file to be written, asked for piece by piece in the order that the format needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import GridMismatchError
from crfrefine.io.cuts import MOST_BYTES, cuts
from crfrefine.io.decode import as_bytes
from crfrefine.io.streams import BLOCK_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.segments import Segment

ChannelPiece = Callable[[int, slice], "NDArray[Any]"]
"""From the number of a channel and planes of the grid to their values, (planes, [y,] x)."""


@dataclass(frozen=True)
class Content:
    """Voxels to write.

    Attributes:
        path: the file, for errors.
        num_channels: of a label map: None.
        grid_shape: ([z,] y, x).
        dtype: of the voxels in the file: uint8, uint16 or float32.
        piece: called for every channel (0 of a label map) and all planes, in the order of the file; converted to `dtype`.
        most_bytes: asked for at once, unless a plane has more.
        segments: of a label map, sorted by label; empty if the format holds none.
        is_refined: whether the labels were computed here; else they are those of another file.
    """

    path: Path
    num_channels: int | None
    grid_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    piece: ChannelPiece
    most_bytes: int = MOST_BYTES
    segments: tuple[Segment, ...] = ()
    is_refined: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """([z,] y, x), or (channels, [z,] y, x)."""
        return self.grid_shape if self.num_channels is None else (self.num_channels, *self.grid_shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all voxels, not compressed."""
        return int(np.prod(np.array(self.shape, object))) * self.dtype.itemsize

    def one_after_the_other(self) -> Iterator[memoryview]:
        """Yield the bytes of one channel after the other, in blocks of BLOCK_BYTES; only the last one may be shorter."""
        return _in_blocks(as_bytes(np.ascontiguousarray(self._take(channels.start, planes))) for channels, planes in self._cuts(True))

    def together(self) -> Iterator[memoryview]:
        """Yield the bytes with the channels of a voxel together, in blocks as `one_after_the_other`."""
        return self.one_after_the_other() if self.num_channels is None else _in_blocks(map(as_bytes, self._interleaved(self.num_channels)))

    def _interleaved(self, num_channels: int) -> Iterator[NDArray[Any]]:
        for _, planes in self._cuts(False):
            values = np.empty((planes.stop - planes.start, *self.grid_shape[1:], num_channels), self.dtype)
            for channel in range(num_channels):
                values[..., channel] = self._take(channel, planes)
            yield values

    def _cuts(self, by_channel: bool) -> Iterator[tuple[slice, slice]]:
        return cuts((self.num_channels or 1, *self.grid_shape), self.dtype.itemsize, self.most_bytes, by_channel=by_channel)

    def _take(self, channel: int, planes: slice) -> NDArray[Any]:
        values = np.asarray(self.piece(channel, planes))
        expected = (planes.stop - planes.start, *self.grid_shape[1:])
        if values.shape != expected:
            raise GridMismatchError(
                f"{self.path}: cannot write planes {planes.start} to {planes.stop - 1} of channel {channel}: expected an array of shape "
                f"{expected}, found {values.shape}"
            )
        return values.astype(self.dtype, copy=False)


def _in_blocks(parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield bytes in blocks of one size, which decide about the compressed bytes: these must not depend on the pieces."""
    rest = bytearray()
    for part in parts:
        start = min(BLOCK_BYTES - len(rest), len(part)) if rest else 0
        rest += part[:start]
        if len(rest) == BLOCK_BYTES:
            yield memoryview(rest)
            rest = bytearray()
        stop = start + (len(part) - start) // BLOCK_BYTES * BLOCK_BYTES
        for block in range(start, stop, BLOCK_BYTES):
            yield part[block : block + BLOCK_BYTES]
        rest += part[stop:]
    if rest:
        yield memoryview(rest)
