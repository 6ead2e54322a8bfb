"""Segmentations of 3D Slicer, `.seg.nrrd`, with one layer: an NRRD label map, whose lines about segments are not read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import nrrd

if TYPE_CHECKING:
    from crfrefine.io.volume import VolumeHeader

open_voxels, voxel_files, write = nrrd.open_voxels, nrrd.voxel_files, nrrd.write


def recognizes(start: bytes) -> bool:
    """Return whether it is an NRRD header with lines about segments."""
    return start.startswith(b"NRRD000") and nrrd.has_segments(start)


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    Raises:
        UnsupportedFormatError: the segments are in several layers.
    """
    header = nrrd.read_header(path)
    if header.num_channels > 1:
        raise UnsupportedFormatError(
            f"{path}: the segments are in {header.num_channels} layers, as where they overlap; expected one layer\n"
            "  In 3D Slicer's module Segmentations, collapse the labelmap layers, or export the segments to a labelmap."
        )
    return header
