"""NRRD, `.nrrd` and `.nhdr`: a header of `field: value`, which an empty line ends, then the voxels.

It is written with voxels as gzip data.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import printable, shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import text_header
from crfrefine.io.paths import LABELS_SUFFIXES, files_written, suffix_of
from crfrefine.io.streams import VoxelSource, write_gzip
from crfrefine.io.text_header import LPS, Fields, affine_of, finite_numbers
from crfrefine.io.volume import (
    VolumeHeader,
    described_segments,
    volume_header,
)
from crfrefine.io.writing import VoxelsToWrite, atomic_files

NAME = "NRRD"
# The pairs of key and value of a segment that are read.
_OF_SEGMENT = re.compile("Segment[0-9]{1,5}_(?:Name|LabelValue|Color)")

# All fields of the format: any other name is damage, and its value would be missed.
_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip"),
    *("content", "number", "block size", "min", "max", "old min", "old max", "sample units"),
    *("space", "space dimension", "space directions", "space origin", "space units"),
    *("measurement frame", "spacings", "thicknesses", "axis mins", "axis maxs"),
    *("centers", "centerings", "labels", "units", "kinds"),
)
_FIELD_OF_NAME = {name.replace(" ", ""): name for name in _FIELDS}
_FIELD_OF_NAME["centerings"] = "centers"
# NumPy's types by their names in a header.
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int"), "i2"),
    **dict.fromkeys(("int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int"), "u2"),
    **dict.fromkeys(("uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), "i8"),
    **dict.fromkeys(("signed long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
# Of types that have another name in NumPy.
_WRITTEN_TYPES = {"float32": "float", "float64": "double"}
_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_RARE_ENCODINGS = ("hex", "ascii", "text", "txt")
_MAX_DIMS = 16
_GRID_KINDS = ("domain", "space")
# An axis of these kinds is one of the grid, unless it is the only one without a direction.
_VAGUE_KINDS = ("time", "none", "???")
_TIME_UNITS = ("s", "sec", "second", "seconds", "ms", "msec", "millisecond", "milliseconds")
_CHANNEL_KINDS = (
    *("list", "point", "vector", "covariant-vector", "normal"),
    *("scalar", "rgb-color", "rgba-color"),
)


def recognizes(start: bytes) -> bool:
    """Return whether it begins with the format's magic, whatever the version."""
    return start.startswith(b"NRRD000")


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end, and check all fields that are used; segments have one layer."""
    fields, end = _read_fields(path)
    units = _units(fields)
    fields.units = [*_units(fields, "space units"), *units]
    num_dims = fields.whole("dimension", limits=(1, _MAX_DIMS))
    sizes = fields.sizes("sizes", num_dims)
    fields.time = _time_along(fields, sizes)  # before the errors of rare kinds, which tell it
    channel_axis = _channel_axis(fields, num_dims)
    axes = list(range(num_dims))
    channels = 1
    if channel_axis is not None:
        axes.remove(channel_axis)
        channels = sizes[channel_axis]
    if channels > 1 and suffix_of(path) in LABELS_SUFFIXES:
        raise UnsupportedFormatError(
            f"{path}: the segments are in {channels} layers, as where they overlap; "
            "expected one layer\n"
            "  In 3D Slicer's module Segmentations, collapse the labelmap layers, "
            "or export the segments to a labelmap."
        )

    grid_sizes = tuple(sizes[axis] for axis in axes)
    grid_shape, num_channels = text_header.grid_and_channels(path, grid_sizes, channels)
    inner = math.prod(sizes[:channel_axis]) if channels > 1 else None
    source = _source(fields, end, inner=inner)
    affine = _affine(fields, num_dims, axes, len(grid_shape))
    if len(units) == num_dims:
        units = [units[axis] for axis in axes]
    if "space units" in fields:
        units = _units(fields, "space units")
    header = volume_header(path, source, NAME, grid_shape, num_channels, affine, time=fields.time)
    if len(axes) == len(grid_shape):
        header = replace(header, template=_lines_of_place(fields, units, header))
    if num_channels == 1:  # 3D Slicer describes segments by pairs of key and value.
        entries = []
        for key in fields:
            start, _, part = key.partition("_")
            if part == "Name":
                color = finite_numbers(fields.get(f"{start}_Color", "").split()) or ()
                entries.append((fields.get(f"{start}_LabelValue", ""), fields[key], color))
        header = replace(header, segments=described_segments(entries))
    return text_header.lengths_in_mm(header, "units of length", units)


def _read_fields(path: Path) -> tuple[Fields, int]:
    """Return the fields, and the bytes of the header up to an empty line."""
    fields = Fields(path, NAME, ": ", "data file")
    end = 0
    lines = text_header.header_lines(path)
    for number, line, end in lines:
        if number == 1 and not re.fullmatch(rb"NRRD000[1-6]\s*", line):
            raise UnsupportedFormatError(
                f"{path}: not an NRRD file, although its name says so: it begins with {line[:12]!r}"
            )
        if not line.strip():
            return fields, end
        if number == 1 or line.startswith(b"#"):
            continue
        name, _, value = line.partition(b":")
        field = None
        if len(name) < 100:
            field = _FIELD_OF_NAME.get(name.strip().lower().replace(b" ", b"").decode("latin-1"))
        if field is not None and not value.startswith(b"="):
            fields.add(field, value)
            if field == "data file" and fields.text(field).upper().split()[:1] == ["LIST"]:
                fields.add_list(lines)
                return fields, end
            continue

        key, is_pair, value = line.partition(b":=")
        if not is_pair:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            raise UnsupportedFormatError(
                f"{path}: damaged NRRD header, or the file is cut off: "
                f"line {number} is not a `field: value` of the format: {shown!r}"
            )
        if _OF_SEGMENT.fullmatch(key.decode("latin-1")):
            fields.setdefault(key.decode(), value.strip().decode(errors="replace"))
    if "data file" not in fields:
        raise UnsupportedFormatError(
            f"{path}: the file is cut off: no empty line ends its header; copy or export it again"
        )
    return fields, end


def _lines_of_segments(voxels: VoxelsToWrite) -> list[str]:
    """Return the lines by which 3D Slicer knows the segments of a label map."""
    extent = " ".join(f"0 {size - 1}" for size in voxels.shape[::-1])
    lines = []
    for number, segment in enumerate(voxels.segments):
        values = {
            "ID": f"Segment_{segment.label}",
            "Name": printable(segment.name),
            "LabelValue": segment.label,
            "Layer": 0,
            "Color": " ".join(f"{part:.6g}" for part in segment.shown_color),
            "Extent": extent,
        }
        lines += [f"Segment{number}_{key}:={value}" for key, value in values.items()]
    return lines


def _channel_axis(fields: Fields, num_dims: int) -> int | None:
    """Return the one axis that is not of the grid, by its kind or missing direction, or None."""
    kinds = _kinds(fields, num_dims)
    directions = _ENTRIES.findall(fields.text("space directions", "").lower())
    if len(directions) != num_dims or set(directions) == {"none"}:
        directions = [""] * num_dims  # None of them means channels.
    channel_axes = []
    for axis, (kind, direction) in enumerate(zip(kinds, directions, strict=True)):
        if kind in _CHANNEL_KINDS or (kind in _VAGUE_KINDS and direction == "none"):
            channel_axes.append(axis)
    if len(channel_axes) > 1:
        raise UnsupportedFormatError(
            f"{fields.path}: {len(channel_axes)} axes of values cannot be split into "
            "grid and channels"
        )
    return next(iter(channel_axes), None)


def _kinds(fields: Fields, num_dims: int) -> list[str]:
    """Return the kind of each axis; raise RareHeaderError for an unknown one."""
    kinds = fields.text("kinds", "").lower().split() or ["none"] * num_dims
    if len(kinds) != num_dims or "complex" in kinds:
        raise fields.damaged(
            "kinds",
            f"{num_dims} kinds, such as domain for axes of the grid and vector for channels, "
            "of real numbers",
        )
    unusual = set(kinds).difference(_GRID_KINDS, _VAGUE_KINDS, _CHANNEL_KINDS)
    if unusual:
        raise fields.rare(f"the kind {shorten(min(unusual), 60)!r}")
    return kinds


def _time_along(fields: Fields, sizes: tuple[int, ...]) -> str:
    """Return which axis of several values is one of time; "" if none is.

    Its kind or unit says so, or the space, whose last dimension is then time.
    """
    space = fields.text("space", "")
    if space.lower().endswith("time") and sizes[-1] > 1:
        return f"axis {len(sizes) - 1} of the space {shorten(space, 60)}"
    kinds = _kinds(fields, len(sizes))
    units = _units(fields)
    if len(units) != len(sizes):
        units = [""] * len(sizes)
    for axis, size in enumerate(sizes):
        if size > 1 and kinds[axis] == "time":
            return f"axis {axis} of the kind time"
        if size > 1 and units[axis].lower() in _TIME_UNITS:
            return f"axis {axis} in {units[axis]}"
    return ""


def _source(fields: Fields, end: int, *, inner: int | None) -> VoxelSource:
    """Return the place of the voxels, which follow the header, or are in another file."""
    kind = _TYPES.get(" ".join(fields.text("type").lower().split()))
    if kind is None:
        raise fields.damaged(
            "type", "the name of an integer or floating-point type such as uint8, short or float"
        )
    word = fields.text("encoding").lower()
    encoding = _ENCODINGS.get(word)
    path = fields.path
    start = end
    if "data file" in fields:
        path = text_header.voxel_path(fields, "data file", is_compressed=encoding == "gzip")
        start = 0
    # ITK takes the lowest 32 bits of a larger number.
    if fields.whole("line skip", "0", limits=(0, 1 << 30)) or word in _RARE_ENCODINGS:
        raise fields.rare("lines to skip, or voxels as text")
    if encoding is None:
        raise fields.damaged("encoding", "raw, gzip, ascii or hex")

    # -1 means that the voxels end the file.
    fewest = -1 if encoding == "raw" else 0
    skipped = fields.whole("byte skip", "0", limits=(fewest, 1 << 60))
    dtype = np.dtype(kind)
    default = "little" if dtype.itemsize == 1 else None  # Single bytes have no order.
    endian = fields.text("endian", default).lower()
    if endian not in ("little", "big"):
        raise fields.damaged("endian", "little or big")
    dtype = dtype.newbyteorder("<")
    if endian == "big":
        dtype = dtype.newbyteorder(">")
    if skipped < 0:
        return VoxelSource(path, encoding, dtype, inner, start=-1)
    return VoxelSource(path, encoding, dtype, inner, start=start, offset=skipped)


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write an .nrrd, or an .nhdr with a .raw.gz, as gzip data; a voxel's channels are together."""
    lines_of_place = text_header.kept_lines(voxels, NAME)
    if not lines_of_place:
        lines_of_place = _geometry_lines(*text_header.place_in_lps(voxels.like))
    space, *geometry = lines_of_place
    sizes = voxels.shape[::-1]
    kinds = ["domain"] * len(voxels.like.grid_shape)
    if voxels.num_channels is not None:
        sizes = (sizes[-1], *sizes[:-1])
        kinds.insert(0, "vector")
        prefix = "space directions:"
        geometry = [line.replace(prefix, f"{prefix} none", 1) for line in geometry]

    lines = [
        "NRRD0004",
        f"type: {_WRITTEN_TYPES.get(voxels.dtype.name, voxels.dtype.name)}",
        f"dimension: {len(sizes)}",
        space,
        "sizes: " + " ".join(map(str, sizes)),
        *geometry,
        "kinds: " + " ".join(kinds),
    ]
    if voxels.dtype.itemsize > 1:
        lines.append("endian: little")
    lines.append("encoding: gzip")
    _, *voxel_files = files_written(voxels.path)
    for file in voxel_files:
        lines.append(f"data file: {text_header.text_of_name(file.name)}")
    if suffix_of(voxels.path) in LABELS_SUFFIXES:
        lines += _lines_of_segments(voxels)
    lines.append("" if voxel_files else "\n")  # An empty line comes before voxels.

    with atomic_files(voxels.path) as files:
        files[-1].write("\n".join(lines).encode("utf-8", "surrogateescape"))
        write_gzip(files[0], voxels.blocks(interleaved=True), threads)


