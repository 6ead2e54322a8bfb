"""NRRD, `.nrrd` and `.nhdr`: a text header of `field: value`, then gzip data; `nrrd_header` reads the header."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.io import nrrd_header
from crfrefine.io.atomic import atomic_file, atomic_files
from crfrefine.io.streams import write_gzip
from crfrefine.io.text_formats import detached_voxels, lines_to_write, open_voxels, volume_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume, VolumeHeader

__all__ = ["open_voxels", "read_header", "recognizes", "voxel_files", "write"]

NAME = "NRRD"

WRITTEN_TYPES = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with the format's magic, whatever the version, and is no segmentation of 3D Slicer."""
    return start.startswith(b"NRRD000") and not has_segments(start)


def has_segments(start: bytes) -> bool:
    """Return whether the beginning of a header has lines about segments."""
    return b"\nSegment0_" in start or b"\nSegmentation_" in start


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or an unsupported layout.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    return volume_header(path, nrrd_header.read(path), NAME)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return the separate files with the voxels of a header."""
    return detached_voxels(nrrd_header.read, path)


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write compressed voxels: .nrrd in one file, .nhdr with a .raw.gz beside it.

    Args:
        path: ends in .nrrd or .nhdr.
        content: voxels; the channels of a voxel are put together.
        like: the lines of its header that place the grid are kept as they are if it came from a file of this format.
        kind: what the voxels are; not stored in the file.
        voxels: the file beside the header that gets the voxels; None: they follow it.
        threads: for compression.

    Raises:
        UnsupportedFormatError: sheared axes, or a number of axes other than two or three.
    """
    write_nrrd(path, content, like, voxels=voxels, threads=threads)


def write_nrrd(path: Path, content: Content, like: Volume, *, voxels: Path | None, threads: int, more_lines: Sequence[str] = ()) -> None:
    """Write a file as `write` does; `more_lines` are added to its header."""
    num_axes = len(like.spacing)
    lines = lines_to_write(path, like, NAME, _geometry_lines)
    sizes = content.grid_shape[::-1]
    has_channels = content.num_channels is not None
    if content.num_channels is not None:
        sizes = (content.num_channels, *sizes)
        lines = tuple(re.sub(r"^space directions:", "space directions: none", line) for line in lines)
    text = "\n".join(
        [
            "NRRD0004",
            f"type: {WRITTEN_TYPES[content.dtype.name]}",
            f"dimension: {len(sizes)}",
            *lines[:1],
            "sizes: " + " ".join(str(size) for size in sizes),
            *lines[1:],
            "kinds: " + " ".join(["vector"] * has_channels + ["domain"] * num_axes),
            *(["endian: little"] if content.dtype.itemsize > 1 else []),
            "encoding: gzip",
            *more_lines,
            *([] if voxels is None else [f"data file: {voxels.name}"]),
            "\n" if voxels is None else "",
        ]
    ).encode()
    if voxels is None:
        with atomic_file(path) as file:
            file.write(text)
            write_gzip(file, content.together(), threads)
    else:
        with atomic_files(voxels, path) as (data_file, header_file):
            write_gzip(data_file, content.together(), threads)
            header_file.write(text)


def _geometry_lines(direction: NDArray[np.float64], origin: NDArray[np.float64], spacing: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS."""
    num_axes = len(spacing)
    vectors = " ".join(_vector(direction[:, axis] * spacing[axis]) for axis in range(num_axes))
    space = "space: left-posterior-superior" if num_axes == 3 else f"space dimension: {num_axes}"
    return (space, f"space directions: {vectors}", f"space origin: {_vector(origin)}")


def _vector(values: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"
