"""Where the voxels of a file with a text header are, and reading them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.decode import decode_into
from crfrefine.io.streams import finish, open_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER_BYTES = 1 << 16  # Text headers are shorter than this.


@dataclass(frozen=True)
class VoxelSource:
    """Voxels in one file.

    Attributes:
        path: the file, which may be that of the header.
        offset: bytes before the voxels.
        container: "raw", "zlib" or "gzip".
        dtype: as stored, with its byte order.
        sizes: of all axes, the fastest first, channels included.
        interleaved: the channels are the fastest axis.
        num_bytes: of compressed voxels where the header says so.
    """

    path: Path
    offset: int
    container: str
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    interleaved: bool
    num_bytes: int | None = None

    def check(self, header_path: Path) -> None:
        """Raise InputError or UnsupportedFormatError where the file is not there or shorter than promised."""
        if not self.path.is_file():
            raise InputError(f"{header_path}: its voxels are not there; expected them in {self.path}, put both files into one folder")
        needed = self.num_bytes if self.container != "raw" else math.prod(self.sizes) * self.dtype.itemsize
        found = max(self.path.stat().st_size - self.offset, 0)
        if needed is not None and found < needed:
            raise UnsupportedFormatError(
                f"{self.path}: the file is cut off: its header promises {needed} bytes of voxels, it holds {found}; copy or export it again"
            )

    def read_into(self, values: NDArray[np.float32]) -> None:
        """Read the voxels into an array of shape (channels, [z,] y, x)."""
        with open_bytes(self.path, self.container, self.offset) as reader:
            decode_into(values, reader, self.dtype, self.path, interleaved=self.interleaved)
            if self.container != "raw":
                finish(reader)
