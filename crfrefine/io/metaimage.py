"""The text header of MetaImage: where the voxels are, the lines that place the grid, and writing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.atomic import atomic_file, atomic_files
from crfrefine.io.decode import as_bytes
from crfrefine.io.paths import written_voxel_file
from crfrefine.io.source import HEADER_BYTES, VoxelSource
from crfrefine.io.streams import COMPRESSION_LEVEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

# All the names that the format has had for the same thing.
GEOMETRY_KEYS = (
    *("TransformMatrix", "Rotation", "Orientation", "Offset", "Origin", "Position"),
    *("CenterOfRotation", "AnatomicalOrientation", "ElementSpacing", "ElementSize", "DistanceUnits"),
)
REQUIRED_KEYS = ("NDims", "DimSize", "ElementType")
ELEMENT_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
WRITTEN_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}


def parse(path: Path) -> dict[str, str]:
    """Read the lines `Key = Value`, up to ElementDataFile, the last one; "" holds the offset at which they end."""
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if not block:
        raise UnsupportedFormatError(f"{path}: the file is empty")
    fields: dict[str, str] = {}
    offset = 0
    for line in block.splitlines(keepends=True):
        offset += len(line)
        key, separator, value = line.decode("latin-1").partition("=")
        if not separator and key.strip():
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            missing = [name for name in REQUIRED_KEYS if name not in fields]
            if missing:
                raise UnsupportedFormatError(f"{path}: damaged MetaImage header: no line `{missing[0]} = ...`")
            _check_sizes(path, fields["DimSize"])
            fields[""] = str(offset)
            return fields
    raise UnsupportedFormatError(f"{path}: not a MetaImage file, although its name says so: no line `ElementDataFile = ...` in its header")


def voxel_source(path: Path, fields: Mapping[str, str]) -> VoxelSource | None:
    """Return where the voxels are; None for text, for slices in files of their own, and for what the header leaves open."""
    name = fields["ElementDataFile"]
    dtype = ELEMENT_TYPES.get(fields.get("ElementType", "").removesuffix("_ARRAY"))
    if dtype is None or not name or name.split()[0].upper() == "LIST" or "%" in name or not _is_true(fields.get("BinaryData", "True")):
        return None
    is_local = name.upper() == "LOCAL"
    is_compressed = _is_true(fields.get("CompressedData", "False"))
    is_big_endian = _is_true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")))
    try:
        sizes = tuple(int(size) for size in fields["DimSize"].split())
        channels = int(fields.get("ElementNumberOfChannels", "1"))
        skipped = int(fields.get("HeaderSize", "0"))
        num_bytes = int(fields["CompressedDataSize"]) if "CompressedDataSize" in fields else None
    except (KeyError, ValueError):
        return None
    if skipped < 0:
        return None
    return VoxelSource(
        path=path if is_local else path.parent / name,
        offset=int(fields[""]) if is_local else skipped,
        container="zlib" if is_compressed else "raw",
        dtype=np.dtype(dtype).newbyteorder(">" if is_big_endian else "<"),
        sizes=(channels, *sizes),
        interleaved=channels > 1,
        num_bytes=num_bytes,
    )


def check_slices(path: Path, fields: Mapping[str, str]) -> None:
    """Raise UnsupportedFormatError where a header does not list as many files as it has slices.

    SimpleITK leaves the memory of slices that are missing as it was.
    """
    words = fields["ElementDataFile"].split()
    if not words or words[0].upper() != "LIST":
        return
    try:
        sizes = [int(size) for size in fields["DimSize"].split()]
        file_dims = int(words[1].rstrip("Dd")) if len(words) > 1 else len(sizes) - 1
    except ValueError:
        raise UnsupportedFormatError(f"{path}: damaged MetaImage header: ElementDataFile = {fields['ElementDataFile']}") from None
    expected = math.prod(sizes[file_dims:])
    with path.open("rb") as file:
        file.seek(int(fields[""]))
        found = sum(1 for line in file if line.strip())
    if found != expected:
        raise UnsupportedFormatError(f"{path}: its header promises {expected} files of voxels, it lists {found}; copy or export it again")


def geometry(fields: Mapping[str, str], num_axes: int) -> tuple[str, ...]:
    """Return the lines that place the grid; none for a file with more dimensions than the grid, whose lines fit no other file."""
    if fields["NDims"] != str(num_axes):
        return ()
    return tuple(f"{key} = {fields[key]}" for key in GEOMETRY_KEYS if key in fields)


def geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return such lines for a grid in LPS; the matrix lists one axis after the other, so it is the direction's transpose."""
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


def _check_sizes(path: Path, text: str) -> None:
    # SimpleITK takes a negative size for a huge one, and fails for want of memory.
    if any(re.fullmatch(r"-\d+|0+", size) for size in text.split()):
        raise UnsupportedFormatError(f"{path}: damaged MetaImage header: DimSize = {text}; expected sizes of at least 1")


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(repr(float(value)) for value in values.reshape(-1))
