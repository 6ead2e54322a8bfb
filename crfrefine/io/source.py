"""Locate and read voxels that are stored as they are, perhaps compressed: those of most formats."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.decode import VoxelStream
from crfrefine.io.streams import MAX_RATIO, cut_off, finish, open_bytes, skip
from crfrefine.io.text_header import shown


@dataclass(frozen=True)
class VoxelSource:
    """Voxels in one file."""

    header_path: Path  # the file with the header, which may hold the voxels, too
    path: Path  # the file with the voxels
    encoding: str  # "raw", "zlib" or "gzip"
    dtype: np.dtype[Any]  # as stored, with its byte order
    sizes: tuple[int, ...]  # of all axes, the fastest first, channels included
    inner: int  # values that lie side by side in one channel before the next channel begins; 1 if channels are the fastest axis
    start: int = 0  # bytes before the stored data in the file
    offset: int = 0  # bytes before the first voxel after decompression
    stored_bytes: int = 0  # size of the compressed voxels; 0 if the header does not give it
    slope: float = 1.0  # value = stored * slope + intercept
    intercept: float = 0.0  # see `slope`

    def check(self) -> None:
        """Raise InputError or UnsupportedFormatError if the file is missing, or shorter than the header promises."""
        promised = math.prod(self.sizes) * self.dtype.itemsize + self.offset
        found = max(self._size() - self.start, 0)
        if self.stored_bytes > found:
            raise cut_off(self.path, f"{self.stored_bytes} bytes of voxels", f"it holds {found}")
        if self.encoding == "raw" and promised > found:
            raise cut_off(self.path, f"{promised} bytes of voxels", f"it holds {found}")
        if promised > found * MAX_RATIO:
            raise cut_off(self.path, f"{promised} bytes of voxels", f"more than the {found} compressed bytes in it can hold")

    @contextmanager
    def stream(self) -> Iterator[VoxelStream]:
        """Open the voxels at the first one; the end of compressed data, where the checksum is, is read by the stream's `finish`."""
        is_raw = self.encoding == "raw"
        with open_bytes(self.path, self.encoding, self.start + (self.offset if is_raw else 0)) as reader:
            skip(reader, 0 if is_raw else self.offset)
            finish_reading = (lambda: None) if is_raw else partial(finish, reader)
            yield VoxelStream(reader, self.dtype, self.path, finish_reading, self.slope, self.intercept, inner=self.inner)

    def _size(self) -> int:
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            raise InputError(
                f"{self.header_path}: its voxels are missing; expected them in {shown(str(self.path), 400)}, put both files into one folder"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe could block forever; a device may have no end.
            raise InputError(f"{self.header_path}: expected its voxels in {shown(str(self.path), 400)}, which is not a regular file")
        return status.st_size
