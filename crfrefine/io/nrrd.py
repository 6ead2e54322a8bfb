"""NRRD, `.nrrd` and `.nhdr`: a text header of `field: value`, which an empty line ends, then the voxels; written as gzip data."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.streams import VoxelSource, write_gzip
from crfrefine.io.text_header import (
    LPS,
    Fields,
    affine_of,
    finite_numbers,
    grid_and_channels,
    header_lines,
    lines_to_write,
    voxel_path,
)
from crfrefine.io.volume import RareHeaderError, Volume, VolumeHeader, VoxelsToWrite, volume_header

NAME = "NRRD"

# All fields of the format: any other name is damage, and its value would be missed.
_FIELDS = (
    *(
        "type",
        "dimension",
        "sizes",
        "encoding",
        "endian",
        "data file",
        "line skip",
        "byte skip",
        "content",
        "number",
        "block size",
    ),
    *(
        "space",
        "space dimension",
        "space directions",
        "space origin",
        "space units",
        "measurement frame",
    ),
    *(
        "spacings",
        "thicknesses",
        "axis mins",
        "axis maxs",
        "centers",
        "centerings",
        "labels",
        "units",
        "kinds",
    ),
    *("min", "max", "old min", "old max", "sample units"),
)
_KNOWN = {name.replace(" ", ""): "centers" if name == "centerings" else name for name in _FIELDS}
_INTEGERS = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong",
        "long long",
        "long long int",
        "signed long long",
        "signed long long int",
        "int64",
        "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
}
_TYPES = {
    "float": "f4",
    "double": "f8",
    **{name: kind for kind, names in _INTEGERS.items() for name in names},
}
# Of types that have another name in NumPy.
_WRITTEN_TYPES = {"float32": "float", "float64": "double"}
_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_RARE_ENCODINGS = ("hex", "ascii", "text", "txt")
_MAX_DIMS = 16
_GRID_KINDS = ("domain", "space", "time", "none", "???")
_CHANNEL_KINDS = (
    "list",
    "point",
    "vector",
    "covariant-vector",
    "normal",
    "scalar",
    "rgb-color",
    "rgba-color",
)


def recognizes(start: bytes) -> bool:
    """Return whether it begins with the format's magic, whatever the version."""
    return start.startswith(b"NRRD000")


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end and check every field that is used.

    Segments of 3D Slicer are read only from one layer.
    """
    fields, end = _fields(path)
    num_dims = fields.whole("dimension", limits=(1, _MAX_DIMS))
    sizes = fields.sizes("sizes", num_dims)
    channel_axis = _channel_axis(fields, num_dims)
    axes = [axis for axis in range(num_dims) if axis != channel_axis]
    channels = 1 if channel_axis is None else sizes[channel_axis]
    if channels > 1 and path.name.lower().endswith(".seg.nrrd"):
        raise UnsupportedFormatError(
            f"{path}: the segments are in {channels} layers, as where they overlap; expected one layer\n"
            "  In 3D Slicer's module Segmentations, collapse the labelmap layers, or export the segments to a labelmap."
        )
    grid = grid_and_channels(path, tuple(sizes[axis] for axis in axes), channels)
    source = _source(fields, end, inner=math.prod(sizes[:channel_axis]) if channels > 1 else None)
    affine = _affine(fields, num_dims, axes, len(grid[0]))
    template = _geometry_of(fields) if "space" in fields and len(axes) == len(grid[0]) == 3 else ()
    return volume_header(path, source, NAME, *grid, affine, template=template)


def _fields(path: Path) -> tuple[Fields, int]:
    """Return the fields, and the bytes of the header, which an empty line ends.

    It may be missing where the voxels are apart.
    """
    fields = Fields(path, NAME, ": ")
    end = 0
    for number, line, end in header_lines(path):
        if number == 1:
            if not re.fullmatch(rb"NRRD000[1-6]\s*", line):
                raise UnsupportedFormatError(
                    f"{path}: not an NRRD file, although its name says so: it begins with {line[:12]!r}"
                )
            continue
        if not line.strip():
            return fields, end
        if line.startswith(b"#"):
            continue
        name, _, value = line.partition(b":")
        if len(name) < 100:
            field = _KNOWN.get(name.strip().lower().replace(b" ", b"").decode("latin-1"))
        else:
            field = None
        if field is not None and not value.startswith(b"="):
            fields.add(field, value)
            if field == "data file" and fields.text(field).upper().split()[:1] == ["LIST"]:
                return fields, end  # The names of the files follow.
        elif b":=" not in line:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            problem = f"line {number} is not a `field: value` of the format: {shown!r}"
            raise UnsupportedFormatError(
                f"{path}: damaged NRRD header, or the file is cut off: {problem}"
            )
    if "data file" not in fields:
        raise UnsupportedFormatError(
            f"{path}: the file is cut off: no empty line ends its header; copy or export it again"
        )
    return fields, end


def _channel_axis(fields: Fields, num_dims: int) -> int | None:
    """Return the one axis that is not a grid axis, by its kind or because it has no direction.

    None if all are grid axes.
    """
    kinds = fields.text("kinds", "").lower().split() or ["none"] * num_dims
    if len(kinds) != num_dims or "complex" in kinds:
        raise fields.damaged(
            "kinds",
            f"{num_dims} kinds, such as domain for axes of the grid and vector for channels, of real numbers",
        )
    unusual = set(kinds).difference(_GRID_KINDS, _CHANNEL_KINDS)
    if unusual:
        raise RareHeaderError(f"the kind {shorten(min(unusual), 60)!r}")
    without = [
        word == "none"
        for word in re.findall(r"none|\([^()]*\)", fields.text("space directions", "").lower())
    ]
    if len(without) != num_dims or all(without):
        without = [False] * num_dims
    channel_axes = [
        axis
        for axis, kind in enumerate(kinds)
        if kind in _CHANNEL_KINDS or (kind in _GRID_KINDS[2:] and without[axis])
    ]
    if len(channel_axes) > 1:
        raise UnsupportedFormatError(
            f"{fields.path}: {len(channel_axes)} axes of values cannot be split into grid and channels"
        )
    if channel_axes:
        return channel_axes[0]
    return None


def _source(fields: Fields, end: int, *, inner: int | None) -> VoxelSource:
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
        path = voxel_path(fields, "data file", is_compressed=encoding == "gzip")
        start = 0
    # ITK takes the lowest 32 bits of a larger number.
    if fields.whole("line skip", "0", limits=(0, 1 << 30)) or word in _RARE_ENCODINGS:
        raise RareHeaderError("lines to skip, or voxels as text")
    if encoding is None:
        raise fields.damaged("encoding", "raw, gzip, ascii or hex")
    # -1 means that the voxels end the file.
    skipped = fields.whole("byte skip", "0", limits=(-1 if encoding == "raw" else 0, 1 << 60))
    endian = fields.text("endian", "little" if kind[1] == "1" else None).lower()
    if endian not in ("little", "big"):
        raise fields.damaged("endian", "little or big")
    dtype = np.dtype(kind).newbyteorder(">" if endian == "big" else "<")
    return VoxelSource(
        path, encoding, dtype, inner, start=-1 if skipped < 0 else start, offset=max(skipped, 0)
    )


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write compressed voxels: .nrrd in one file, .nhdr with a .raw.gz beside it.

    The channels of a voxel are put together.
    """
    lines = lines_to_write(voxels.path, like, NAME, _geometry_lines)
    sizes = voxels.shape[::-1]
    kinds = ["domain"] * len(like.spacing)
    if voxels.num_channels is not None:
        sizes = (sizes[-1], *sizes[:-1])
        kinds = ["vector", *kinds]
        lines = tuple(
            re.sub(r"^space directions:", "space directions: none", line) for line in lines
        )
    header = (
        "NRRD0004",
        f"type: {_WRITTEN_TYPES.get(voxels.dtype.name, voxels.dtype.name)}",
        f"dimension: {len(sizes)}",
        *lines[:1],
        "sizes: " + " ".join(map(str, sizes)),
        *lines[1:],
        "kinds: " + " ".join(kinds),
        *(["endian: little"] if voxels.dtype.itemsize > 1 else []),
        "encoding: gzip",
        *(f"data file: {file.name}" for file in voxels.voxel_files),
        "" if voxels.voxel_files else "\n",
    )
    with atomic_files(*voxels.voxel_files, voxels.path) as files:
        files[-1].write("\n".join(header).encode())
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
    return "(" + ",".join(repr(float(value)) for value in values) + ")"


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
    """Return the affine to RAS+ mm of the grid, which has the first `num_axes` of the axes that are not channels."""
    if "axis mins" in fields:
        raise RareHeaderError("axis mins")
    if not _IN_SPACE & set(fields):
        words = fields.text("spacings", " ".join(["1"] * num_dims)).split()
        spacings = finite_numbers([words[axis] for axis in axes if axis < len(words)])
        if spacings is None or len(words) != num_dims or 0.0 in spacings:
            raise fields.damaged(
                "spacings", f"{num_dims} finite numbers other than 0, NaN for channels"
            )
        return affine_of(np.diag(spacings[:num_axes]), np.zeros(num_axes), LPS)
    # A space without a name counts as LPS, as in ITK.
    if "space" in fields:
        signs = _SPACES.get(re.sub(r"[- ]", "", fields.text("space").lower()))
    else:
        signs = LPS
    if (
        signs is None
        or ("space" in fields) == ("space dimension" in fields)
        or "spacings" in fields
    ):
        raise RareHeaderError(
            f"the space {shorten(fields.text('space', ''), 60)!r}, or spacings in it"
        )
    space_dims = 3 if "space" in fields else fields.whole("space dimension", limits=(1, _MAX_DIMS))
    if space_dims != len(axes):
        raise UnsupportedFormatError(
            f"{fields.path}: a grid of {len(axes)} axes in a space of {space_dims} dimensions; expected as many axes as dimensions"
        )
    if "nan" in fields.text("space origin", "").lower():
        raise RareHeaderError("a space origin that is no place")
    origin, *others = _vectors(fields.text("space origin", "")) or [(0.0,) * space_dims]
    if origin is None or others or len(origin) != space_dims:
        raise fields.damaged(
            "space origin", f"one vector of {space_dims} finite numbers such as (0,0,0)"
        )
    if "space directions" not in fields:
        raise RareHeaderError("no space directions")
    entries = _vectors(fields.text("space directions"))
    vectors = [entries[axis] for axis in axes if axis < len(entries)]
    vectors = [vector for vector in vectors if vector is not None and len(vector) == space_dims]
    if len(entries) != num_dims or len(vectors) != len(axes):
        raise fields.damaged(
            "space directions",
            f"{num_dims} vectors of {space_dims} finite numbers, none for channels",
        )
    columns = np.array(vectors, np.float64).T
    lengths = np.array(
        [math.sqrt(sum(value * value for value in vector)) for vector in columns.T.tolist()]
    )
    if not np.isfinite(lengths).all() or not np.isfinite(1 / lengths).all():
        raise fields.damaged("space directions", "vectors that are as long as a voxel")
    # Rounded as by ITK, which computes length and direction.
    columns = columns * (1 / lengths) * lengths
    return affine_of(columns[:num_axes, :num_axes], np.array(origin[:num_axes]), signs)


def _vectors(text: str) -> list[tuple[float, ...] | None]:
    """Return the vectors in a text, None for `none` or anything but numbers.

    An empty list for other text.
    """
    if _ENTRIES.sub("", text).strip():
        return []
    return [
        finite_numbers([word.strip() for word in entry[1:-1].split(",")])
        for entry in _ENTRIES.findall(text)
    ]


def _geometry_of(fields: Fields) -> tuple[str, ...]:
    """Return the header's lines that place its grid, without the entry of a channel axis."""
    directions = [
        entry for entry in _ENTRIES.findall(fields.text("space directions", "")) if entry[0] == "("
    ]
    lines = [f"space: {fields.text('space')}", "space directions: " + " ".join(directions)]
    if fields.text("space origin", ""):
        lines.append(f"space origin: {fields.text('space origin')}")
    units = fields.text("space units", "")
    if len(units) <= 100 and re.fullmatch(r'\s*"[\w ]*"(?:\s+"[\w ]*"){2}\s*', units, re.ASCII):
        lines.append(f"space units: {units}")
    return tuple(lines)
