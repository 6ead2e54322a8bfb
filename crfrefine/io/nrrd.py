"""Writing NRRD; reading its header is in `nrrd_header`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io.atomic import atomic_file, atomic_files
from crfrefine.io.decode import as_bytes
from crfrefine.io.paths import written_voxel_file
from crfrefine.io.streams import write_gzip

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRITTEN_TYPES = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}


def geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS."""
    num_axes = len(spacing)
    vectors = " ".join(_vector(direction[:, axis] * spacing[axis]) for axis in range(num_axes))
    space = "space: left-posterior-superior" if num_axes == 3 else f"space dimension: {num_axes}"
    return (space, f"space directions: {vectors}", f"space origin: {_vector(origin)}")


def write(path: Path, values: NDArray[Any], num_axes: int, lines: tuple[str, ...], *, threads: int = 1) -> None:
    """Write compressed voxels: .nrrd in one file, .nhdr with a .raw.gz beside it.

    Args:
        path: ends in .nrrd or .nhdr.
        values: ([z,] y, x), or ([z,] y, x, channels); uint8, uint16 or float32.
        num_axes: 2 or 3.
        lines: place the grid.
        threads: for compression.
    """
    values = np.ascontiguousarray(values)
    has_channels = values.ndim > num_axes
    data_path = written_voxel_file(path)
    if has_channels:
        lines = tuple(re.sub(r"^space directions:", "space directions: none", line) for line in lines)
    text = "\n".join(
        [
            "NRRD0004",
            f"type: {WRITTEN_TYPES[values.dtype.name]}",
            f"dimension: {values.ndim}",
            *lines[:1],
            "sizes: " + " ".join(str(size) for size in values.shape[::-1]),
            *lines[1:],
            "kinds: " + " ".join(["vector"] * has_channels + ["domain"] * num_axes),
            *(["endian: little"] if values.dtype.itemsize > 1 else []),
            "encoding: gzip",
            *([] if data_path is None else [f"data file: {data_path.name}"]),
            "\n" if data_path is None else "",
        ]
    ).encode()
    voxels = as_bytes(values)
    if data_path is None:
        with atomic_file(path) as file:
            file.write(text)
            write_gzip(file, (voxels,), threads)
    else:
        with atomic_files(data_path, path) as (data_file, header_file):
            write_gzip(data_file, (voxels,), threads)
            header_file.write(text)


def _vector(values: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"
