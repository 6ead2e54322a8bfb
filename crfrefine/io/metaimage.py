"""Writing MetaImage; reading its header is in `metaimage_header`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io.atomic import atomic_file, atomic_files
from crfrefine.io.decode import as_bytes
from crfrefine.io.paths import written_voxel_file
from crfrefine.io.streams import COMPRESSION_LEVEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRITTEN_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}


def geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS; the matrix lists one axis after the other, so it is the direction's transpose."""
    return (
        f"TransformMatrix = {_numbers(direction.T)}",
        f"Offset = {_numbers(origin)}",
        f"CenterOfRotation = {_numbers(np.zeros_like(origin))}",
        f"ElementSpacing = {_numbers(np.array(spacing))}",
    )


def write(path: Path, values: NDArray[Any], num_axes: int, lines: tuple[str, ...]) -> None:
    """Write compressed voxels: .mha in one file, .mhd with a .zraw beside it.

    Args:
        path: ends in .mhd or .mha.
        values: ([z,] y, x), or ([z,] y, x, channels); uint8, uint16 or float32.
        num_axes: 2 or 3.
        lines: place the grid.
    """
    from isal import isal_zlib

    compressed = isal_zlib.compress(as_bytes(np.ascontiguousarray(values)), COMPRESSION_LEVEL, 15)
    data_path = written_voxel_file(path)
    has_channels = values.ndim > num_axes
    text = "\n".join(
        [
            "ObjectType = Image",
            f"NDims = {num_axes}",
            "BinaryData = True",
            "BinaryDataByteOrderMSB = False",
            "CompressedData = True",
            f"CompressedDataSize = {len(compressed)}",
            *lines,
            "DimSize = " + " ".join(str(size) for size in values.shape[:num_axes][::-1]),
            *([f"ElementNumberOfChannels = {values.shape[-1]}"] if has_channels else []),
            f"ElementType = {WRITTEN_TYPES[values.dtype.name]}",
            f"ElementDataFile = {'LOCAL' if data_path is None else data_path.name}",
            "",
        ]
    ).encode()
    if data_path is None:
        with atomic_file(path) as file:
            file.write(text)
            file.write(compressed)
    else:
        with atomic_files(data_path, path) as (data_file, header_file):
            data_file.write(compressed)
            header_file.write(text)


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(repr(float(value)) for value in values.reshape(-1))