def _geometry_lines(
    direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]
) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS."""
    num_axes = len(spacing)
    vectors = " ".join(_vector(direction[:, axis] * spacing[axis]) for axis in range(num_axes))
    space = "space: left-posterior-superior" if num_axes == 3 else f"space dimension: {num_axes}"
    return (space, f"space directions: {vectors}", f"space origin: {_vector(origin)}")


def _vector(values: NDArray[np.float64]) -> str:
    return "(" + ",".join(map(repr, values.tolist())) + ")"


# Name of a world without hyphens and spaces -> the signs that lead to RAS+.
_SPACES = {
    **dict.fromkeys(("rightanteriorsuperior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("leftanteriorsuperior", "las"), (-1.0, 1.0, 1.0)),
    **dict.fromkeys(("leftposteriorsuperior", "lps"), LPS),
}
_IN_SPACE = {"space", "space dimension", "space directions", "space origin"}
# "none" for an axis of channels, else a vector
_ENTRIES = re.compile(r"none|\([^()]*\)", re.IGNORECASE)


def _affine(fields: Fields, num_dims: int, axes: list[int], num_axes: int) -> NDArray[np.float64]:
    """Return the affine to RAS+ mm of a grid: the first `num_axes` of the `axes` of no channels."""
    if "axis mins" in fields:
        raise fields.rare("axis mins")
    if not _IN_SPACE & set(fields):
        # A grid without a place in the world.
        words = fields.text("spacings", " ".join(["1"] * num_dims)).split()
        spacings = finite_numbers([words[axis] for axis in axes if axis < len(words)])
        if spacings is None or len(words) != num_dims or 0.0 in spacings:
            raise fields.damaged(
                "spacings", f"{num_dims} finite numbers other than 0, NaN for channels"
            )
        return affine_of(np.diag(spacings[:num_axes]), np.zeros(num_axes), LPS)

    name = fields.text("space", "")
    is_named = "space" in fields
    signs: tuple[float, ...] | None = LPS  # As in ITK, if the space has no name.
    if is_named:
        signs = _SPACES.get(re.sub("[- ]", "", name.lower()))
    if signs is None or "spacings" in fields or is_named == ("space dimension" in fields):
        raise fields.rare(f"the space {shorten(name, 60)!r}, or spacings in it")
    space_dims = 3
    if not is_named:
        space_dims = fields.whole("space dimension", limits=(1, _MAX_DIMS))
    if space_dims != len(axes):
        raise UnsupportedFormatError(
            f"{fields.path}: a grid of {len(axes)} axes in a space of {space_dims} dimensions; "
            "expected as many axes as dimensions"
        )
    columns, origin = _directions_and_origin(fields, num_dims, axes)
    return affine_of(columns[:num_axes, :num_axes], origin[:num_axes], signs)


def _directions_and_origin(
    fields: Fields, num_dims: int, axes: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps along the axes of the grid, as columns, and the place of the first voxel.

    The place is 0 if the header does not have it.
    """
    space_dims = len(axes)
    text = fields.text("space origin", "")
    if "nan" in text.lower():
        raise fields.rare("a space origin that is no place")
    vectors = _vectors(text) or [(0.0,) * space_dims]
    origin = vectors[0]
    if origin is None or len(vectors) > 1 or len(origin) != space_dims:
        raise fields.damaged(
            "space origin", f"one vector of {space_dims} finite numbers such as (0,0,0)"
        )

    if "space directions" not in fields:
        raise fields.rare("no space directions")
    entries = _vectors(fields.text("space directions"))
    vectors = []
    for axis, vector in enumerate(entries):
        if axis in axes and vector is not None and len(vector) == space_dims:
            vectors.append(vector)
    if len(entries) != num_dims or len(vectors) != space_dims:
        raise fields.damaged(
            "space directions",
            f"{num_dims} vectors of {space_dims} finite numbers, none for channels",
        )

    # ITK computes length and direction: their rounding is repeated.
    columns = np.array(vectors).T
    lengths = np.sqrt((columns * columns).sum(axis=0))
    if not np.isfinite(lengths).all() or not np.isfinite(1 / lengths).all():
        raise fields.damaged("space directions", "vectors that are as long as a voxel")
    return columns * (1 / lengths) * lengths, np.array(origin)


