"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, ElementDataFile the last one, then the voxels; written as zlib data."""

from __future__ import annotations

import math
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
from crfrefine.io.streams import BLOCK_BYTES, write_zlib
from crfrefine.io.text_header import LPS, Fields, HeaderLines, affine_of, grid_and_channels, lines_to_write, open_header, voxel_path
from crfrefine.io.volume import RareHeaderError, Volume, VolumeHeader, VoxelSource, VoxelsToWrite, volume_header

NAME = "MetaImage"

_GEOMETRY_KEYS = ("TransformMatrix", "Offset", "ElementSpacing", "ElementSize")
# The usual name of a key, and its other names; both names of the byte order are common.
_BYTE_ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_NAMES = (("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Origin", "Position", "ImagePosition"), _BYTE_ORDER)
_KEYS = (
    *("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "HeaderSize", "ElementDataFile"),
    *("BinaryData", "CompressedData"),
    *_GEOMETRY_KEYS,
    *(name for names in _NAMES for name in names),
)
_KNOWN = {key.lower(): key for key in _KEYS}
_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_WRITTEN_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with a key that the format's writers put first, and gives the number of dimensions."""
    return re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", start) is not None and re.search(rb"\bNDims\s*[=:]", start) is not None


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end and check every field that is used."""
    with open_header(path) as lines:
        fields = _fields(path, lines)
        if not fields.text("ObjectType", "Image").lower().startswith("image"):
            raise fields.damaged("ObjectType", "Image")
        num_dims = fields.whole("NDims")
        if not 2 <= num_dims <= 4:
            raise fields.damaged("NDims", "2, 3 or 4 dimensions")
        sizes = fields.sizes("DimSize", num_dims)
        end = lines.offset
        _require_planes(fields, lines, sizes[-1])
    channels = fields.whole("ElementNumberOfChannels", "1")
    if channels < 1:
        raise fields.damaged("ElementNumberOfChannels", "a number of at least 1")
    grid = grid_and_channels(path, sizes, channels)
    num_axes = len(grid[0])
    source = _source(fields, end, (channels, *sizes), inner=1 if channels > 1 else math.prod(grid[0]))
    for names in _NAMES:
        present = [name for name in names if name in fields]
        if len({fields.text(name).lower() for name in present}) > 1:
            raise fields.damaged(present[1], f"the same as {present[0]} says")
        if present and present[0] != names[0] and names is not _BYTE_ORDER:
            source.check()  # ITK, which reads rare headers, would not always notice.
            raise RareHeaderError(f"the key {present[0]}")
    template = []
    for key in _GEOMETRY_KEYS if num_dims == num_axes else ():
        if key in fields:  # Anything may follow the numbers that are used.
            words = fields.text(key).split()[: num_dims ** (2 if key == "TransformMatrix" else 1)]
            template.append(f"{key} = {' '.join(words)}")
    return volume_header(source, NAME, *grid, _affine(fields, num_dims, num_axes), template=tuple(template))


def _fields(path: Path, lines: HeaderLines) -> Fields:
    fields = Fields(path, "MetaImage", " = ")
    for line in lines:
        if not line.strip():
            continue
        name, *values = re.split(rb"[=:]", line, maxsplit=1)  # MetaIO accepts a colon as well.
        if not values:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            problem = f"line {lines.number} is not `Key = Value`: {shown!r}"
            raise UnsupportedFormatError(f"{path}: not a MetaImage file, although its name says so: {problem}")
        key = _KNOWN.get(name.strip().lower().decode("latin-1")) if len(name) < 100 else None
        if key is not None:
            fields.add(key, values[0])
        if key == "ElementDataFile":
            return fields
    raise UnsupportedFormatError(f"{path}: not a MetaImage file, although its name says so: no line `ElementDataFile = ...` in its header")


def _require_planes(fields: Fields, lines: HeaderLines, num_planes: int) -> None:
    """Raise UnsupportedFormatError if a list or a pattern of files does not name one for each plane: ITK would invent the others."""
    name = fields.text("ElementDataFile")
    if re.fullmatch("LIST( 2D?)?", name, re.IGNORECASE):
        num_files = sum(bool(line.strip()) for line in lines)
    elif "%" in name or name.upper().startswith("LIST "):
        pattern = re.fullmatch(r"[^%\s]*%0?\d{0,2}d[^%\s]* (\d{1,9}) (\d{1,9}) ([1-9]\d{0,3})", name)
        first, last, step = map(int, pattern.groups()) if pattern else (0, -1, 1)
        num_files = (last - first) // step + 1
    else:
        return
    if num_files != num_planes:
        form = "a list, or a name with a running number such as %03d, its first value, last value and step"
        raise fields.damaged("ElementDataFile", f"names of {num_planes} files, as {form}; found {num_files}")


def _source(fields: Fields, end: int, sizes: tuple[int, ...], *, inner: int) -> VoxelSource:
    name = fields.text("ElementDataFile")
    if not name:
        raise fields.damaged("ElementDataFile", "the name of a file, or LOCAL")
    is_compressed, is_binary = fields.flag("CompressedData"), fields.flag("BinaryData", "True")
    path = fields.path if name.upper() == "LOCAL" else voxel_path(fields.path, name, is_compressed=is_compressed)
    skipped = fields.whole("HeaderSize", "0")
    if skipped < -1 or (skipped and (is_compressed or not is_binary)):
        raise fields.damaged("HeaderSize", "bytes to skip, or -1 where voxels end the file; of voxels that are not compressed")
    if skipped or not is_binary:
        raise RareHeaderError("voxels as text, or a HeaderSize")
    kind = _TYPES.get(fields.text("ElementType").upper().removesuffix("_ARRAY"))
    if kind is None:
        raise fields.damaged("ElementType", f"one of {', '.join(_TYPES)}")
    dtype = np.dtype(kind).newbyteorder(">" if any(map(fields.flag, _BYTE_ORDER)) else "<")
    encoding, start = "zlib" if is_compressed else "raw", end if path == fields.path else 0
    return VoxelSource(fields.path, path, encoding, dtype, sizes, inner, start=start)


def _affine(fields: Fields, num_dims: int, num_axes: int) -> NDArray[np.float64]:
    direction = np.eye(num_dims)
    if "TransformMatrix" in fields:  # It lists one axis after the other.
        direction = np.array(fields.numbers("TransformMatrix", num_dims**2)).reshape(num_dims, num_dims).T
    origin = fields.numbers("Offset", num_dims, exact=False) if "Offset" in fields else (0.0,) * num_dims
    key = next((key for key in ("ElementSpacing", "ElementSize") if key in fields), None)
    spacing = (1.0,) * num_dims if key is None else fields.numbers(key, num_dims, exact=False)
    if 0.0 in spacing and key is not None:
        raise fields.damaged(key, "voxels that are larger than 0")
    return affine_of(direction[:num_axes, :num_axes] * np.array(spacing[:num_axes]), np.array(origin[:num_axes]), LPS)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write voxels as zlib data, which takes one thread: .mha in one file, .mhd with a .zraw beside it; a voxel's channels are together."""
    # Of a MetaImage, the lines that place the grid are kept as they are.
    path = voxels.path
    lines = lines_to_write(path, like, NAME, _geometry_lines)
    if voxels.voxel_files:
        with atomic_files(*voxels.voxel_files, path) as (data_file, header_file):
            num_bytes = write_zlib(data_file, voxels.blocks(interleaved=True))
            header_file.write(_header(voxels, lines, num_bytes, voxels.voxel_files[0].name))
        return
    # The header comes first and has the size of the voxels: they wait in a file without a name, on the disk that has room for them.
    with atomic_files(path) as (file,), TemporaryFile(dir=Path(os.path.realpath(path)).parent) as compressed:
        num_bytes = write_zlib(compressed, voxels.blocks(interleaved=True))
        file.write(_header(voxels, lines, num_bytes, "LOCAL"))
        compressed.seek(0)
        shutil.copyfileobj(compressed, file, BLOCK_BYTES)


def _header(voxels: VoxelsToWrite, lines: tuple[str, ...], num_bytes: int, place: str) -> bytes:
    """Return the header of voxels that take so many bytes compressed."""
    lines = (
        "ObjectType = Image",
        f"NDims = {len(voxels.grid_shape)}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {num_bytes}",
        *lines,
        "DimSize = " + " ".join(str(size) for size in voxels.grid_shape[::-1]),
        *([] if voxels.num_channels is None else [f"ElementNumberOfChannels = {voxels.num_channels}"]),
        f"ElementType = {_WRITTEN_TYPES[voxels.dtype.name]}",
        f"ElementDataFile = {place}\n",
    )
    return "\n".join(lines).encode()


def _geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS; the matrix lists one axis after the other, so it is the direction's transpose."""
    center, sizes = np.zeros_like(origin), np.array(spacing)
    arrays = {"TransformMatrix": direction.T, "Offset": origin, "CenterOfRotation": center, "ElementSpacing": sizes}
    return tuple(f"{key} = {' '.join(map(repr, array.reshape(-1).tolist()))}" for key, array in arrays.items())
