"""The text header of NRRD: where the voxels are, the lines that place the grid, and writing."""

from __future__ import annotations

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
from crfrefine.io.streams import write_gzip

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The names that ITK, Slicer and teem write, of the many that the format allows.
ELEMENT_TYPES = {
    **{"signed char": "i1", "int8": "i1", "unsigned char": "u1", "uint8": "u1", "short": "i2", "int16": "i2"},
    **{"unsigned short": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "unsigned int": "u4", "uint32": "u4"},
    **{"long long int": "i8", "int64": "i8", "unsigned long long int": "u8", "uint64": "u8", "float": "f4", "double": "f8"},
}
WRITTEN_TYPES = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}


def parse(path: Path) -> dict[str, str]:
    """Read the lines `key: value` up to the empty one; keys in lower case, "" holds the offset at which they end."""
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if not block:
        raise UnsupportedFormatError(f"{path}: the file is empty")
    if not block.startswith(b"NRRD0"):
        raise UnsupportedFormatError(f"{path}: not an NRRD file, although its name says so: it begins with {block[:12]!r}")
    fields: dict[str, str] = {}
    offset = 0
    for line in block.splitlines(keepends=True):
        offset += len(line)
        if not line.strip():
            break
        key, separator, value = line.decode("latin-1").partition(":")
        # `key:=value` is free text of the writer's.
        if separator and not value.startswith("=") and not line.startswith(b"#"):
            fields[key.strip().lower()] = value.strip()
    fields[""] = str(offset)
    return fields


def voxel_source(path: Path, fields: Mapping[str, str]) -> VoxelSource | None:
    """Return where the voxels are; None for text, bzip2, slices in files of their own, and for what the header leaves open."""
    name = fields.get("data file", fields.get("datafile", ""))
    dtype = ELEMENT_TYPES.get(fields.get("type", ""))
    container = {"raw": "raw", "gz": "gzip", "gzip": "gzip"}.get(fields.get("encoding", ""))
    is_plain = not ({"byte skip", "byteskip", "line skip", "lineskip"} & set(fields)) and "%" not in name and not name.startswith("LIST")
    if dtype is None or container is None or not is_plain:
        return None
    try:
        sizes = tuple(int(size) for size in fields["sizes"].split())
    except (KeyError, ValueError):
        return None
    kinds = fields.get("kinds", "").lower().split()
    channel_axes = [axis for axis, kind in enumerate(kinds) if kind not in ("domain", "space", "time")]
    if channel_axes not in ([], [0], [len(sizes) - 1]):
        return None
    return VoxelSource(
        path=path.parent / name if name else path,
        offset=0 if name else int(fields[""]),
        container=container,
        dtype=np.dtype(dtype).newbyteorder(">" if fields.get("endian", "little").lower() == "big" else "<"),
        sizes=sizes,
        interleaved=channel_axes == [0],
    )


def geometry(fields: Mapping[str, str], num_axes: int) -> tuple[str, ...]:
    """Return the lines that place the grid, without the entries of a channel axis."""
    directions = [entry for entry in re.findall(r"none|\([^)]*\)", fields.get("space directions", "")) if entry != "none"]
    if "space" not in fields or len(directions) != num_axes or num_axes != 3:
        return ()
    lines = [f"space: {fields['space']}", "space directions: " + " ".join(directions)]
    return tuple(lines + [f"{key}: {fields[key]}" for key in ("space origin", "space units") if key in fields])


def geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return such lines for a grid in LPS."""
    num_axes = len(spacing)
    vectors = " ".join(_vector(direction[:, axis] * spacing[axis]) for axis in range(num_axes))
    space = "space: left-posterior-superior" if num_axes == 3 else f"space dimension: {num_axes}"
    return (space, f"space directions: {vectors}", f"space origin: {_vector(origin)}")


def write(path: Path, values: NDArray[Any], num_axes: int, lines: tuple[str, ...], *, threads: int = 1) -> None:
    """Write compressed voxels: .nrrd in one file, .nhdr with a .raw.gz beside it.

    Args:
        path: ends in .nrrd or .nhdr.
        values: ([z,] y, x), or ([z,] y, x, channels); uint8, uint16 or float32.
        num_axes: 2 or 3.
        lines: place the grid.
        threads: for compression.
    """
    values = np.ascontiguousarray(values)
    has_channels = values.ndim > num_axes
    data_path = written_voxel_file(path)
    if has_channels:
        lines = tuple(re.sub(r"^space directions:", "space directions: none", line) for line in lines)
    text = "\n".join(
        [
            "NRRD0004",
            f"type: {WRITTEN_TYPES[values.dtype.name]}",
            f"dimension: {values.ndim}",
            *lines[:1],
            "sizes: " + " ".join(str(size) for size in values.shape[::-1]),
            *lines[1:],
            "kinds: " + " ".join(["vector"] * has_channels + ["domain"] * num_axes),
            *(["endian: little"] if values.dtype.itemsize > 1 else []),
            "encoding: gzip",
            *([] if data_path is None else [f"data file: {data_path.name}"]),
            "\n" if data_path is None else "",
        ]
    ).encode()
    voxels = as_bytes(values)
    if data_path is None:
        with atomic_file(path) as file:
            file.write(text)
            write_gzip(file, (voxels,), threads)
    else:
        with atomic_files(data_path, path) as (data_file, header_file):
            write_gzip(data_file, (voxels,), threads)
            header_file.write(text)


def _vector(values: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"
