"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, then zlib data; `metaimage_header` reads the header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io import metaimage_header
from crfrefine.io.atomic import atomic_file, atomic_files
from crfrefine.io.decode import as_bytes
from crfrefine.io.streams import COMPRESSION_LEVEL
from crfrefine.io.text_formats import channels_last, detached_voxels, lines_to_write, open_voxels, volume_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import Volume, VolumeHeader

__all__ = ["open_voxels", "read_header", "recognizes", "voxel_files", "write"]

NAME = "MetaImage"

WRITTEN_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with a key that the format's writers put first, and gives the number of dimensions."""
    return re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", start) is not None and re.search(rb"\bNDims\s*[=:]", start) is not None


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or an unsupported layout.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    return volume_header(path, metaimage_header.read(path), NAME)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return the separate files with the voxels of a header."""
    return detached_voxels(metaimage_header.read, path)


def write(path: Path, values: NDArray[Any], like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write compressed voxels: .mha in one file, .mhd with a .zraw beside it.

    Args:
        path: ends in .mhd or .mha.
        values: ([z,] y, x), or (channels, [z,] y, x); uint8, uint16 or float32.
        like: the lines of its header that place the grid are kept as they are if it came from a file of this format.
        kind: what the voxels are; not stored in the file.
        voxels: the file beside the header that gets the voxels; None: they follow it.
        threads: zlib takes one.

    Raises:
        UnsupportedFormatError: sheared axes, or a number of axes other than two or three.
    """
    from isal import isal_zlib

    num_axes = len(like.spacing)
    lines = lines_to_write(path, like, NAME, _geometry_lines)
    values = channels_last(values, like)
    compressed = isal_zlib.compress(as_bytes(values), COMPRESSION_LEVEL, 15)
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
            f"ElementDataFile = {'LOCAL' if voxels is None else voxels.name}",
            "",
        ]
    ).encode()
    if voxels is None:
        with atomic_file(path) as file:
            file.write(text)
            file.write(compressed)
    else:
        with atomic_files(voxels, path) as (data_file, header_file):
            data_file.write(compressed)
            header_file.write(text)


def _geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS; the matrix lists one axis after the other, so it is the direction's transpose."""
    return (
        f"TransformMatrix = {_numbers(direction.T)}",
        f"Offset = {_numbers(origin)}",
        f"CenterOfRotation = {_numbers(np.zeros_like(origin))}",
        f"ElementSpacing = {_numbers(np.array(spacing))}",
    )


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(repr(float(value)) for value in values.reshape(-1))
