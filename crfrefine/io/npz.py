"""NumPy's arrays of (channel, z, y, x) without geometry: nnU-Net's .npz, and .npy.

Never unpickled.
"""

from __future__ import annotations

import math
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.base.array_types import Shape
from crfrefine.base.axes import Axes
from crfrefine.base.text import listed, see, shorten, shorten_value
from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io import streams
from crfrefine.io.volume import FileHeader, VolumeHeader
from crfrefine.io.writing import VoxelsToWrite, atomic_files

_MAX_ARRAY_HEADER = 1 << 16
# numpy reads headers by Python's parser, which counts the depth of expressions for all threads
# together (https://github.com/python/cpython/issues/106905): one thread at a time.
_PARSER = threading.Lock()
_NPY_MAGIC = b"\x93NUMPY"
NAME = "NumPy array"  # of the format, in the table of `crfrefine.io.formats`
_CONTAINERS = {zipfile.ZIP_STORED: "raw", zipfile.ZIP_DEFLATED: "deflate"}
KINDS = ("probabilities", "logits")


def recognizes(start: bytes) -> bool:
    """Return whether it is an array, or an archive whose first member has the name of one."""
    if start.startswith(_NPY_MAGIC):
        return True
    length = int.from_bytes(start[26:28], "little")
    member = start[30 : 30 + length].decode("latin-1")
    return start.startswith(b"PK\3\4") and (member.endswith(".npy") or member in KINDS)


def read_header(path: Path) -> VolumeHeader:
    """Read the header of an .npy, or of the one array named probabilities or logits."""
    stored = ArrayHeader(path)
    header = stored.volume_header()
    if stored.voxels.inner == 1:
        return in_fortran_order(header)
    return header


class ArrayHeader(FileHeader):
    """The header of an array in a separate file or in an archive."""

    format = NAME

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path = path
        if streams.read_start(path).startswith(_NPY_MAGIC):
            with path.open("rb") as file:
                self.shape, source = _read_array_header(file, path, "the array")
                self.voxels = source._replace(start=file.tell())
            return
        self.format = "nnU-Net npz"
        self.has_tail = True  # the rest of the archive
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
            # The last two are for invalid versions and names.
            raise UnsupportedFormatError(
                f"{path}: not an .npz file, or cut off ({error}); pickles are never read"
            ) from None
        with archive:
            info = _find_member(archive, path)
            assert archive.fp is not None
            start = archive.fp.tell()
        self.kind = info.filename.removesuffix(".npy")
        name = f"the array {self.kind!r}"
        container = _CONTAINERS[info.compress_type]
        checksum = (info.file_size, info.CRC)
        # This inflates faster than the zipfile module.
        with streams.open_bytes(path, container, start, checksum=checksum) as reader:
            self.shape, source = _read_array_header(reader, path, name)
            offset = reader.tell()
        most_packed = min(info.compress_size, path.stat().st_size)
        most_bytes = min(info.file_size, streams.MAX_RATIO * most_packed)
        if math.prod(self.shape) * source.dtype.itemsize > most_bytes:
            raise UnsupportedFormatError(
                f"{path}: damaged: {name} has shape {self.shape}, but not as many values"
            )
        self.voxels = source._replace(
            encoding=container, start=start, offset=offset, checksum=checksum
        )

    def grid(self) -> tuple[Shape, int]:
        """Return the voxels along each axis, and the channels, which are first."""
        return self.shape[:0:-1], self.shape[0]

    def source(self) -> streams.VoxelSource:
        """Return the place of the values."""
        return self.voxels

    def affine(self, grid_shape: Shape) -> None:
        """Return nothing, as an array has no geometry."""


def in_fortran_order(header: VolumeHeader) -> VolumeHeader:
    """Return the header of an array with reversed axes, the channels of a voxel together."""
    num_axes = header.num_axes
    axes = (*reversed(range(num_axes)), *range(num_axes, 3))
    stored = replace(header, grid_shape=header.stored_grid, family=NAME)
    return replace(header, turned=(stored, Axes(axes)))


def _read_array_header(stream: Any, path: Path, what: str) -> tuple[Shape, streams.VoxelSource]:
    """Return the shape of an array, (channel, [z,] y, x), and its values in the bytes that follow.

    In Fortran's order, the channels of a voxel are together. Raise UnsupportedFormatError if the
    array holds no channels.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            read = np.lib.format.read_array_header_1_0
        else:
            read = np.lib.format.read_array_header_2_0
        with _PARSER:
            shape, is_fortran, dtype = read(stream, _MAX_ARRAY_HEADER)
    except CrfRefineError:
        raise
    except Exception as error:  # numpy's parser raises errors of many kinds.
        reason = str(error).partition(": <ast.")[0]  # The rest is the address of an object.
        raise UnsupportedFormatError(f"{path}: {what} is damaged ({shorten(reason)})") from None
    if dtype.hasobject:
        raise UnsupportedFormatError(
            f"{path}: {what} is a pickle, which may run code and is never read; save it as float32"
        )
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise UnsupportedFormatError(
            f"{path}: {what} has shape {shorten_value(shape)}; "
            "expected (channel, z, y, x) or (channel, y, x)"
        )
    if dtype.kind not in "iuf":
        raise UnsupportedFormatError(f"{path}: {what} holds {dtype}; expected real numbers")
    return shape, streams.VoxelSource(path, "raw", dtype, inner=1 if is_fortran else None)


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write an array of (channels, [z,] y, x), named "probabilities" or "logits" in an .npz."""
    header = {
        "descr": np.lib.format.dtype_to_descr(voxels.dtype),
        "fortran_order": False,
        "shape": voxels.shape,
    }
    with atomic_files(voxels.path) as (file,):
        if voxels.path.name.lower().endswith(".npy"):
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(voxels.blocks())
            return
        # It has a fixed time: the same data give the same bytes.
        entry = zipfile.ZipInfo(f"{voxels.kind}.npy")
        entry.compress_type = zipfile.ZIP_DEFLATED
        is_large = math.prod(voxels.shape) * voxels.dtype.itemsize > 1 << 30
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(entry, "w", force_zip64=is_large) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            member.writelines(voxels.blocks())


def _find_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Return the member of an archive with the scores; its file is at the member's first byte."""
    members = archive.namelist()
    keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
    present = [kind for kind in KINDS if kind in keys]
    if len(present) != 1 and "softmax" in keys:
        raise UnsupportedFormatError(
            f"{path}: the array `softmax` is that of nnU-Net version 1, "
            "on the network's cropped grid without its place in the image\n"
            "  Export it with nnU-Net version 2, "
            "or resample it to the image's grid and store it as 4-D NIfTI "
            f"({see('docs/reference/formats.md#grids')})."
        )
    if len(present) != 1:
        found = listed(keys) or "none"
        raise UnsupportedFormatError(
            f"{path}: expected one array named probabilities or logits, found {found}"
        )
    info = archive.getinfo(f"{present[0]}.npy")
    is_encrypted = info.flag_bits & 1
    if info.compress_type not in _CONTAINERS or is_encrypted:
        raise UnsupportedFormatError(
            f"{path}: compressed or encrypted in a way that numpy does not write"
        )
    if info.header_offset < 0:
        raise UnsupportedFormatError(
            f"{path}: damaged zip directory: {present[0]!r} begins before the file; "
            "copy or export it again"
        )
    try:
        archive.open(info).close()  # Goes to the first byte of the member.
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise UnsupportedFormatError(
            f"{path}: damaged zip directory ({error}); copy or export it again"
        ) from None
    return info
