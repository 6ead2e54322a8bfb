"""Read a file of any supported format: first the header, then the voxels into an array of the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.failures import reading
from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io.allocation import allocate_as
from crfrefine.io.decode import Decoder
from crfrefine.io.formats import FORMATS, Format
from crfrefine.io.paths import LOGITS_SUFFIXES, format_of, require_file
from crfrefine.io.recognition import format_to_read, is_allowed, named_header, recognize, way_out
from crfrefine.io.unchanged import require_unchanged, states_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader
    from crfrefine.io.voxel_stream import VoxelStream


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read the header of a file, without its voxels.

    Args:
        path: its suffix names the format; if the content has another format, that one is used, and `misnamed` names it.
        suffixes: of the accepted formats.

    Raises:
        UnsupportedFormatError: unknown suffix, damaged or cut off, or an ambiguous layout.
        InputError: the file does not exist or cannot be opened.
        UnexpectedError: the reader raised an unexpected exception.
    """
    path = Path(path)
    path = named_header(path)
    known = format_to_read(path, suffixes)
    if not known.is_folder:
        require_file(path)
    with reading(path):
        try:
            return _read_as(path, known)
        except UnsupportedFormatError as error:
            found = recognize(path)
            if found is None or found is known:
                raise
            # The name of the header decides which other files hold voxels, and which files must not be replaced.
            if isinstance(found, Format) and is_allowed(found, suffixes) and not found.load().voxel_files(path):
                return _read_as(path, found)
            raise UnsupportedFormatError(f"{error}\n  {way_out(found)}") from None


def allocate(header: VolumeHeader) -> NDArray[np.float32]:
    """Return an uninitialized array for the voxels of a file, (channels, [z,] y, x).

    Raises:
        CapacityError: the array does not fit into memory.
    """
    return allocate_shape((header.num_channels, *header.grid_shape[::-1]), header.path)


def allocate_shape(shape: tuple[int, ...], path: Path) -> NDArray[np.float32]:
    """Return an uninitialized float32 array for the values of a file; see `allocate_as`."""
    return allocate_as(shape, np.dtype(np.float32), path)


def read_into(header: VolumeHeader, values: NDArray[np.float32]) -> None:
    """Read the voxels of a file, scaled.

    Args:
        header: result of `read_header`.
        values: (channels, [z,] y, x) C-contiguous; written to.

    Raises:
        UnsupportedFormatError: damaged or cut off.
        InputError: values that are NaN or infinite.
        UnexpectedError: the reader raised an unexpected exception.
    """
    with reading(header.path), open_voxels(header) as stream:
        decoder = Decoder(stream, values.shape)
        if stream.is_reversed:
            whole = allocate_as(values.shape, stream.kept_type, header.path, is_reversed=True)
            decoder.fill(whole)
            values[...] = whole
        else:
            decoder.fill(values)
        decoder.finish()


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open a file at its first voxel.

    Raises:
        InputError: the file changed since its header was read, or while the block lasted.
    """
    require_unchanged(header.states)
    try:
        with _open(header) as stream:
            yield stream
    except CrfRefineError:
        require_unchanged(header.states)  # That is the reason then.
        raise
    require_unchanged(header.states)


def _open(header: VolumeHeader) -> AbstractContextManager[VoxelStream]:
    if header.inset is None:
        return _named(header.family).load().open_voxels(header)
    from crfrefine.io.memory_stream import open_inset

    return open_inset(header, open_voxels(header.inset[0]))


def _read_as(path: Path, known: Format) -> VolumeHeader:
    # The checks find numbers of a damaged header that are out of range; warnings about them are not needed.
    before = states_of([path])
    with np.errstate(all="ignore"):
        header = replace(known.load().read_header(path), family=known.name)
        header = replace(header, states=(*before, *states_of(known.load().voxel_files(path))))
    if format_of(path) is known or known.is_folder:
        return header
    return replace(header, misnamed=f"the file is {known.name}, although its name does not say so; it is read as such")


def _named(family: str) -> Format:
    return next(known for known in FORMATS if known.name == family)
