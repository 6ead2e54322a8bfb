"""The pieces of a volume, consecutive planes of one channel or of all, and the voxels of a file to be written, asked for in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import GridMismatchError
from crfrefine.io.decode import as_bytes
from crfrefine.io.streams import BLOCK_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.segments import Segment

MAX_BYTES = 16 << 20
"""Bytes of a piece, if a plane of it is not larger."""

ChannelPiece = Callable[[int, slice], "NDArray[Any]"]
"""From the number of a channel and planes of the grid to their values, (planes, [y,] x)."""


@dataclass(frozen=True)
class Content:
    """Voxels to write."""

    path: Path  # the file
    kind: str  # "labels", "logits" or "probabilities"
    num_channels: int | None  # of a label map: None
    grid_shape: tuple[int, ...]  # ([z,] y, x)
    dtype: np.dtype[Any]  # of the voxels in the file: uint8, uint16, float32, or those of a converted image
    piece: ChannelPiece  # called for every channel (0 of a label map) and all planes, in the order of the file; converted to `dtype`
    most_bytes: int = MAX_BYTES  # asked for at once, unless a plane has more
    voxel_files: tuple[Path, ...] = ()  # the file beside the header that gets the voxels; none if they are in the same file
    segments: tuple[Segment, ...] = ()  # of a label map; formats without names ignore them

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
        pieces = cuts((self.num_channels or 1, *self.grid_shape), self.dtype.itemsize, self.most_bytes, by_channel=True)
        return _in_blocks(as_bytes(np.ascontiguousarray(self._take(channels.start, planes))) for channels, planes in pieces)

    def together(self) -> Iterator[memoryview]:
        """Yield the bytes with the channels of a voxel together, in blocks as `one_after_the_other`."""
        return self.one_after_the_other() if self.num_channels is None else _in_blocks(map(as_bytes, self._interleaved(self.num_channels)))

    def _interleaved(self, num_channels: int) -> Iterator[NDArray[Any]]:
        for _, planes in cuts((num_channels, *self.grid_shape), self.dtype.itemsize, self.most_bytes, by_channel=False):
            values = np.empty((planes.stop - planes.start, *self.grid_shape[1:], num_channels), self.dtype)
            for channel in range(num_channels):
                values[..., channel] = self._take(channel, planes)
            yield values

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


def cuts(shape: tuple[int, ...], itemsize: int, most_bytes: int, *, by_channel: bool) -> Iterator[tuple[slice, slice]]:
    """Yield channels and planes of pieces of a (channels, [z,] y, x) array: of one channel each, or of all; at least one plane."""
    num_channels, num_planes = shape[:2]
    most_planes = max(most_bytes // (math.prod(shape[2:]) * itemsize * (1 if by_channel else num_channels)), 1)
    num_pieces = -(-num_planes // most_planes)
    edges = [num_planes * piece // num_pieces for piece in range(num_pieces + 1)]
    for channels in [slice(i, i + 1) for i in range(num_channels)] if by_channel else [slice(0, num_channels)]:
        yield from ((channels, slice(start, stop)) for start, stop in pairwise(edges))
