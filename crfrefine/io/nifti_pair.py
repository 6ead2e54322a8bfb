"""Pairs of a header and its voxels, `.hdr` and `.img`: NIfTI, and Analyze 7.5, which is read alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.geometry import require_usable
from crfrefine.io.nifti_header import check_size, data_offset, geometry, header_to_write, layout, parse, scaling, voxel_type
from crfrefine.io.streams import finish, inflated, open_bytes, skip
from crfrefine.io.volume import VolumeHeader, spacing_of
from crfrefine.io.voxel_files import size_of
from crfrefine.io.voxel_stream import VoxelStream

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume

_BYTE_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_ENDINGS = (".img", ".img.gz")
_ANALYZE_NOTE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"


def recognizes(start: bytes) -> bool:
    """Return whether it is the header of a pair: its length, a sane number of dimensions, and not the magic of a single file."""
    block = inflated(start) or start
    if block[344:347] == b"n+1" or block[4:7] == b"n+2":
        return False
    if block[4:7] == b"ni2":
        return True
    return any(int.from_bytes(block[:4], order) == 348 and 1 <= int.from_bytes(block[40:42], order) <= 7 for order in _BYTE_ORDERS)


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or an unsupported kind of voxel or layout.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    with open_bytes(path, "raw") as reader:
        block = reader.read(540)
    header = parse(block, path, is_pair=True)
    grid_shape, num_channels = layout(tuple(int(size) for size in header.get_data_shape()), path)
    dtype = voxel_type(header, path)
    is_nifti = "magic" in header
    if is_nifti:
        affine, notes = geometry(header, path)
    else:
        affine, notes = np.asarray(header.get_best_affine(), np.float64) + 0.0, (_ANALYZE_NOTE,)
    require_usable(affine, len(grid_shape), path)
    voxels = _voxels_of(path)
    size_of(voxels, path)
    compressed = voxels.name.lower().endswith(".gz")
    check_size(voxels, header, dtype, compressed=compressed)
    version = "Analyze 7.5" if not is_nifti else "NIfTI-2 pair" if header["sizeof_hdr"] == 540 else "NIfTI-1 pair"
    return VolumeHeader(
        path=path,
        format=version + (", gzip" if compressed else ""),
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=dtype.name,
        spacing=spacing_of(affine, len(grid_shape)),
        affine=affine,
        template=header,
        notes=notes,
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the file with the voxels at the first one; one channel follows the other."""
    template: Any = header.template
    slope, intercept = scaling(template)
    voxels = _voxels_of(header.path)
    with open_bytes(voxels) as reader:
        skip(reader, data_offset(template))
        yield VoxelStream(reader, template.get_data_dtype(), voxels, partial(finish, reader), slope=slope, intercept=intercept)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return the file with the voxels."""
    try:
        return (_voxels_of(path),)
    except InputError:
        return ()


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write a NIfTI pair with the geometry of another volume; not compressed.

    Args:
        path: of the header.
        content: voxels; channels get the fourth dimension of the file.
        like: as for NIfTI.
        kind: what the voxels are; not stored in the file.
        voxels: the file that gets the voxels.
        threads: not used.
    """
    assert voxels is not None
    header = header_to_write(content, like)
    header["magic"] = header.pair_magic
    header["vox_offset"] = 0
    with atomic_files(voxels, path) as (voxel_file, header_file):
        voxel_file.writelines(content.one_after_the_other())
        header_file.write(header.binaryblock + bytes(4))  # No extension.


def _voxels_of(path: Path) -> Path:
    """Return the file with the voxels of a header: the same name, in upper case where the header's suffix is."""
    stem = path.name[:-4]
    for ending in _ENDINGS:
        for written in (ending, ending.upper()):
            if (found := path.with_name(stem + written)).exists():
                return found
    raise InputError(f"{path}: its voxels are missing; expected them in {stem + _ENDINGS[0]} beside it, put both files into one folder")
