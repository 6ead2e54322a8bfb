"""The voxels of a file as a stream, and their conversion to an array: the same for all formats.

They are converted block by block while they are in the processor's cache, and checked for NaN and infinity.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import SEEK_CUR, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.memory import SMALL, format_size, memory_limit, require_memory
from crfrefine.errors import CapacityError, InputError
from crfrefine.io.streams import BLOCK_BYTES, ByteReader, cut_off

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_VALUES = BLOCK_BYTES // 4
_MIN_RUN = 1024  # Values of one channel that are worth a separate read.
_FLOAT32 = np.dtype(np.float32)
_KEPT = frozenset(map(np.dtype, ("float16", "float32", "int8", "uint8", "int16", "uint16")))


@dataclass(frozen=True)
class VoxelStream:
    """The voxels of an open file."""

    reader: ByteReader  # begins at the first value
    dtype: np.dtype[Any]  # of the values in the stream, with its byte order
    path: Path  # for errors
    finish: Callable[[], None]  # reads the rest of the file and compares its checksum, if it has one
    slope: float = 1.0  # value = stored * slope + intercept
    intercept: float = 0.0  # see `slope`
    # Values of one channel side by side in the stream before the next channel begins: 1 if the channels of a voxel
    # are together; None if one channel follows the other.
    inner: int | None = None

    @property
    def kept_type(self) -> np.dtype[Any]:
        """The stored type in the machine's byte order, if it has at most 16 bits or is float32, and no scaling; else float32."""
        plain = self.dtype.newbyteorder("=")
        return plain if plain in _KEPT and (self.slope, self.intercept) == (1.0, 0.0) else _FLOAT32


