"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, ElementDataFile the last one, then the voxels; written as zlib data."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.streams import BLOCK_BYTES, VoxelSource, write_zlib
from crfrefine.io.text_header import (
    LPS,
    Fields,
    affine_of,
    grid_and_channels,
    header_lines,
    lines_to_write,
    voxel_path,
)
from crfrefine.io.volume import RareHeaderError, Volume, VolumeHeader, VoxelsToWrite, volume_header

NAME = "MetaImage"

_GEOMETRY_KEYS = ("TransformMatrix", "Offset", "ElementSpacing", "ElementSize")
_KEYS = (
    *(
        "ObjectType",
        "NDims",
        "DimSize",
        "ElementType",
        "ElementNumberOfChannels",
        "HeaderSize",
        "ElementDataFile",
    ),
    *("BinaryData", "CompressedData", "BinaryDataByteOrderMSB"),
    *_GEOMETRY_KEYS,
)
_KNOWN = {
    **{key.lower(): key for key in _KEYS},
    **dict.fromkeys(("rotation", "orientation"), "TransformMatrix"),
    **dict.fromkeys(("origin", "position", "imageposition"), "Offset"),
    "elementbyteordermsb": "BinaryDataByteOrderMSB",
}
_TYPES = {
    **{
        "MET_CHAR": "i1",
        "MET_UCHAR": "u1",
        "MET_SHORT": "i2",
        "MET_USHORT": "u2",
        "MET_INT": "i4",
        "MET_UINT": "u4",
    },
    **{
        "MET_LONG": "i4",
        "MET_ULONG": "u4",
        "MET_LONG_LONG": "i8",
        "MET_ULONG_LONG": "u8",
        "MET_FLOAT": "f4",
        "MET_DOUBLE": "f8",
    },
}
_WRITTEN_TYPES = {
    "uint8": "MET_UCHAR",
    "int8": "MET_CHAR",
    "int16": "MET_SHORT",
    "uint16": "MET_USHORT",
    "int32": "MET_INT",
    "uint32": "MET_UINT",
    "int64": "MET_LONG_LONG",
    "uint64": "MET_ULONG_LONG",
    "float32": "MET_FLOAT",
    "float64": "MET_DOUBLE",
}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with a key that the format's writers put first, and gives the number of dimensions."""
    return (
        re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", start) is not None
        and re.search(rb"\bNDims\s*[=:]", start) is not None
    )


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end and check every field that is used."""
    fields, end, num_listed = _fields(path)
    if not fields.text("ObjectType", "Image").lower().startswith("image"):
        raise fields.damaged("ObjectType", "Image")
    num_dims = fields.whole("NDims", limits=(2, 4))
    sizes = fields.sizes("DimSize", num_dims)
    channels = fields.whole("ElementNumberOfChannels", "1", limits=(1, 1 << 30))
    _require_planes(fields, num_listed, sizes[-1])
    grid = grid_and_channels(path, sizes, channels)
    num_axes = len(grid[0])
    template = []
    for key in _GEOMETRY_KEYS if num_dims == num_axes else ():
        if key in fields:  # Anything may follow the numbers that are used.
            words = fields.text(key).split()[: num_dims ** (2 if key == "TransformMatrix" else 1)]
            template.append(f"{key} = {' '.join(words)}")
    source = _source(fields, end, inner=1 if channels > 1 else None)
    return volume_header(
        path, source, NAME, *grid, _affine(fields, num_dims, num_axes), template=tuple(template)
    )


def _fields(path: Path) -> tuple[Fields, int, int]:
    """Return the fields, the bytes of the header, and the number of files in the list after it."""
    fields = Fields(path, NAME, " = ")
    problem = "no line `ElementDataFile = ...` in its header"
    lines = header_lines(path)
    for number, line, end in lines:
        if not line.strip():
            continue
        name, *values = re.split(rb"[=:]", line, maxsplit=1)  # MetaIO accepts a colon as well.
        if not values:
            problem = f"line {number} is not `Key = Value`: {shorten(line.decode(errors='backslashreplace'), 60)!r}"
            break
        key = _KNOWN.get(name.strip().lower().decode("latin-1")) if len(name) < 100 else None
        if key is not None:
            fields.add(key, values[0])
        if key == "ElementDataFile":
            is_list = re.fullmatch("LIST( 2D?)?", fields.text(key), re.IGNORECASE)
            return fields, end, sum(bool(line.strip()) for _, line, _ in lines) if is_list else 0
    raise UnsupportedFormatError(
        f"{path}: not a MetaImage file, although its name says so: {problem}"
    )


def _require_planes(fields: Fields, num_files: int, num_planes: int) -> None:
    """Raise UnsupportedFormatError if a list or a pattern of files does not name one for each plane: ITK would invent the others."""
    name = fields.text("ElementDataFile")
    if not num_files and ("%" in name or name.upper().startswith("LIST ")):
        pattern = re.fullmatch(
            r"[^%\s]*%0?\d{0,2}d[^%\s]* (\d{1,9}) (\d{1,9}) ([1-9]\d{0,3})", name
        )
        first, last, step = map(int, pattern.groups()) if pattern else (0, -1, 1)
        num_files = (last - first) // step + 1
    elif not num_files and name.upper() != "LIST":
        return
    if num_files != num_planes:
        form = "a list, or a name with a running number such as %03d, its first value, last value and step"
        raise fields.damaged(
            "ElementDataFile", f"names of {num_planes} files, as {form}; found {num_files}"
        )


def _source(fields: Fields, end: int, *, inner: int | None) -> VoxelSource:
    is_local = fields.text("ElementDataFile").upper() == "LOCAL"
    is_compressed = fields.flag("CompressedData")
    is_binary = fields.flag("BinaryData", "True")
    if is_local:
        path = fields.path
    else:
        path = voxel_path(fields, "ElementDataFile", is_compressed=is_compressed)
    # -1 means that the voxels end the file.
    skipped = fields.whole("HeaderSize", "0", limits=(-1, 1 << 60))
    if skipped and (is_compressed or not is_binary):
        raise fields.damaged("HeaderSize", "0 before compressed voxels or text")
    if not is_binary:
        raise RareHeaderError("voxels as text")
    kind = _TYPES.get(fields.text("ElementType").upper().removesuffix("_ARRAY"))
    if kind is None:
        raise fields.damaged("ElementType", f"one of {', '.join(_TYPES)}")
    dtype = np.dtype(kind).newbyteorder(">" if fields.flag("BinaryDataByteOrderMSB") else "<")
    return VoxelSource(
        path,
        "zlib" if is_compressed else "raw",
        dtype,
        inner,
        start=skipped or (end if is_local else 0),
    )


def _affine(fields: Fields, num_dims: int, num_axes: int) -> NDArray[np.float64]:
    direction = np.eye(num_dims)
    if "TransformMatrix" in fields:  # It lists one axis after the other.
        direction = (
            np.array(fields.numbers("TransformMatrix", num_dims**2)).reshape(num_dims, num_dims).T
        )
    if "Offset" in fields:
        origin = fields.numbers("Offset", num_dims, exact=False)
    else:
        origin = (0.0,) * num_dims
    key = next((key for key in ("ElementSpacing", "ElementSize") if key in fields), None)
    spacing = (1.0,) * num_dims if key is None else fields.numbers(key, num_dims, exact=False)
    if 0.0 in spacing and key is not None:
        raise fields.damaged(key, "voxels that are larger than 0")
    return affine_of(
        direction[:num_axes, :num_axes] * np.array(spacing[:num_axes]),
        np.array(origin[:num_axes]),
        LPS,
    )


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write voxels as zlib data, which takes one thread: .mha in one file, .mhd with a .zraw beside it; a voxel's channels are together."""
    path = voxels.path
    lines = lines_to_write(voxels.path, like, NAME, _geometry_lines)
    # The header of an .mha comes first and has the size of the voxels: they wait in a file without
    # a name, on the same disk.
    with (
        atomic_files(*voxels.voxel_files, path) as files,
        TemporaryFile(dir=Path(os.path.realpath(path)).parent) as waiting,
    ):
        data_file = files[0] if voxels.voxel_files else waiting
        num_bytes = write_zlib(data_file, voxels.blocks(interleaved=True))
        header = (
            "ObjectType = Image",
            f"NDims = {len(voxels.grid_shape)}",
            "BinaryData = True",
            "BinaryDataByteOrderMSB = False",
            "CompressedData = True",
            f"CompressedDataSize = {num_bytes}",
            *lines,
            "DimSize = " + " ".join(str(size) for size in voxels.grid_shape[::-1]),
            *(
                []
                if voxels.num_channels is None
                else [f"ElementNumberOfChannels = {voxels.num_channels}"]
            ),
            f"ElementType = {_WRITTEN_TYPES[voxels.dtype.name]}",
            f"ElementDataFile = {voxels.voxel_files[0].name if voxels.voxel_files else 'LOCAL'}\n",
        )
        files[-1].write("\n".join(header).encode())
        if data_file is waiting:
            waiting.seek(0)
            shutil.copyfileobj(waiting, files[0], BLOCK_BYTES)


def _geometry_lines(
    direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]
) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS.

    The matrix lists one axis after the other, so it is the direction's transpose.
    """
    center = np.zeros_like(origin)
    sizes = np.array(spacing)
    arrays = {
        "TransformMatrix": direction.T,
        "Offset": origin,
        "CenterOfRotation": center,
        "ElementSpacing": sizes,
    }
    return tuple(
        f"{key} = {' '.join(map(repr, array.reshape(-1).tolist()))}"
        for key, array in arrays.items()
    )
