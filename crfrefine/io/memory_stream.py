"""Voxels that are in memory as a stream: for formats that cannot be decoded in the order of storage, and for parts of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io.allocation import allocate_as
from crfrefine.io.decode import Decoder, as_bytes
from crfrefine.io.voxel_stream import VoxelStream

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader


class _Memory:
    """A reader of bytes in memory."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def read(self, size: int) -> bytes:
        found = self._content[self._position : self._position + size]
        self._position += len(found)
        return found  # type: ignore[return-value]  # Its users need no more than the bytes of a buffer.


def array_stream(values: NDArray[Any], path: Path) -> VoxelStream:
    """Return the stream of an array, ([channels,] [z,] y, x)."""
    dtype = values.dtype.newbyteorder("<") if values.dtype.itemsize > 1 else values.dtype
    return VoxelStream(_Memory(as_bytes(np.ascontiguousarray(values))), dtype, path, lambda: None)


@contextmanager
def open_inset(header: VolumeHeader, part: AbstractContextManager[VoxelStream]) -> Iterator[VoxelStream]:
    """Open a file that stores a part of its grid; voxels outside of the part are 0.

    Args:
        header: with an `inset`.
        part: the voxels of the file itself.
    """
    assert header.inset is not None
    own, offset = header.inset
    with part as stream:
        whole = allocate_as(header.grid_shape[::-1], stream.kept_type, header.path)
        whole.fill(0)
        shape = own.grid_shape[::-1]
        inside = allocate_as((1, *shape), stream.kept_type, header.path)
        decoder = Decoder(stream, inside.shape)
        decoder.fill(inside)
        decoder.finish()
        place = tuple(slice(start, start + size) for start, size in zip(offset[::-1], shape, strict=True))
        assert math.prod(whole[place].shape) == inside.size
        whole[place] = inside[0]
    yield array_stream(whole, header.path)