class Decoder:
    """Decodes the voxels of a stream into one array after the other, in the order of the stream.

    Values that are NaN or infinite are counted, and reported by `finish`: damage is the likelier reason for them, and the
    checksum at the end of compressed data tells.

    Attributes:
        shape: (channels, [z,] y, x) of the whole volume.
        num_bad: values so far that are NaN or infinite.
        is_by_channel: all voxels of a channel come before those of the next one; else, planes of all channels come together.
    """

    def __init__(self, stream: VoxelStream, shape: tuple[int, ...]) -> None:
        self._stream, self.shape = stream, shape
        self._inner = stream.inner or math.prod(shape[1:])
        self.is_by_channel = shape[0] == 1 or self._inner * shape[0] == math.prod(shape)
        self._is_surely_finite = False
        if stream.dtype.kind in "iu":  # Finite in float32, unless the scaling is immense.
            limits = np.iinfo(stream.dtype)
            largest = max(abs(float(limits.min)), float(limits.max)) * abs(stream.slope) + abs(stream.intercept)
            self._is_surely_finite = largest < float(np.finfo(np.float32).max)
        self._num_bytes = 0
        self.num_bad = 0
        self._first_bad: tuple[tuple[int, ...], str] | None = None

    def fill(self, values: NDArray[Any], first_channel: int = 0, first_plane: int = 0) -> None:
        """Fill an array with the next values of the stream, scaled; raise UnsupportedFormatError if it ends too early.

        Args:
            values: (channels, planes, [y,] x) C-contiguous: the whole volume, planes of one channel or planes of all channels,
                whichever come next. Float32, or the stream's `kept_type`.
            first_channel: number of the first channel of the array.
            first_plane: number of its first plane.
        """
        stream, suspicious = self._stream, False
        for target in self._targets(values):
            data = self._read(target.size * stream.dtype.itemsize)
            stored = np.frombuffer(data, stream.dtype).reshape(target.shape)
            is_scaled = (stream.slope, stream.intercept) != (1.0, 0.0)
            # 16-bit integers are exact in float32; wider ones are scaled in float64, else an intercept would cancel digits away.
            is_wide = is_scaled and stored.dtype.itemsize > 2
            scaled = np.empty(stored.shape, np.float64) if is_wide else target
            with np.errstate(over="ignore", invalid="ignore"):
                scaled[...] = stored
                if is_scaled:
                    scaled *= scaled.dtype.type(stream.slope)
                    if stream.intercept != 0.0:
                        scaled += scaled.dtype.type(stream.intercept)
                if is_wide:
                    target[...] = scaled
                # A sum is finite only if all its terms are; that of finite terms may overflow, so `_count_bad` looks again.
                suspicious = suspicious or not (self._is_surely_finite or np.isfinite(target.sum(dtype=np.float32)))
        if suspicious:
            self._count_bad(values, first_channel, first_plane)

    def skip(self, num_planes: int) -> None:
        """Go past the next planes, of one channel or of all, whichever come next; their values are not checked."""
        num_channels = 1 if self.is_by_channel else self.shape[0]
        missing = num_planes * num_channels * math.prod(self.shape[2:]) * self._stream.dtype.itemsize
        if isinstance(self._stream.reader, FileIO):  # Not compressed: that it is long enough was checked with the header.
            self._stream.reader.seek(missing, SEEK_CUR)
            self._num_bytes += missing
            return
        while missing:
            missing -= len(self._read(min(missing, BLOCK_BYTES)))

    def finish(self) -> None:
        """Read the rest of the file.

        Raises:
            UnsupportedFormatError: the checksum is wrong.
            InputError: a value of the volume is NaN or infinite.
        """
        self._stream.finish()
        if self._first_bad is None:
            return
        (channel, *place), kind = self._first_bad
        voxel = ", ".join(str(i) for i in reversed(place)) + ")" + (f" of channel {channel}" if self.shape[0] > 1 else "")
        raise InputError(
            f"{self._stream.path}: {self.num_bad} of {math.prod(self.shape)} values are NaN or infinite; "
            f"the first one ({kind}) is at voxel ({voxel}\n"
            "  Export finite values, or replace them before refining."
        )

    def _read(self, size: int) -> bytes:
        data = self._stream.reader.read(size)
        self._num_bytes += len(data)
        if len(data) == size:
            return data
        itemsize, where = self._stream.dtype.itemsize, ""
        if self.is_by_channel and self.shape[0] > 1:
            channel = self._num_bytes // (math.prod(self.shape[1:]) * itemsize)
            where = f", which end in channel {channel} of 0 to {self.shape[0] - 1}"
        promised = f"{math.prod(self.shape) * itemsize} bytes of voxels"
        raise cut_off(self._stream.path, promised, f"it holds {self._num_bytes}{where}")

    def _targets(self, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yield views of an array in the order of the stream, of about a block each."""
        size = _BLOCK_VALUES
        if self.is_by_channel:
            parts = [values.reshape(-1)]
        else:
            num_channels, inner = values.shape[0], self._inner
            # The repeating unit of the stream: single values, or `inner` of each channel.
            rows = values.reshape(num_channels, -1, inner).transpose(1, 0, 2)
            num_rows = max(size // (num_channels * inner), 1)
            if num_rows == 1 and inner >= _MIN_RUN:
                parts = [run for row in rows for run in row]
            else:
                # numpy copies two axes twice as fast as three with one of length 1.
                parts, size = [rows[:, :, 0] if inner == 1 else rows], num_rows
        for part in parts:
            for start in range(0, len(part), size):
                yield part[start : start + size]

    def _count_bad(self, values: NDArray[Any], first_channel: int, first_plane: int) -> None:
        for number, channel in enumerate(values, first_channel):
            bad = ~np.isfinite(channel)
            num_bad = int(np.count_nonzero(bad))
            if not num_bad:
                continue
            self.num_bad += num_bad
            plane, *rest = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            kind = "NaN" if np.isnan(channel[(plane, *rest)]) else "infinite"
            bad_voxel = (number, first_plane + plane, *rest), kind
            self._first_bad = bad_voxel if self._first_bad is None else min(self._first_bad, bad_voxel)


def allocate_array(shape: tuple[int, ...], path: Path, dtype: np.dtype[Any] = _FLOAT32) -> NDArray[Any]:
    """Return an uninitialized array for the values of a file; raise CapacityError if it does not fit."""
    size = dtype.itemsize * math.prod(shape)
    if size > SMALL:
        require_memory(size, f"{path}: its voxels, read as {dtype.name}, take", memory_limit())
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError):
        raise CapacityError(f"{path}: its voxels take {format_size(size)} as {dtype.name}, more than the available memory") from None


def as_bytes(values: NDArray[Any]) -> memoryview:
    """Return the memory of a C-contiguous array as bytes, little-endian like everything that is written here."""
    little = values if values.dtype.byteorder != ">" and sys.byteorder == "little" else values.astype(values.dtype.newbyteorder("<"))
    return memoryview(little.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
