"""Bytes read and written block by block, deflated or not, and voxels decoded and checked from them, never a file at once."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.limits import SMALL, format_size, memory_limit, require_memory
from crfrefine.errors import CapacityError, InputError, UnsupportedFormatError

# One deflated byte holds 1032 at most: a file that promises more is damaged, and must not make us allocate memory for it.
MAX_RATIO = 1040
INPUT_BYTES = 1 << 18  # Read from disk at once.
BLOCK_BYTES = 1 << 20  # Decoded at once: fits into a second-level cache.
COMPRESSION_LEVEL = 2  # From 0 to 3; makes label maps smaller than 3 does, in a tenth of the time or less.
GZIP_MAGIC = b"\x1f\x8b"
GZIP_SUFFIXES = (".gz", ".mgz")
START_BYTES = 4096  # Enough to recognize a format.


class ByteReader(Protocol):
    """A stream of bytes that is read once, from its start."""

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the stream."""
        ...


class BlockReader:
    """Blocks of bytes as one stream; each is made when it is needed."""

    def __init__(self, blocks: Generator[bytes | memoryview, None, None]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the stream."""
        parts = []
        while size > 0:
            if not self._rest:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._rest = memoryview(block)
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)


class Inflater:
    """Inflate "gzip" (one or several members), "zlib" or "deflate" from a file's position on, checking length and checksum."""

    def __init__(self, file: BinaryIO, path: Path, container: str) -> None:
        from isal import igzip_lib  # Looking at a file's name does not need it.

        self._library: Any = igzip_lib
        self._flag = {"gzip": igzip_lib.DECOMP_GZIP, "zlib": igzip_lib.DECOMP_ZLIB, "deflate": igzip_lib.DECOMP_DEFLATE}[container]
        self._has_members = container == "gzip"
        self._file, self._path = file, path
        self._member: Any = igzip_lib.IgzipDecompressor(flag=self._flag)
        self._pending = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end; raise UnsupportedFormatError if the data are damaged or cut off."""
        parts: list[bytes] = []
        while size > 0 and not self._ended:
            if self._member.eof:
                # Another member may follow; zeros are padding that some tools write.
                rest = (self._pending or self._file.read(INPUT_BYTES)) if self._has_members else b""
                self._pending, self._ended = rest.lstrip(b"\0"), not rest
                if self._pending:
                    self._member = self._library.IgzipDecompressor(flag=self._flag)
                continue
            compressed = b""
            if self._member.needs_input:
                compressed, self._pending = self._pending or self._file.read(INPUT_BYTES), b""
                if not compressed:
                    raise UnsupportedFormatError(
                        f"{self._path}: the compressed data end too early; the file is cut off, copy or export it again"
                    )
            try:
                parts.append(self._member.decompress(compressed, size))
            except self._library.IsalError as error:
                raise UnsupportedFormatError(f"{self._path}: damaged compressed data ({error}); copy or export the file again") from None
            size -= len(parts[-1])
            if self._member.eof and self._has_members:
                self._pending = self._member.unused_data
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_bytes(path: Path, container: str, offset: int = 0) -> Iterator[ByteReader]:
    """Open a file at an offset for reading; the container is "raw", "gzip", "zlib" (or gzip) or "deflate"."""
    # Raises UnsupportedFormatError if the file is not compressed as it should be, InputError if the
    # system refuses to read it.
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if container == "raw":
                yield file
                return
            magic = file.read(2)
            if container == "zlib" and magic == GZIP_MAGIC:
                container = "gzip"
            elif container == "gzip" and magic != GZIP_MAGIC:
                raise UnsupportedFormatError(f"{path}: the file is not compressed with gzip, although its name or header says so")
            file.seek(offset)
            yield Inflater(file, path, container)
    except OSError as error:
        raise cannot_read(path, error) from error


def cut_off(path: Path, promised: str, found: str) -> UnsupportedFormatError:
    """Return the error of a file that is shorter than its header promises, such as "12 bytes" where "it holds 9"."""
    return UnsupportedFormatError(f"{path}: the file is cut off: its header promises {promised}, {found}; copy or export it again")


def cannot_read(path: Path, error: OSError) -> InputError:
    """Return the error to raise where the operating system refuses to read a file."""
    return InputError(f"{path}: cannot be read: {error.strerror or error}")


def read_start(path: Path) -> bytes:
    """Return the first bytes of a regular file, b"" for anything else: bytes taken from a pipe would be missing later."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb", buffering=0) as file:
            return file.read(START_BYTES)
    except (OSError, ValueError):  # Opening it for reading reports the error.
        return b""


def inflated(start: bytes) -> bytes:
    """Return the first uncompressed bytes of a gzip file; b"" if it is not gzip."""
    try:
        return zlib.decompressobj(31).decompress(start, START_BYTES) if start.startswith(GZIP_MAGIC) else b""
    except zlib.error:
        return b""


def skip(reader: ByteReader, num_bytes: int = sys.maxsize) -> None:
    """Read on by this many bytes, or to the end, where the checksum of compressed data is."""
    while num_bytes > 0 and (block := reader.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(block)


def write_gzip(file: BinaryIO, parts: Iterable[bytes | memoryview], threads: int) -> None:
    """Write one gzip member without time or name: the same data give the same bytes, with any number of threads."""
    from isal import igzip_threaded

    threaded: Any = igzip_threaded
    with threaded.open(file, "wb", compresslevel=COMPRESSION_LEVEL, threads=max(threads, 1), block_size=BLOCK_BYTES) as stream:
        for part in parts:
            stream.write(part)


def write_zlib(file: BinaryIO, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts as one zlib stream, on one thread; return its length in bytes."""
    from isal import isal_zlib

    deflater: Any = isal_zlib.compressobj(COMPRESSION_LEVEL, wbits=15)
    num_bytes = sum(file.write(deflater.compress(part)) for part in parts)
    return num_bytes + file.write(deflater.flush())


# ---- Voxels


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

    Values that are NaN or infinite are counted in `num_bad`, and reported by `finish`: damage is the
    likelier reason for them, and the checksum at the end of compressed data tells. `shape` is
    (channels, [z,] y, x) of the whole volume; if `is_by_channel`, one channel follows the other.
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
        """Fill an array with the next values of the stream, scaled; raise UnsupportedFormatError if it ends too early."""
        # The values are (channels, planes, [y,] x) C-contiguous, float32 or the stream's
        # `kept_type`: the whole volume, planes of one channel or planes of all, whichever come
        # next; the first ones are given by number.
        stream, suspicious = self._stream, False
        for target in self._targets(values):
            data = stream.reader.read(target.size * stream.dtype.itemsize)
            self._num_bytes += len(data)
            if len(data) < target.size * stream.dtype.itemsize:
                where = ""
                if self.is_by_channel and self.shape[0] > 1:
                    channel = self._num_bytes // (math.prod(self.shape[1:]) * stream.dtype.itemsize)
                    where = f", which end in channel {channel} of 0 to {self.shape[0] - 1}"
                promised = f"{math.prod(self.shape) * stream.dtype.itemsize} bytes of voxels"
                raise cut_off(stream.path, promised, f"it holds {self._num_bytes}{where}")
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

    def finish(self) -> None:
        """Read the rest of the file; raise UnsupportedFormatError for a wrong checksum, InputError for bad values."""
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
