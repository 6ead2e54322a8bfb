"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, then the voxels.

ElementDataFile is the last key. It is written with voxels as zlib data.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import text_header
from crfrefine.io.paths import files_written
from crfrefine.io.streams import BLOCK_BYTES, VoxelSource, write_zlib
from crfrefine.io.text_header import LPS, Fields, affine_of
from crfrefine.io.volume import VolumeHeader, volume_header
from crfrefine.io.writing import VoxelsToWrite, atomic_files

NAME = "MetaImage"

_GEOMETRY_KEYS = ("TransformMatrix", "Offset", "ElementSpacing", "ElementSize")
_UNITS = "DistanceUnits"
_KEYS = (
    *("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "HeaderSize"),
    *("ElementDataFile", "BinaryData", "CompressedData", "BinaryDataByteOrderMSB"),
    *_GEOMETRY_KEYS,
    _UNITS,
)
_KNOWN = {
    **{key.lower(): key for key in _KEYS},
    **dict.fromkeys(("rotation", "orientation"), "TransformMatrix"),
    **dict.fromkeys(("origin", "position", "imageposition"), "Offset"),
    "elementbyteordermsb": "BinaryDataByteOrderMSB",
}
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Of several names of a type, the first one is written.
_WRITTEN_TYPES = {np.dtype(kind).name: name for name, kind in reversed(_TYPES.items())}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with a key that writers put first, and has that of dimensions."""
    begins = re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", start)
    return begins is not None and re.search(rb"\bNDims\s*[=:]", start) is not None


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end and check every field that is used."""
    fields, end = _read_fields(path)
    unit = fields.text(_UNITS, "")
    fields.units = [unit]
    if not fields.text("ObjectType", "Image").lower().startswith("image"):
        raise fields.damaged("ObjectType", "Image")
    num_dims = fields.whole("NDims", limits=(2, 4))
    sizes = fields.sizes("DimSize", num_dims)
    channels = fields.whole("ElementNumberOfChannels", "1", limits=(1, 1 << 30))
    _require_planes(fields, sizes[-1])
    grid_shape, num_channels = text_header.grid_and_channels(path, sizes, channels)
    num_axes = len(grid_shape)
    source = _source(fields, end, inner=1 if channels > 1 else None)
    affine = _affine(fields, num_dims, num_axes)
    header = volume_header(path, source, NAME, grid_shape, num_channels, affine)
    if num_dims == num_axes:
        # The lines that place the grid, without words after their numbers, are kept for a writer.
        lines = []
        for key in _GEOMETRY_KEYS:
            if key in fields:
                count = num_dims**2 if key == "TransformMatrix" else num_dims
                words = fields.text(key).split()[:count]
                lines.append(f"{key} = {' '.join(words)}")
        if unit.lower() in text_header.MM_PER_UNIT:
            lines.append(f"{_UNITS} = {unit}")
        header = replace(header, template=tuple(lines))
    return text_header.lengths_in_mm(header, _UNITS, [unit] * num_axes)


def _read_fields(path: Path) -> tuple[Fields, int]:
    """Return the fields, with the list of files after them, and the bytes of the header."""
    fields = Fields(path, NAME, " = ", "ElementDataFile")
    problem = "no line `ElementDataFile = ...` in its header"
    lines = text_header.header_lines(path)
    for number, line, end in lines:
        if not line.strip():
            continue
        name, *values = re.split(rb"[=:]", line, maxsplit=1)  # MetaIO accepts a colon as well.
        if not values:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            problem = f"line {number} is not `Key = Value`: {shown!r}"
            break
        key = _KNOWN.get(name.strip().lower().decode("latin-1")) if len(name) < 100 else None
        if key is not None:
            fields.add(key, values[0])
        if key == "ElementDataFile":
            if re.fullmatch("LIST( 2D?)?", fields.text(key), re.IGNORECASE):
                fields.add_list(lines)
            return fields, end
    raise UnsupportedFormatError(
        f"{path}: not a MetaImage file, although its name says so: {problem}"
    )


def _require_planes(fields: Fields, num_planes: int) -> None:
    """Require one file for each plane, in a list or a pattern of names; ITK would invent some."""
    name = fields.text("ElementDataFile")
    num_files = len(fields.listed)
    if not fields.listed and ("%" in name or name.upper().startswith("LIST ")):
        pattern = r"[^%\s]*%0?\d{0,2}d[^%\s]* (\d{1,9}) (\d{1,9}) ([1-9]\d{0,3})"
        match = re.fullmatch(pattern, name)
        if match is not None:
            first, last, step = map(int, match.groups())
            num_files = (last - first) // step + 1
    elif not fields.listed and name.upper() != "LIST":
        return
    if num_files != num_planes:
        raise fields.damaged(
            "ElementDataFile",
            f"names of {num_planes} files, as a list, or a name with a running number such as "
            f"%03d, its first value, last value and step; found {num_files}",
        )


def _source(fields: Fields, end: int, *, inner: int | None) -> VoxelSource:
    """Return the place of the voxels, which follow the header, or are in another file."""
    is_local = fields.text("ElementDataFile").upper() == "LOCAL"
    is_compressed = fields.flag("CompressedData")
    is_binary = fields.flag("BinaryData", "True")
    path = fields.path
    start = end
    if not is_local:
        path = text_header.voxel_path(fields, "ElementDataFile", is_compressed=is_compressed)
        start = 0
    # -1 means that the voxels end the file.
    skipped = fields.whole("HeaderSize", "0", limits=(-1, 1 << 60))
    if skipped and (is_compressed or not is_binary):
        raise fields.damaged("HeaderSize", "0 before compressed voxels or text")
    if not is_binary:
        raise fields.rare("voxels as text")
    kind = _TYPES.get(fields.text("ElementType").upper().removesuffix("_ARRAY"))
    if kind is None:
        raise fields.damaged("ElementType", f"one of {', '.join(_TYPES)}")
    dtype = np.dtype(kind).newbyteorder("<")
    if fields.flag("BinaryDataByteOrderMSB"):
        dtype = dtype.newbyteorder(">")
    encoding = "zlib" if is_compressed else "raw"
    return VoxelSource(path, encoding, dtype, inner, start=skipped or start)


def _affine(fields: Fields, num_dims: int, num_axes: int) -> NDArray[np.float64]:
    """Return the affine to RAS+ mm of a grid with the first axes of those in the header."""
    direction = np.eye(num_dims)
    if "TransformMatrix" in fields:  # It lists one axis after the other.
        matrix = fields.numbers("TransformMatrix", num_dims**2)
        direction = np.array(matrix).reshape(num_dims, num_dims).T
    origin = np.zeros(num_dims)
    if "Offset" in fields:
        origin = np.array(fields.numbers("Offset", num_dims, exact=False))
    spacing = np.ones(num_dims)
    sizes = [key for key in ("ElementSpacing", "ElementSize") if key in fields]
    if sizes:
        spacing = np.array(fields.numbers(sizes[0], num_dims, exact=False))
    if 0.0 in spacing:
        raise fields.damaged(sizes[0], "voxels that are larger than 0")
    vectors = direction[:num_axes, :num_axes] * spacing[:num_axes]
    return affine_of(vectors, origin[:num_axes], LPS)


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write an .mha, or an .mhd with a .zraw, as zlib data; a voxel's channels are together."""
    path = voxels.path
    geometry = list(text_header.kept_lines(voxels, NAME))
    if not geometry:
        direction, origin, spacing = text_header.place_in_lps(voxels.like)
        arrays = {
            "TransformMatrix": direction.T,  # It lists one axis after the other.
            "Offset": origin,
            "CenterOfRotation": np.zeros_like(origin),
            "ElementSpacing": np.array(spacing),
        }
        for key, array in arrays.items():
            words = map(repr, array.reshape(-1).tolist())
            geometry.append(f"{key} = {' '.join(words)}")
    blocks = voxels.blocks(interleaved=True)
    _, *voxel_files = files_written(path)
    if voxel_files:
        with atomic_files(path) as (voxel_file, file):
            num_bytes = write_zlib(voxel_file, blocks)
            data_file = text_header.text_of_name(voxel_files[0].name)
            file.write(_header_to_write(voxels, geometry, num_bytes, data_file))
        return
    # The header comes first and has the size of the voxels: they wait in a file without a name, on
    # the same disk.
    folder = Path(os.path.realpath(path)).parent
    with atomic_files(path) as (file,), TemporaryFile(dir=folder) as waiting:
        num_bytes = write_zlib(waiting, blocks)
        file.write(_header_to_write(voxels, geometry, num_bytes, "LOCAL"))
        waiting.seek(0)
        shutil.copyfileobj(waiting, file, BLOCK_BYTES)


def _header_to_write(
    voxels: VoxelsToWrite, geometry: list[str], num_bytes: int, data_file: str
) -> bytes:
    """Return the header of compressed voxels that take this many bytes."""
    lines = [
        "ObjectType = Image",
        f"NDims = {len(voxels.like.grid_shape)}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {num_bytes}",
        *geometry,
        "DimSize = " + " ".join(map(str, voxels.like.grid_shape)),
    ]
    if voxels.num_channels is not None:
        lines.append(f"ElementNumberOfChannels = {voxels.num_channels}")
    lines.append(f"ElementType = {_WRITTEN_TYPES[voxels.dtype.name]}")
    lines.append(f"ElementDataFile = {data_file}\n")
    return "\n".join(lines).encode("utf-8", "surrogateescape")
