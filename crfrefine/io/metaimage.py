"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, then zlib data; `metaimage_header` reads the header."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.io import metaimage_header
from crfrefine.io.atomic import atomic_file, atomic_files, real_path
from crfrefine.io.streams import BLOCK_BYTES, write_zlib
from crfrefine.io.temporary import open_scratch
from crfrefine.io.text_formats import detached_voxels, lines_to_write, open_voxels, volume_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
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


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write compressed voxels: .mha in one file, .mhd with a .zraw beside it.

    Args:
        path: ends in .mhd or .mha.
        content: voxels; the channels of a voxel are put together.
        like: the lines of its header that place the grid are kept as they are if it came from a file of this format.
        kind: what the voxels are; not stored in the file.
        voxels: the file beside the header that gets the voxels; None: they follow it.
        threads: zlib takes one.

    Raises:
        UnsupportedFormatError: sheared axes, or a number of axes other than two or three.
    """
    lines = lines_to_write(path, like, NAME, _geometry_lines)
    if voxels is not None:
        with atomic_files(voxels, path) as (data_file, header_file):
            num_bytes = write_zlib(data_file, content.together())
            header_file.write(_header(content, lines, num_bytes, voxels.name))
        return
    # The header comes first and has the size of the voxels: they wait in a file without a name, on the disk that has room for them.
    with atomic_file(path) as file, open_scratch(real_path(path).parent) as compressed:
        num_bytes = write_zlib(compressed, content.together())
        file.write(_header(content, lines, num_bytes, "LOCAL"))
        compressed.seek(0)
        shutil.copyfileobj(compressed, file, BLOCK_BYTES)


def _header(content: Content, lines: Sequence[str], num_bytes: int, voxels: str) -> bytes:
    """Return the header of voxels that take so many bytes compressed."""
    return "\n".join(
        [
            "ObjectType = Image",
            f"NDims = {len(content.grid_shape)}",
            "BinaryData = True",
            "BinaryDataByteOrderMSB = False",
            "CompressedData = True",
            f"CompressedDataSize = {num_bytes}",
            *lines,
            "DimSize = " + " ".join(str(size) for size in content.grid_shape[::-1]),
            *([] if content.num_channels is None else [f"ElementNumberOfChannels = {content.num_channels}"]),
            f"ElementType = {WRITTEN_TYPES[content.dtype.name]}",
            f"ElementDataFile = {voxels}",
            "",
        ]
    ).encode()


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
