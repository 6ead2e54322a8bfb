"""NumPy's .npy: one array of (channel, z, y, x) without geometry, as a network's program saves it; never unpickled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.decode import VoxelStream
from crfrefine.io.npz import header_of, read_array_header
from crfrefine.io.streams import cannot_read, cut_off, open_bytes
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.io.volume import Volume, VoxelsToWrite


def recognizes(start: bytes) -> bool:
    """Return whether the file begins as an array does."""
    return start.startswith(b"\x93NUMPY")


def read_header(path: Path) -> VolumeHeader:
    """Read the header of the array.

    Raises:
        UnsupportedFormatError: no array of real numbers with three or four axes in C order, or cut off.
    """
    shape, dtype, offset = _layout(path)
    promised, found = math.prod(shape) * dtype.itemsize, path.stat().st_size - offset
    if found < promised:
        raise cut_off(path, f"{promised} bytes of voxels", f"it holds {found}")
    return header_of(path, "NumPy array", shape, dtype, None)


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the file at its first voxel; one channel follows the other."""
    _, dtype, offset = _layout(header.path)
    with open_bytes(header.path, "raw", offset) as reader:
        yield VoxelStream(reader, dtype, header.path, lambda: None)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write an array of (channels, [z,] y, x); it has no geometry, and takes one thread."""
    header = {"descr": np.lib.format.dtype_to_descr(voxels.dtype), "fortran_order": False, "shape": voxels.shape}
    with atomic_files(voxels.path) as (file,):
        np.lib.format.write_array_header_1_0(file, header)
        for block in voxels.blocks():
            file.write(block)


def _layout(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return the shape, the type, and the place of the first value in the file."""
    try:
        with path.open("rb") as file:
            shape, is_fortran, dtype = read_array_header(file, path, "the array")
            offset = file.tell()
    except OSError as error:
        raise cannot_read(path, error) from error
    if is_fortran and len(shape) > 1:
        raise UnsupportedFormatError(f"{path}: the array is in Fortran order; save numpy.ascontiguousarray(array)")
    return shape, dtype, offset
