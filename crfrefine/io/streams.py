"""Bytes read and written block by block, deflated or not, and voxels decoded from them.

A file is never in memory at once.
"""

from __future__ import annotations

import math
import os
import stat
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from crfrefine.base.array_types import Array, Shape
from crfrefine.base.limits import SMALL, require_memory
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError

# One deflated byte holds 1032 at most: a file that promises more is damaged, and must not make us
# allocate memory for it.
MAX_RATIO = 1040
INPUT_BYTES = 1 << 18  # Read from disk at once.
BLOCK_BYTES = 1 << 20  # Decoded at once: fits into a second-level cache.
# From 0 to 3; makes label maps smaller than 3 does, in a tenth of the time or less.
COMPRESSION_LEVEL = 2
GZIP_MAGIC = b"\x1f\x8b"
START_BYTES = 4096  # Enough to recognize a format.


class BlockReader:
    """Blocks of bytes as one stream, made when needed; the last may compare a checksum."""

    def __init__(self, blocks: Iterator[bytes | memoryview]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")  # of the last block
        self._num_read = 0  # bytes

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
            self._num_read += len(parts[-1])
        return b"".join(parts)

    def tell(self) -> int:
        """Return how many bytes have been read."""
        return self._num_read


# Bytes that are read once, from their start.
ByteReader: TypeAlias = FileIO | BlockReader


def inflate(file: BinaryIO, path: Path, container: str) -> Generator[bytes]:
    """Inflate "gzip" (all members), "zlib" or "deflate" from a position; raises for damage."""
    from isal import igzip_lib  # Looking at a file's name does not need it.

    flag = getattr(igzip_lib, f"DECOMP_{container.upper()}")
    compressed = file.read(INPUT_BYTES)
    size = START_BYTES
    while compressed:
        member = igzip_lib.IgzipDecompressor(flag=flag)
        while not member.eof:
            if member.needs_input and not compressed:
                compressed = file.read(INPUT_BYTES)
                if not compressed:
                    raise UnsupportedFormatError(
                        f"{path}: the compressed data end too early; the file is cut off, "
                        "copy or export it again"
                    )
            try:
                block = member.decompress(compressed, size)
            except igzip_lib.IsalError as error:  # type: ignore[misc]
                raise UnsupportedFormatError(
                    f"{path}: damaged compressed data ({error}); copy or export the file again"
                ) from None
            compressed = b""
            size = BLOCK_BYTES
            yield block
        if container != "gzip":
            return
        # Some tools write zeros between members and behind the last one.
        compressed = member.unused_data.lstrip(b"\0")
        while not compressed:
            data = file.read(INPUT_BYTES)
            if not data:
                return
            compressed = data.lstrip(b"\0")


def compared(reader: ByteReader, path: Path, checksum: tuple[int, int]) -> Generator[bytes]:
    """Yield so many bytes, and compare their CRC-32 with the expected one at their end."""
    from isal import isal_zlib

    remaining, expected = checksum
    found = 0
    size = START_BYTES
    while data := reader.read(min(size, remaining)):
        size = BLOCK_BYTES
        remaining -= len(data)
        found = isal_zlib.crc32(data, found)
        yield data
    if found != expected:
        raise UnsupportedFormatError(
            f"{path}: damaged: the checksum is wrong; copy or export it again"
        )


@contextmanager
def open_bytes(
    path: Path,
    container: str,
    start: int = 0,
    offset: int = 0,
    checksum: tuple[int, int] | None = None,
) -> Iterator[ByteReader]:
    """Open a file for reading: `start` bytes from its begin, and `offset` after decompression.

    The container is "raw", "gzip", "zlib" (or gzip), "deflate", or "any": gzip if the first bytes
    say so, else raw. A checksum is as of `VoxelSource`. Raises OSError, or UnsupportedFormatError
    if the file is not compressed as it should be.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        magic = b"" if container == "raw" else file.read(2)
        if container == "any" and magic != GZIP_MAGIC:
            container = "raw"
        elif container in ("zlib", "any") and magic == GZIP_MAGIC:
            container = "gzip"
        elif container == "gzip" and magic != GZIP_MAGIC:
            raise UnsupportedFormatError(
                f"{path}: the file is not compressed with gzip, although its name or header says so"
            )
        file.seek(start)
        reader: ByteReader = file
        if container != "raw":
            reader = BlockReader(inflate(file, path, container))
        if checksum is not None:
            reader = BlockReader(compared(reader, path, checksum))
        if isinstance(reader, FileIO):
            reader.seek(offset, os.SEEK_CUR)
            offset = 0
        while offset > 0 and (block := reader.read(min(offset, BLOCK_BYTES))):
            offset -= len(block)
        yield reader


def cut_off(path: Path, promised: str, found: str) -> UnsupportedFormatError:
    """Return the error for a file that is shorter, "it holds 9", than its header promises."""
    return UnsupportedFormatError(
        f"{path}: the file is cut off: its header promises {promised}, {found}; "
        "copy or export it again"
    )


def read_start(path: Path) -> bytes:
    """Return the first bytes of a regular file; a pipe would lose them, and gives b""."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb", buffering=0) as file:
            return file.read(START_BYTES)
    except (OSError, ValueError):  # Opening it for reading reports the error.
        return b""


