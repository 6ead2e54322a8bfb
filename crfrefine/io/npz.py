"""nnU-Net's .npz: one array of (channel, z, y, x) without geometry; never unpickled."""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.base.text import listed, see, shorten, shorten_value
from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.streams import (
    BLOCK_BYTES,
    MAX_RATIO,
    BlockReader,
    ByteReader,
    VoxelStream,
    allocate_array,
    as_bytes,
    cannot_read,
    cut_off,
    open_bytes,
    skip,
)
from crfrefine.io.volume import Volume, VolumeHeader, VoxelsToWrite

MAX_ARRAY_HEADER = 1 << 16

KINDS = ("probabilities", "logits")


def recognizes(start: bytes) -> bool:
    """Return whether it is an archive whose first member is an array, or has the name of the expected one."""
    member = start[30 : 30 + int.from_bytes(start[26:28], "little")].decode("latin-1")
    return start.startswith(b"PK\3\4") and (member.endswith(".npy") or member in KINDS)


def read_header(path: Path) -> VolumeHeader:
    """Read the header of the array named probabilities or logits; raise UnsupportedFormatError without one."""
    with _open(path) as archive:
        key = _choose(path, archive.namelist())
        with _member(archive, key, path) as (_, shape, _, dtype):
            info = archive.getinfo(f"{key}.npy")
    header = header_of(path, "nnU-Net npz", shape, dtype, key)
    if math.prod(shape) * dtype.itemsize > min(info.file_size, MAX_RATIO * min(info.compress_size, path.stat().st_size)):
        raise UnsupportedFormatError(f"{path}: damaged: the array {key!r} has shape {shape}, but not as many values")
    return header


def header_of(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], kind: str | None) -> VolumeHeader:
    """Return the header of an array of (channel, [z,] y, x); raise UnsupportedFormatError for any other."""
    what = "the array" if kind is None else f"the array {kind!r}"
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise UnsupportedFormatError(f"{path}: {what} has shape {shorten_value(shape)}; expected (channel, z, y, x) or (channel, y, x)")
    if dtype.kind not in "iuf":
        raise UnsupportedFormatError(f"{path}: {what} holds {dtype}; expected real numbers")
    return VolumeHeader(path, name, shape[:0:-1], shape[0], dtype.name, spacing=None, affine=None, kind=kind)


def read_array_header(stream: Any, path: Path, what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array: its shape, whether the first axis is the fastest, and its type."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream, MAX_ARRAY_HEADER)
    except CrfRefineError:
        raise
    except Exception as error:  # numpy's parser raises errors of many kinds.
        raise UnsupportedFormatError(f"{path}: {what} is damaged ({shorten(error)})") from None
    if dtype.hasobject:
        raise UnsupportedFormatError(f"{path}: {what} is a pickle, which may run code and is never read; save it as float32")
    return shape, is_fortran, dtype


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the file at its first voxel; one channel follows the other, except in an array in Fortran order."""
    path = header.path
    with _open(path) as archive, _member(archive, str(header.kind), path) as (member, shape, is_fortran, dtype):
        if not is_fortran:
            yield VoxelStream(member, dtype, path, member.check)
            return
        # The last value in the file may be one of the first plane of the first channel.
        flat = allocate_array((math.prod(shape),), path, dtype)
        target = flat.view(np.uint8)
        for start in range(0, target.size, BLOCK_BYTES):
            part = target[start : start + BLOCK_BYTES]
            block = member.read(part.size)
            if len(block) < part.size:
                raise cut_off(path, f"{target.size} bytes of voxels", f"it holds {start + len(block)}")
            part[:] = np.frombuffer(block, np.uint8)
        blocks = (as_bytes(np.ascontiguousarray(channel)) for channel in flat.reshape(shape[::-1]).T)
        yield VoxelStream(BlockReader(blocks), dtype.newbyteorder("<"), path, member.check)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write an array of (channels, [z,] y, x) under the name "probabilities" or "logits"; it has no geometry, and takes one thread."""
    header = {"descr": np.lib.format.dtype_to_descr(voxels.dtype), "fortran_order": False, "shape": voxels.shape}
    entry = zipfile.ZipInfo(f"{voxels.kind}.npy")  # It has a fixed time: the same data give the same bytes.
    entry.compress_type = zipfile.ZIP_DEFLATED
    is_large = math.prod(voxels.shape) * voxels.dtype.itemsize > 1 << 30
    with (
        atomic_files(voxels.path) as (file,),
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(entry, "w", force_zip64=is_large) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for block in voxels.blocks():
            member.write(block)


class _MemberReader:
    """The bytes of one member of a zip archive, inflated several times faster than by the zipfile module."""

    def __init__(self, reader: ByteReader, info: zipfile.ZipInfo, path: Path) -> None:
        from isal import isal_zlib

        self._reader, self._info, self._path = reader, info, path
        self._remaining = info.file_size
        self._crc, self._crc32 = 0, isal_zlib.crc32

    def read(self, size: int = sys.maxsize, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        data = self._reader.read(min(size, self._remaining))
        self._remaining -= len(data)
        self._crc = self._crc32(data, self._crc)
        return data

    def check(self) -> None:
        """Read to the end and compare the checksum."""
        skip(self)
        if self._crc != self._info.CRC:
            raise UnsupportedFormatError(f"{self._path}: damaged: the checksum is wrong; copy or export it again")


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:  # The last two: invalid versions and names.
        raise UnsupportedFormatError(f"{path}: not an .npz file, or cut off ({error}); pickles are never read") from None
    with archive:
        yield archive


def _choose(path: Path, members: list[str]) -> str:
    """Return the name of the array with the scores."""
    keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
    present = [kind for kind in KINDS if kind in keys]
    if len(present) == 1:
        return present[0]
    if "softmax" in keys:
        raise UnsupportedFormatError(
            f"{path}: the array `softmax` is that of nnU-Net version 1, on the network's cropped grid without its place in the image\n"
            "  Export it with nnU-Net version 2, or resample it to the image's grid and store it as 4-D NIfTI "
            f"({see('docs/reference/formats.md#grids')})."
        )
    raise UnsupportedFormatError(f"{path}: expected one array named probabilities or logits, found {listed(keys) or 'none'}")


@contextmanager
def _member(archive: zipfile.ZipFile, key: str, path: Path) -> Iterator[tuple[_MemberReader, tuple[int, ...], bool, np.dtype[Any]]]:
    """Open an array at its first value, with its shape, whether the first axis is the fastest, and its type."""
    info = archive.getinfo(f"{key}.npy")
    container = {zipfile.ZIP_STORED: "raw", zipfile.ZIP_DEFLATED: "deflate"}.get(info.compress_type)
    if container is None or info.flag_bits & 1:
        raise UnsupportedFormatError(f"{path}: compressed or encrypted in a way that numpy does not write")
    if info.header_offset < 0:
        raise UnsupportedFormatError(f"{path}: damaged zip directory: {key!r} begins before the file; copy or export it again")
    try:
        archive.open(info).close()  # Goes to the first byte of the member.
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise UnsupportedFormatError(f"{path}: damaged zip directory ({error}); copy or export it again") from None
    assert archive.fp is not None
    with open_bytes(path, container, archive.fp.tell()) as reader:
        member = _MemberReader(reader, info, path)
        shape, is_fortran, dtype = read_array_header(member, path, f"the array {key!r}")
        yield member, shape, is_fortran, dtype
