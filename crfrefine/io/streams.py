"""Bytes read and written block by block, deflated or not: no file is held in memory as a whole."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from crfrefine.errors import InputError, UnsupportedFormatError

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
    """Open a file for reading.

    Args:
        path: the file.
        container: "raw", "gzip", "zlib" (gzip is accepted) or "deflate".
        offset: bytes to skip in the file, before the container begins.

    Raises:
        UnsupportedFormatError: not compressed although it should be.
        InputError: the file cannot be opened or read.
    """
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
