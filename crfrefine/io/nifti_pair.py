"""Pairs of a header and its voxels, `.hdr` and `.img`: NIfTI, and Analyze 7.5, which is only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.io.atomic import atomic_files
from crfrefine.io.nifti import MAX_HEADER, header_to_write, parse
from crfrefine.io.streams import inflated, open_bytes

if TYPE_CHECKING:
    from crfrefine.io.volume import Volume, VolumeHeader, VoxelsToWrite


def recognizes(start: bytes) -> bool:
    """Return whether it is the header of a pair: its length, a sane number of dimensions, and not the magic of a single file."""
    block = inflated(start) or start
    if block[344:347] == b"n+1" or block[4:7] == b"n+2":
        return False
    length, num_dims = block[:4], block[40:42]
    is_little = length == (348).to_bytes(4, "little") and 1 <= int.from_bytes(num_dims, "little") <= 7
    is_big = length == (348).to_bytes(4, "big") and 1 <= int.from_bytes(num_dims, "big") <= 7
    return block[4:7] == b"ni2" or is_little or is_big


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; the voxels have the same name, with an ending in upper case where the header's is."""
    with open_bytes(path, "raw") as reader:
        block = reader.read(MAX_HEADER)
    names = [path.with_name(path.name[:-4] + ending) for ending in (".img", ".IMG", ".img.gz", ".IMG.GZ")]
    voxels = next((name for name in names if name.exists()), names[0])
    return parse(block, path, voxels, "gzip" if voxels.name.lower().endswith(".gz") else "raw", is_pair=True)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write a NIfTI pair with the geometry of another volume; channels get the fourth dimension of the file; not compressed."""
    header = header_to_write(voxels, like, is_pair=True)
    with atomic_files(*voxels.voxel_files, voxels.path) as (voxel_file, header_file):
        voxel_file.writelines(voxels.blocks())
        header_file.write(header)
