"""DICOM series: a folder of slices, files or frames, as one volume. It is never written: label maps become DICOM segmentations."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.geometry import is_sheared, require_usable, spacing_of
from crfrefine.base.text import counted
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.decode import VoxelStream, as_bytes
from crfrefine.io.dicom_files import (
    has_frames,
    interpreting,
    is_dicom,
    is_image,
    iter_frames,
    read_dataset,
    require_decoder,
    require_size,
)
from crfrefine.io.dicom_frames import FrameDecoder
from crfrefine.io.dicom_slices import Slice, arrange, read_slices
from crfrefine.io.streams import BlockReader, cannot_read, cut_off, read_start
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume

_NAMED = "dcm"


def recognizes(start: bytes) -> bool:
    """Return whether it is a file of several frames; any other is a slice at most, and the series is its folder."""
    return has_frames(start)


def read_header(path: Path) -> VolumeHeader:
    """Read the headers of all slices in a folder, or of the frames of a file.

    Raises:
        UnsupportedFormatError: a file is damaged or no such slice.
        InputError: the files are not one volume; the message names them.
    """
    slices: list[Slice] = []
    others = []
    for file in _files(path):
        start = read_start(file)
        if not is_dicom(start) and file.suffix.lower().endswith(_NAMED):
            raise UnsupportedFormatError(f"{file}: not a DICOM file, although its name says so: it begins with {start[:12]!r}")
        found = read_slices(file) if is_image(start) else []
        slices += found
        if not found:
            others.append(file.name)
    if not slices:
        raise InputError(f"{path}: no slice of a DICOM series in this folder")
    series = arrange(path, slices)
    first = series.slices[0]
    affine = series.affine
    require_usable(affine, 3, path)
    for file, group in groupby(sorted(series.slices, key=lambda one: one.path), lambda one: one.path):
        frames = list(group)
        require_size(file, frames[0].syntax, len(frames) * math.prod(first.shape) * first.stored.itemsize)
    notes = list(series.notes)
    if others:
        notes.append(f"{counted(len(others), 'file')} without slices, such as {others[0]}, left aside")
    if is_sheared(affine):
        notes.append("the slices are shifted against each other (a tilted gantry); the geometry keeps that")
    return VolumeHeader(
        path=path,
        format="DICOM series",
        grid_shape=(first.shape[1], first.shape[0], len(series.slices)),
        num_channels=1,
        dtype=_type_of(series.slices).newbyteorder("=").name,
        spacing=spacing_of(affine),
        affine=affine,
        template=series,
        notes=tuple(notes),
        details=(
            ("slices", f"{first.name} to {series.slices[-1].name}"),
            ("series", first.title or first.series),
            *series.identity.details,
        ),
        identity=series.identity,
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the slices one after the other."""
    slices = header.template.slices
    dtype = _type_of(slices)
    is_scaled_here = dtype == np.float32
    with closing(BlockReader(_voxels(slices, is_scaled_here))) as reader:
        slope, intercept = (1.0, 0.0) if is_scaled_here else (slices[0].slope, slices[0].intercept)
        yield VoxelStream(reader, dtype, header.path, lambda: None, slope=slope, intercept=intercept)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the folder; a file of several frames has its voxels in itself."""
    try:
        return tuple(_files(path)) if path.is_dir() else ()
    except InputError:
        return ()


def write(content: Content, like: Volume, threads: int) -> None:
    """Refuse: images are not written."""
    raise UnsupportedFormatError(f"{content.path}: a DICOM series cannot be written; name a file, such as NAME.nii.gz")


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise cannot_read(folder, error) from error


def _type_of(slices: tuple[Slice, ...]) -> np.dtype[Any]:
    """Return the type of the stored numbers, if one scaling holds for all slices; else float32, of scaled ones."""
    kinds = {(one.slope, one.intercept, one.stored.newbyteorder("<")) for one in slices}
    if len(kinds) == 1:
        return slices[0].stored.newbyteorder("<")
    return np.dtype("<f4")


def _voxels(slices: tuple[Slice, ...], is_scaled_here: bool) -> Generator[memoryview, None, None]:
    """Yield the voxels of a series as bytes; one slice is in memory."""
    for one, stored in _stored(slices):
        if is_scaled_here:
            stored = (stored * one.slope + one.intercept).astype(np.float32)
        yield as_bytes(np.ascontiguousarray(stored))


def _stored(slices: tuple[Slice, ...]) -> Iterator[tuple[Slice, NDArray[Any]]]:
    """Yield each slice with its stored numbers, (rows, columns): of each, the bits that count."""
    with FrameDecoder() as decoder:
        for path, group in groupby(slices, lambda one: one.path):
            found = list(group)
            if found[0].is_compressed:
                require_decoder(found[0].syntax, path)
                frames: Iterator[NDArray[Any]] = (decoder.frame(path, one.frame or 0, one.shape, one.stored) for one in found)
            elif found[0].frame is not None:
                frames = iter_frames(path, [one.frame for one in found if one.frame is not None])
            else:
                frames = map(_pixels, found)
            for one in found:
                yield one, _counting_bits(one, next(frames))


def _pixels(one: Slice) -> NDArray[Any]:
    """Return the stored numbers of an uncompressed file with one slice."""
    with interpreting(one.path):
        content = read_dataset(one.path, (), with_pixels=True).get("PixelData") or b""
        return np.frombuffer(content, one.stored, count=min(math.prod(one.shape), len(content) // one.stored.itemsize))


def _counting_bits(one: Slice, stored: NDArray[Any]) -> NDArray[Any]:
    """Return the bits that count of stored numbers, (rows, columns)."""
    if stored.dtype.kind not in "iu":
        raise UnsupportedFormatError(f"{one.path}: voxels of type {stored.dtype}; expected whole numbers with slope and intercept")
    if stored.size != math.prod(one.shape):
        raise cut_off(one.path, f"{math.prod(one.shape)} voxels", f"it holds {stored.size}")
    stored = stored.reshape(one.shape).astype(one.stored.newbyteorder("="), copy=False)
    bits, high = one.bits
    unused = 8 * one.stored.itemsize - 1 - high
    if bits < 8 * one.stored.itemsize:
        # Bits that do not count may hold anything, such as an overlay; a shift to the left and back drops them, and keeps the sign.
        stored = (stored << unused) >> (unused + high + 1 - bits)
    return stored
