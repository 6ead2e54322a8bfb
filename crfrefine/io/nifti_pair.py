"""Pairs of a header and its voxels, `.hdr` and `.img`: NIfTI, and Analyze 7.5, which is only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.errors import InputError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.nifti import MAX_HEADER, header_to_write, interpret, parse
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
        header = parse(reader.read(MAX_HEADER), path, is_pair=True)
    stem = path.name[:-4]
    for ending in (".img", ".IMG", ".img.gz", ".IMG.GZ"):
        if (voxels := path.with_name(stem + ending)).exists():
            return interpret(header, path, voxels, "gzip" if ending.lower().endswith(".gz") else "raw")
    raise InputError(f"{path}: its voxels are missing; expected them in {stem}.img beside it, put both files into one folder")


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write a NIfTI pair with the geometry of another volume; channels get the fourth dimension of the file; not compressed."""
    header = header_to_write(voxels, like, is_pair=True)
    with atomic_files(*voxels.voxel_files, voxels.path) as (voxel_file, header_file):
        voxel_file.writelines(voxels.blocks())
        header_file.write(header)