def is_named_gzip(path: Path) -> bool:
    """Return whether the name of a file says that it is compressed with gzip as a whole."""
    return path.name.lower().endswith((".gz", ".mgz"))


def inflated(start: bytes) -> bytes:
    """Return the first bytes of a file without gzip; the bytes themselves if it is not gzip."""
    unpacked = b""
    if start.startswith(GZIP_MAGIC):
        with suppress(zlib.error):
            unpacked = zlib.decompressobj(31).decompress(start, START_BYTES)
    return unpacked or start


def write_gzip(file: BinaryIO, parts: Iterable[bytes | memoryview], threads: int) -> None:
    """Write one gzip member: the same data give the same bytes, with any number of threads."""
    from isal import igzip_threaded

    level = COMPRESSION_LEVEL
    threads = max(threads, 1)
    with igzip_threaded.open(file, "wb", level, threads=threads, block_size=BLOCK_BYTES) as stream:
        stream.writelines(parts)


def write_zlib(file: BinaryIO, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts as one zlib stream, on one thread; return its length in bytes."""
    from isal import isal_zlib

    deflater = isal_zlib.compressobj(COMPRESSION_LEVEL, wbits=15)
    num_bytes = sum(file.write(deflater.compress(part)) for part in parts)
    return num_bytes + file.write(deflater.flush())


FLOAT32 = np.dtype(np.float32)
_KEPT = frozenset(map(np.dtype, ("float16", "float32", "int8", "uint8", "int16", "uint16")))


class VoxelSource(NamedTuple):
    """Voxels in one file."""

    path: Path  # the file with the voxels, which may hold the header, too
    encoding: str  # "raw", "zlib", "gzip" or "deflate"
    dtype: np.dtype[Any]  # as stored, with its byte order
    # Values of one channel that are side by side: 1 if the channels of a voxel are together; None
    # means that one channel follows the other.
    inner: int | None = None
    start: int = 0  # bytes before the stored data in the file; -1 means that raw voxels end it
    offset: int = 0  # bytes before the first voxel after decompression
    slope: float = 1.0  # value = stored * slope + intercept
    intercept: float = 0.0  # see `slope`
    # of the bytes after decompression, if nothing in them tells: their number and CRC-32
    checksum: tuple[int, int] | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether the values are others than the stored ones."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def kept_type(self) -> np.dtype[Any]:
        """The stored type, in the machine's byte order, if that is kept, else float32.

        It is kept of at most 16 bits, and of float32, without a scaling.
        """
        plain = self.dtype.newbyteorder("=")
        if plain in _KEPT and not self.is_scaled:
            return plain
        return FLOAT32

    def in_file(self, num_bytes: int, header: Path) -> tuple[VoxelSource, int]:
        """Return this place with the start of so many bytes of voxels, and the bytes behind them.

        Behind compressed voxels, none are looked for.
        Raise InputError or UnsupportedFormatError if the file is missing, or shorter than the file
        `header` promises.
        """
        name = shorten(self.path, 400)
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            raise InputError(
                f"{header}: its voxels are missing; expected them in {name}, "
                "put both files into one folder"
            ) from None
        # Reading a pipe could block forever; a device may have no end.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{header}: expected its voxels in {name}, which is not a regular file"
            )

        promised = num_bytes + self.offset
        start = self.start
        if start < 0:
            start = max(status.st_size - promised, 0)
        present = max(status.st_size - start, 0)
        most = present
        surplus = present - promised
        found = f"more than the {present} bytes in it can hold"
        if self.encoding != "raw":
            most = present * MAX_RATIO
            surplus = 0
            found = f"more than the {present} compressed bytes in it can hold"
        if promised > most:
            raise cut_off(self.path, f"{promised} bytes of voxels", found)
        return self._replace(start=start), surplus

    def scaled(self, stored: Array, dtype: type = np.float64) -> Array:
        """Return the values of stored ones, computed in a type of floats."""
        values: Array = stored.astype(dtype)
        values *= dtype(self.slope)
        values += dtype(self.intercept)
        return values


class Decoder:
    """Decodes the voxels of an open file into one array after the other, in the order of the file.

    `reader` begins at the first value, and `shape` is (channels, [z,] y, x) of the whole volume.
    `is_by_channel` says whether one channel follows the other, or there is only one. NaN and
    infinite values are counted in `num_bad`, and reported by `finish`: damage is the likelier
    reason for them, and the checksum at the end of compressed data tells. With `allows_nan`, NaN is
    no error, and `has_nan` says whether there was one.
    """

    def __init__(self, reader: ByteReader, source: VoxelSource, shape: Shape) -> None:
        self._reader = reader
        self._source = source
        self._shape = shape
        self._is_scaled = source.is_scaled
        self._inner = source.inner or math.prod(shape[1:])
        self.is_by_channel = shape[0] == 1 or self._inner == math.prod(shape[1:])
        self.kept_type = source.kept_type
        self._may_be_bad = source.dtype.kind == "f" or self._is_scaled
        self._num_bytes = 0
        self.allows_nan = False
        self.has_nan = False
        self.num_bad = 0
        self._first_bad: tuple[tuple[int, ...], str] | None = None

    def keep_stored_values(self) -> None:
        """Fill arrays with the stored values: unscaled, also NaN and infinity."""
        self.kept_type = self._source.dtype.newbyteorder("=")
        self._is_scaled = False
        self._may_be_bad = False

    def fill(self, values: Array, first_channel: int = 0, first_plane: int = 0) -> None:
        """Fill an array with the next values of the file, scaled.

        The values are (channels, planes, [y,] x) C-contiguous, float32 or `kept_type`: the whole
        volume, or planes of one channel or of all, from the numbers given on. Raise
        UnsupportedFormatError if the file ends too early.
        """
        # A row is the repeating unit of the file: single values, or `inner` of each channel.
        num_rows = BLOCK_BYTES // 4
        rows: Array = values.reshape(-1)
        if not self.is_by_channel:
            rows = values.reshape(len(values), -1, self._inner).transpose(1, 0, 2)
            num_rows = max(num_rows // rows[0].size, 1)
            if self._inner == 1:
                rows = rows[:, :, 0]  # numpy copies two axes twice as fast as three.

        dtype = self._source.dtype
        may_be_bad = False
        for start in range(0, len(rows), num_rows):
            target = rows[start : start + num_rows]
            num_bytes = target.size * dtype.itemsize
            data = self._reader.read(num_bytes)
            self._num_bytes += len(data)
            if len(data) < num_bytes:
                promised = f"{math.prod(self._shape) * dtype.itemsize} bytes of voxels"
                raise cut_off(self._source.path, promised, f"it holds {self._num_bytes}")
            stored = np.frombuffer(data, dtype).reshape(target.shape)
            with np.errstate(over="ignore", invalid="ignore"):
                if self._is_scaled:
                    # 16 bits are exact in float32; for more, an intercept would cancel digits away.
                    wide = np.float32 if dtype.itemsize <= 2 else np.float64
                    stored = self._source.scaled(stored, wide)
                target[...] = stored
                # A sum is finite only if all its terms are; that of finite terms may overflow, so
                # each value is looked at then.
                if self._may_be_bad and not may_be_bad:
                    may_be_bad = not np.isfinite(target.sum(dtype=np.float32))
        if may_be_bad:
            for number, channel in enumerate(values, first_channel):
                bad = ~np.isfinite(channel)
                if self.allows_nan:
                    is_nan = np.isnan(channel)
                    self.has_nan |= bool(is_nan.any())
                    bad &= ~is_nan
                if not bad.any():
                    continue
                self.num_bad += int(np.count_nonzero(bad))
                place = np.unravel_index(int(bad.argmax()), bad.shape)
                plane, *others = (int(index) for index in place)
                kind = "NaN" if np.isnan(channel[place]) else "infinite"
                first = ((number, first_plane + plane, *others), kind)
                if self._first_bad is None or first < self._first_bad:
                    self._first_bad = first

    def finish(self) -> None:
        """Read to the end; raise an error for a wrong checksum, or InputError for bad values."""
        if isinstance(self._reader, BlockReader):
            while self._reader.read(BLOCK_BYTES):
                pass
        if self._first_bad is None:
            return
        (channel, *place), kind = self._first_bad
        voxel = f"({', '.join(str(index) for index in reversed(place))})"
        if self._shape[0] > 1:
            voxel += f" of channel {channel}"
        refused = "infinite" if self.allows_nan else "NaN or infinite"
        raise InputError(
            f"{self._source.path}: {self.num_bad} of {math.prod(self._shape)} values are "
            f"{refused}; the first one ({kind}) is at voxel {voxel}\n"
            "  Export finite values, or replace them before refining."
        )


def allocate_array(shape: Shape, path: Path, dtype: np.dtype[Any] = FLOAT32) -> Array:
    """Return an uninitialized array for the values of a file; raise CapacityError if too large."""
    size = dtype.itemsize * math.prod(shape)
    if size > SMALL:
        require_memory(size, f"{path}: its voxels, read as {dtype.name}, take")
    return np.empty(shape, dtype)