def _vectors(text: str) -> list[tuple[float, ...] | None]:
    """Return the vectors in a text, None for those without numbers; no vectors for other text."""
    if _ENTRIES.sub("", text).strip():
        return []
    vectors = []
    for entry in _ENTRIES.findall(text):
        words = entry[1:-1].split(",")
        vectors.append(finite_numbers([word.strip() for word in words]))
    return vectors


def _lines_of_place(fields: Fields, units: list[str], header: VolumeHeader) -> tuple[str, ...]:
    """Return the lines that a writer keeps of a header, as they place its grid; () for none.

    They have no entry of a channel axis. In a space without a name, only lengths that all have one
    unit, other than mm, have to be kept.
    """
    line_of_units = "space units: " + " ".join(f'"{unit}"' for unit in units)
    if "space" in fields:
        entries = _ENTRIES.findall(fields.text("space directions", ""))
        directions = [entry for entry in entries if entry.startswith("(")]
        lines = [f"space: {fields.text('space')}", "space directions: " + " ".join(directions)]
        origin = fields.text("space origin", "")
        if origin:
            lines.append(f"space origin: {origin}")
        if len(units) == 3 and all(re.fullmatch(r"[\w ?\udcb5]{0,30}", unit) for unit in units):
            lines.append(line_of_units)
        return tuple(lines)

    is_one_unit = len(set(units)) == 1 and len(units) == len(header.grid_shape)
    if not is_one_unit or text_header.MM_PER_UNIT.get(units[0].lower(), 1.0) == 1.0:
        return ()
    return (*_geometry_lines(*text_header.place_in_lps(header)), line_of_units)


def _units(fields: Fields, key: str = "units") -> list[str]:
    """Return the names of units in a field, of each axis or of each dimension of the space."""
    found = re.findall(r'"([^"]*)"|([^\s"]+)', fields.text(key, ""))
    return [(quoted or plain).strip() for quoted, plain in found]
