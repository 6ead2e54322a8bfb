"""Read the text header of an NRRD file: grid, place in the world, voxels. Lines are `field: value`; an empty line ends them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.nrrd_world import placement
from crfrefine.io.source import FROM_THE_END, VoxelSource
from crfrefine.io.text_header import Fields, HeaderLines, open_header, shown, whole_number
from crfrefine.io.voxel_files import is_pattern, number_of_files, pattern_names, require_listed, voxel_path
from crfrefine.io.world import TextHeader, grid_and_channels

if TYPE_CHECKING:
    from collections.abc import Iterable

# All fields of the format: any other name is damage, and its value would be missed.
_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip", "content", "number", "block size"),
    *("space", "space dimension", "space directions", "space origin", "space units", "measurement frame"),
    *("spacings", "thicknesses", "axis mins", "axis maxs", "centers", "centerings", "labels", "units", "kinds"),
    *("min", "max", "old min", "old max", "sample units"),
)
_KNOWN = {name.replace(" ", ""): "centers" if name == "centerings" else name for name in _FIELDS}
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
_ENCODINGS = {
    **{"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2", "hex": "hex"},
    **dict.fromkeys(("ascii", "text", "txt"), "text"),
}
_MOST_DIMS = 16
_DOMAIN_KINDS = ("domain", "space", "time")
_NO_KIND = ("none", "???")
_CHANNEL_KINDS = (
    *("list", "point", "vector", "covariant-vector", "contravariant-vector", "normal", "stub", "scalar"),
    *("2-vector", "3-vector", "4-vector", "3-gradient", "3-normal", "3-color", "4-color", "quaternion"),
    *("rgb-color", "hsv-color", "xyz-color", "rgba-color"),
    *("2d-symmetric-matrix", "2d-matrix", "3d-symmetric-matrix", "3d-matrix"),
)


def read(path: Path) -> TextHeader:
    """Read a header to its end and check every field that is used.

    Raises:
        UnsupportedFormatError: not such a file, damaged, or of an unsupported layout.
        InputError: it cannot be opened, or its geometry is not usable.
    """
    with open_header(path) as lines:
        segments: dict[str, str] = {}
        fields, names, has_end = _fields(path, lines, segments)
        end = lines.offset
    if not has_end and "data file" not in fields:
        raise UnsupportedFormatError(f"{path}: the file is cut off: no empty line ends its header; copy or export it again")
    num_dims = fields.whole("dimension")
    if not 1 <= num_dims <= _MOST_DIMS:
        raise fields.damaged("dimension", f"1 to {_MOST_DIMS} dimensions")
    sizes = fields.sizes("sizes", num_dims)
    channel_axis = _channel_axis(fields, num_dims)
    axes = [axis for axis in range(num_dims) if axis != channel_axis]
    channels = 1 if channel_axis is None else sizes[channel_axis]
    grid_shape, num_channels = grid_and_channels(path, tuple(sizes[axis] for axis in axes), channels)
    place = placement(fields, num_dims, axes, sizes, len(grid_shape))
    return TextHeader(
        grid_shape=grid_shape,
        num_channels=num_channels,
        affine=place.affine,
        geometry=place.lines,
        source=_source(fields, names, end, sizes, inner=math.prod(sizes[:channel_axis] if channels > 1 else grid_shape)),
        segments=segments,
    )


def _fields(path: Path, lines: HeaderLines, segments: dict[str, str]) -> tuple[Fields, list[str], bool]:
    """Return the fields, the files listed after `data file: LIST`, and whether an empty line ended the header; fill `segments`."""
    fields = Fields(path, "NRRD", ": ")
    for line in lines:
        if lines.number == 1:
            if not re.fullmatch(rb"NRRD000[1-6]\s*", line):
                raise UnsupportedFormatError(f"{path}: not an NRRD file, although its name says so: it begins with {line[:12]!r}")
            continue
        if not line.strip():
            return fields, [], True
        if line.startswith(b"#"):
            continue
        name, _, value = line.partition(b":")
        field = _KNOWN.get(name.strip().lower().replace(b" ", b"").decode("latin-1")) if len(name) < 100 else None
        if field is not None and not value.startswith(b"="):
            if field in fields:
                raise UnsupportedFormatError(f"{path}: damaged NRRD header: line {lines.number} is a second line `{field}: ...`")
            fields.set(field, value)
            if field == "data file" and fields.text(field).upper().split()[:1] == ["LIST"]:
                return fields, _until_empty(lines), True
        elif name.startswith(b"Segment") and value.startswith(b"="):
            segments[name.decode("utf-8", "replace")] = value[1:].strip().decode("utf-8", "replace")
        elif b":=" not in line:
            if lines.is_last:
                break  # Reported as cut off.
            raise UnsupportedFormatError(
                f"{path}: damaged NRRD header: line {lines.number} is not a `field: value` of the format: {shown(line)!r}"
            )
    return fields, [], False


def _until_empty(lines: HeaderLines) -> list[str]:
    names = []
    for line in lines:
        if not line.strip():
            break
        names.append(line.strip().decode("utf-8", "surrogateescape"))
    return names


def _channel_axis(fields: Fields, num_dims: int) -> int | None:
    """Return the one axis that is not a grid axis, by its kind or because it has no direction; None if all are grid axes."""
    kinds = fields.text("kinds", "").lower().split() or ["none"] * num_dims
    if len(kinds) != num_dims:
        raise fields.damaged("kinds", f"{num_dims} kinds, as many as there are dimensions")
    if "complex" in kinds:
        raise UnsupportedFormatError(f"{fields.path}: complex voxels; expected real ones, export the magnitude")
    if not set(kinds) <= {*_DOMAIN_KINDS, *_NO_KIND, *_CHANNEL_KINDS}:
        raise fields.damaged("kinds", "domain for axes of the grid, vector or list for channels")
    without = [word == "none" for word in re.findall(r"none|\([^()]*\)", fields.text("space directions", "").lower())]
    if len(without) != num_dims or all(without):
        without = [False] * num_dims
    found = [axis for axis, kind in enumerate(kinds) if kind in _CHANNEL_KINDS or (kind in (*_NO_KIND, "time") and without[axis])]
    if len(found) > 1:
        raise UnsupportedFormatError(f"{fields.path}: {len(found)} axes of values cannot be split into grid and channels")
    return found[0] if found else None


def _source(fields: Fields, names: list[str], end: int, sizes: tuple[int, ...], *, inner: int) -> VoxelSource:
    kind = _TYPES.get(" ".join(fields.text("type").lower().split()))
    if kind is None:
        raise fields.damaged("type", "the name of an integer or floating-point type such as uint8, short or float")
    encoding = _ENCODINGS.get(fields.text("encoding").lower())
    if encoding is None:
        raise fields.damaged("encoding", "raw, gzip, bzip2, ascii or hex")
    endian = fields.text("endian", "little" if kind[1] == "1" or encoding == "text" else None).lower()
    if endian not in ("little", "big"):
        raise fields.damaged("endian", "little or big")
    num_lines, num_bytes = fields.whole("line skip", "0"), fields.whole("byte skip", "0")
    if num_lines < 0:
        raise fields.damaged("line skip", "0 or more")
    if num_bytes < FROM_THE_END or (num_bytes == FROM_THE_END and encoding != "raw"):
        raise fields.damaged("byte skip", "bytes to skip, or -1 where raw voxels end the file")
    files = tuple(voxel_path(fields.path, name) for name in _data_files(fields, names, sizes))
    return VoxelSource(
        header_path=fields.path,
        files=files or (fields.path,),
        encoding=encoding,
        dtype=np.dtype(kind).newbyteorder(">" if endian == "big" else "<"),
        sizes=sizes,
        inner=inner,
        offset=FROM_THE_END if num_bytes == FROM_THE_END else 0 if files else end,
        num_lines=0 if num_bytes == FROM_THE_END else num_lines,
        num_bytes_after=max(num_bytes, 0),
    )


def _data_files(fields: Fields, names: list[str], sizes: tuple[int, ...]) -> Iterable[str]:
    """Return the names of the files with voxels; none if the voxels follow the header."""
    if "data file" not in fields:
        return []
    name = fields.text("data file")
    if not name:
        raise fields.damaged("data file", "the name of a file")
    words = name.split()
    if words[0].upper() == "LIST":
        dims = len(sizes) - 1 if len(words) == 1 else whole_number(words[1])
        if dims is None or len(words) > 2:
            raise fields.damaged("data file", "LIST, or LIST and the number of dimensions of each file")
        expected = number_of_files(fields, "data file", sizes, dims)
        if dims == len(sizes) and names and sizes[-1] % len(names) == 0:
            expected = len(names)  # Slabs of equal thickness.
        require_listed(fields.path, expected, len(names))
        return names
    return pattern_names(fields, "data file", sizes, with_dims=True) if is_pattern(name) else [name]
