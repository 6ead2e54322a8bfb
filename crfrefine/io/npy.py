"""NumPy's .npy: one array of (channel, z, y, x) without geometry, as a network's program saves it; never unpickled."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.npz import header_of, read_array_header
from crfrefine.io.streams import cannot_read
from crfrefine.io.volume import Volume, VolumeHeader, VoxelSource, VoxelsToWrite


def recognizes(start: bytes) -> bool:
    """Return whether the file begins as an array does."""
    return start.startswith(b"\x93NUMPY")


def read_header(path: Path) -> VolumeHeader:
    """Read the header of an array of real numbers with three or four axes in C order."""
    try:
        with path.open("rb") as file:
            shape, is_fortran, dtype = read_array_header(file, path, "the array")
            start = file.tell()
    except OSError as error:
        raise cannot_read(path, error) from error
    if is_fortran and len(shape) > 1:
        raise UnsupportedFormatError(f"{path}: the array is in Fortran order; save numpy.ascontiguousarray(array)")
    header = header_of(path, "NumPy array", shape, dtype, None)
    source = VoxelSource(path, path, "raw", dtype, shape[::-1], math.prod(shape[1:]), start)
    source.check()
    return replace(header, source=source)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write an array of (channels, [z,] y, x); it has no geometry, and takes one thread."""
    header = {"descr": np.lib.format.dtype_to_descr(voxels.dtype), "fortran_order": False, "shape": voxels.shape}
    with atomic_files(voxels.path) as (file,):
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(voxels.blocks())
