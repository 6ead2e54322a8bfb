"""Locate and read voxels that are stored as they are, perhaps compressed or as text: those of most formats."""

from __future__ import annotations

import bz2
import math
import re
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.decode import VoxelStream
from crfrefine.io.streams import BLOCK_BYTES, INPUT_BYTES, MAX_RATIO, BlockReader, ByteReader, cut_off, finish, open_bytes, skip
from crfrefine.io.text_header import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

FROM_THE_END = -1

# The most bytes that one compressed byte can expand to; bzip2: its longest runs.
_MAX_PER_BYTE = {"zlib": MAX_RATIO, "gzip": MAX_RATIO, "bzip2": 1 << 21}


@dataclass(frozen=True)
class VoxelSource:
    """Voxels in one file, or in several of equal length that follow each other."""

    header_path: Path  # the file with the header, which may hold the voxels, too
    files: tuple[Path, ...]  # the files with the voxels
    encoding: str  # "raw", "zlib", "gzip", "bzip2", "text" or "hex"
    dtype: np.dtype[Any]  # as stored, with its byte order
    sizes: tuple[int, ...]  # of all axes, the fastest first, channels included
    inner: int  # values that lie side by side in one channel before the next channel begins; 1 if channels are the fastest axis
    offset: int  # bytes before the voxels in each file; FROM_THE_END if the voxels end the file
    num_lines: int = 0  # lines to skip after the offset
    num_bytes_after: int = 0  # bytes to skip after the lines; they count after decompression
    stored_bytes: int | None = None  # size of the compressed voxels, if the header gives it
    slope: float = 1.0  # value = stored * slope + intercept
    intercept: float = 0.0  # see `slope`

    def check(self) -> None:
        """Raise InputError or UnsupportedFormatError if a file is missing, or shorter than the header promises."""
        num_values = math.prod(self.sizes) // len(self.files)
        needed = num_values * self.dtype.itemsize
        for path in self.files:
            found = max(_size_of(path, self.header_path) - max(self.offset, 0), 0)
            if self.encoding in _MAX_PER_BYTE:
                if self.stored_bytes is not None and self.stored_bytes > found:
                    raise cut_off(path, f"{self.stored_bytes} bytes of voxels", f"it holds {found}")
                promised = needed + self.num_bytes_after
                if promised > found * _MAX_PER_BYTE[self.encoding]:
                    raise cut_off(path, f"{promised} bytes of voxels", f"more than the {found} compressed bytes in it can hold")
                continue
            least = {"text": 2 * num_values - 1, "hex": 2 * needed}.get(self.encoding, needed)
            if least + self.num_bytes_after > found:
                raise cut_off(path, f"{least + self.num_bytes_after} bytes of voxels", f"it holds {found}")

    @contextmanager
    def stream(self) -> Iterator[VoxelStream]:
        """Open the voxels at the first one."""
        dtype = TEXT_DTYPE if self.encoding == "text" else self.dtype
        if len(self.files) > 1:
            with closing(BlockReader(_joined(self, math.prod(self.sizes) // len(self.files) * dtype.itemsize))) as joined:
                yield VoxelStream(joined, dtype, self.header_path, partial(finish, joined), self.dtype, inner=self.inner)
            return
        with self.open(self.files[0]) as reader:
            finish_reading = partial(self.finish, reader)
            scaling = (self.slope, self.intercept)
            yield VoxelStream(reader, dtype, self.files[0], finish_reading, self.dtype, *scaling, inner=self.inner)

    def finish(self, reader: ByteReader) -> None:
        """Read the rest of a file, where the checksum of compressed data is."""
        if self.encoding != "raw":
            finish(reader)

    @contextmanager
    def open(self, path: Path) -> Iterator[ByteReader]:
        """Open one of the files at its first voxel."""
        offset = self.offset
        if offset == FROM_THE_END:
            offset = _size_of(path, self.header_path) - math.prod(self.sizes) // len(self.files) * self.dtype.itemsize
        if self.num_lines:
            with open_bytes(path, "raw", offset) as text:
                offset = _after_lines(text, offset, self.num_lines, path)
        rarely = BLOCKS.get(self.encoding)
        if rarely is None and self.encoding == "raw":
            offset += self.num_bytes_after
        with open_bytes(path, "raw" if rarely is not None else self.encoding, offset) as stored:
            reader: ByteReader = stored if rarely is None else BlockReader(rarely(stored, path, self.dtype))
            if self.encoding != "raw":
                # Bytes count after decompression; for voxels as text, they are skipped in the file.
                skip(stored if self.encoding in ("text", "hex") else reader, self.num_bytes_after)
            yield reader


def _size_of(path: Path, header_path: Path) -> int:
    """Return the size of a file with voxels in bytes; raise InputError if it is missing or not a regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise InputError(
            f"{header_path}: its voxels are missing; expected them in {shown(str(path), 400)}, put both files into one folder"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        # Reading a pipe could block forever; a device may have no end.
        raise InputError(f"{header_path}: expected its voxels in {shown(str(path), 400)}, which is not a regular file")
    return status.st_size


def _joined(source: VoxelSource, bytes_per_file: int) -> Generator[bytes, None, None]:
    """Yield the voxels of several files, one after the other; each file is read to its end, where the checksum of compressed data is."""
    for path in source.files:
        missing = bytes_per_file
        with source.open(path) as reader:
            while missing:
                block = reader.read(min(missing, BLOCK_BYTES))
                if not block:
                    raise cut_off(path, f"{bytes_per_file} bytes of voxels", f"it holds {bytes_per_file - missing}")
                missing -= len(block)
                yield block
            source.finish(reader)


def _after_lines(text: ByteReader, offset: int, num_lines: int, path: Path) -> int:
    """Return the offset of the line after `num_lines` lines, counted from an offset in the file."""
    while block := text.read(INPUT_BYTES):
        breaks = block.count(b"\n")
        if breaks >= num_lines:
            position = -1
            for _ in range(num_lines):
                position = block.index(b"\n", position + 1)
            return offset + position + 1
        num_lines -= breaks
        offset += len(block)
    raise UnsupportedFormatError(f"{path}: the file is cut off: its header skips more lines than there are; copy or export it again")


# Rare encodings of voxels: numbers as text, hexadecimal digits, bzip2. Each is read in blocks, in bounded memory.

TEXT_DTYPE = np.dtype(np.float64)
"""The type of numbers that were text, whatever the type of the voxels."""

_MAX_WORD = 64
_TO_SPACE = bytes.maketrans(b"\t\r\n\v\f", b"     ")
_NUMBERS = re.compile(rb"[-+0-9.eEnaifNAIF ]*")

_Blocks = Generator[bytes, None, None]


def _text_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield numbers as text, separated by white space or by commas and white space, as the bytes of TEXT_DTYPE."""
    rest, block = b"", b" "
    while block:
        block = reader.read(INPUT_BYTES)
        text = rest + block.translate(_TO_SPACE)
        # The number after the last space may continue in the next block.
        cut = text.rfind(b" ") + 1 if block else len(text)
        text, rest = text[:cut].replace(b", ", b" "), text[cut:]
        yield _numbers(text, rest, path, dtype).tobytes()


def _numbers(text: bytes, rest: bytes, path: Path, dtype: np.dtype[Any]) -> NDArray[np.float64]:
    words, wrong, values = text.split(), "something that is not a number", np.empty(0, TEXT_DTYPE)
    is_sane = max(map(len, words), default=0) <= _MAX_WORD and len(rest) <= _MAX_WORD and _NUMBERS.fullmatch(text) is not None
    if is_sane and words:
        try:
            values = np.array(words).astype(TEXT_DTYPE)
        except ValueError:
            is_sane = False
    if is_sane and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        wrong = f"numbers that do not fit {dtype.name}"
        is_sane = bool(((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))).all())
    if not is_sane:
        raise UnsupportedFormatError(f"{path}: damaged: its voxels are numbers as text, and there is {wrong} among them")
    return values


def _hex_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield bytes that are hexadecimal digits; white space is ignored."""
    rest = b""
    while block := reader.read(INPUT_BYTES):
        digits = rest + block.translate(None, b" \t\r\n\v\f")
        cut = len(digits) // 2 * 2
        rest = digits[cut:]
        try:
            found = bytes.fromhex(digits[:cut].decode("ascii"))
        except ValueError:
            raise UnsupportedFormatError(f"{path}: damaged: its voxels are hexadecimal digits, and others are among them") from None
        yield found


def _bzip2_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield what one or several bzip2 streams hold, one after the other."""
    stored: Any = reader
    file = bz2.BZ2File(stored)
    try:
        while block := file.read(BLOCK_BYTES):
            yield block
    except EOFError:
        raise UnsupportedFormatError(f"{path}: the compressed data end too early; the file is cut off, copy or export it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnsupportedFormatError(f"{path}: damaged compressed data ({error}); copy or export the file again") from None


BLOCKS: dict[str, Callable[[ByteReader, Path, np.dtype[Any]], _Blocks]] = {"text": _text_blocks, "hex": _hex_blocks, "bzip2": _bzip2_blocks}
"""From the name of an encoding to what decodes the stream at its first voxel; the type is that of the voxels."""
