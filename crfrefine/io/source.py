"""Locate and read voxels that are stored as they are, perhaps compressed: those of most formats."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.decode import VoxelStream
from crfrefine.io.encodings import BLOCKS, TEXT_DTYPE
from crfrefine.io.streams import BLOCK_BYTES, INPUT_BYTES, LARGEST_RATIO, BlockReader, ByteReader, cut_off, finish, open_bytes, skip
from crfrefine.io.voxel_files import size_of

if TYPE_CHECKING:
    import numpy as np

FROM_THE_END = -1

# The most bytes that one compressed byte can expand to; bzip2: its longest runs.
_MOST_PER_BYTE = {"zlib": LARGEST_RATIO, "gzip": LARGEST_RATIO, "bzip2": 1 << 21}


@dataclass(frozen=True)
class VoxelSource:
    """Voxels in one file, or in several of equal length that follow each other.

    Attributes:
        header_path: the file with the header, which may hold the voxels, too.
        files: the files with the voxels.
        encoding: "raw", "zlib", "gzip", "bzip2", "text" or "hex".
        dtype: as stored, with its byte order.
        sizes: of all axes, the fastest first, channels included.
        inner: values that lie side by side in one channel before the next channel begins; 1 if channels are the fastest axis.
        offset: bytes before the voxels in each file; FROM_THE_END if the voxels end the file.
        num_lines: lines to skip after the offset.
        num_bytes_after: bytes to skip after the lines; they count after decompression.
        stored_bytes: size of the compressed voxels, if the header gives it.
        slope: value = stored * slope + intercept.
        intercept: see `slope`.
    """

    header_path: Path
    files: tuple[Path, ...]
    encoding: str
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    inner: int
    offset: int
    num_lines: int = 0
    num_bytes_after: int = 0
    stored_bytes: int | None = None
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def detached(self) -> tuple[Path, ...]:
        """The files other than the header's own."""
        return tuple(path for path in self.files if path != self.header_path)

    def check(self) -> None:
        """Raise InputError or UnsupportedFormatError if a file is missing, or shorter than the header promises."""
        num_values = math.prod(self.sizes) // len(self.files)
        needed = num_values * self.dtype.itemsize
        for path in self.files:
            found = max(size_of(path, self.header_path) - max(self.offset, 0), 0)
            if self.encoding in _MOST_PER_BYTE:
                if self.stored_bytes is not None and self.stored_bytes > found:
                    raise cut_off(path, f"{self.stored_bytes} bytes of voxels", f"it holds {found}")
                promised = needed + self.num_bytes_after
                if promised > found * _MOST_PER_BYTE[self.encoding]:
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
            offset = size_of(path, self.header_path) - math.prod(self.sizes) // len(self.files) * self.dtype.itemsize
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
