"""Pairs of a header and its voxels, `.hdr` and `.img`: NIfTI, and Analyze 7.5, which is only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crfrefine.errors import InputError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.nifti import LONGEST, header_to_write, interpret, parse
from crfrefine.io.streams import inflated, open_bytes

if TYPE_CHECKING:
    from crfrefine.io.volume import Volume, VolumeHeader, VoxelsToWrite

_BYTE_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_ENDINGS = (".img", ".img.gz")


def recognizes(start: bytes) -> bool:
    """Return whether it is the header of a pair: its length, a sane number of dimensions, and not the magic of a single file."""
    block = inflated(start) or start
    if block[344:347] == b"n+1" or block[4:7] == b"n+2":
        return False
    if block[4:7] == b"ni2":
        return True
    return any(int.from_bytes(block[:4], order) == 348 and 1 <= int.from_bytes(block[40:42], order) <= 7 for order in _BYTE_ORDERS)


def read_header(path: Path) -> VolumeHeader:
    """Read only the header."""
    with open_bytes(path, "raw") as reader:
        header = parse(reader.read(LONGEST), path, is_pair=True)
    voxels = _voxels_of(path)
    return interpret(header, path, voxels, "gzip" if voxels.name.lower().endswith(".gz") else "raw")


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write a NIfTI pair with the geometry of another volume; channels get the fourth dimension of the file; not compressed."""
    header = header_to_write(voxels, like, is_pair=True)
    with atomic_files(*voxels.voxel_files, voxels.path) as (voxel_file, header_file):
        voxel_file.writelines(voxels.one_after_the_other())
        header_file.write(header)


def _voxels_of(path: Path) -> Path:
    """Return the file with the voxels of a header: the same name, in upper case where the header's suffix is."""
    stem = path.name[:-4]
    for ending in _ENDINGS:
        for written in (ending, ending.upper()):
            if (found := path.with_name(stem + written)).exists():
                return found
    raise InputError(f"{path}: its voxels are missing; expected them in {stem + _ENDINGS[0]} beside it, put both files into one folder")
