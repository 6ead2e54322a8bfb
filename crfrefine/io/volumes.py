"""One way to read any of the formats: the header first, then the voxels into an array of the caller's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import CapacityError, UnsupportedFormatError
from crfrefine.failures import reading
from crfrefine.io.formats import FORMATS, Format
from crfrefine.io.paths import LOGITS_SUFFIXES, format_of, require_file
from crfrefine.io.recognition import format_to_read, is_allowed, recognize, way_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read what a file says about its volume, without its voxels.

    Args:
        path: its suffix names the format; its content does where that says something else, and `misnamed` tells.
        suffixes: the formats that may be.

    Raises:
        UnsupportedFormatError: unknown suffix, damaged or cut off, or a layout that would have to be guessed.
        InputError: no such file, or it cannot be opened.
        UnexpectedError: the reader was not prepared for what is in the file.
    """
    path = Path(path)
    known = format_to_read(path, suffixes)
    require_file(path)
    with reading(path):
        try:
            return _read_as(path, known)
        except UnsupportedFormatError as error:
            found = recognize(path)
            if found is None or found is known:
                raise
            # The voxels of other files are looked for, and kept from being replaced, by the name of the header.
            if isinstance(found, Format) and is_allowed(found, suffixes) and not found.load().voxel_files(path):
                return _read_as(path, found)
            raise UnsupportedFormatError(f"{error}\n  {way_out(found)}") from None


def allocate(header: VolumeHeader) -> NDArray[np.float32]:
    """Return an array for the voxels of a file, (channels, [z,] y, x), not filled.

    Raises:
        CapacityError: it does not fit into memory.
    """
    return allocate_shape((header.num_channels, *header.grid_shape[::-1]), header.path)


def allocate_shape(shape: tuple[int, ...], path: Path) -> NDArray[np.float32]:
    """Return a float32 array of a shape, not filled; raise CapacityError that names the file where memory does not suffice."""
    try:
        return np.empty(shape, np.float32)
    except (MemoryError, ValueError):
        size = 4e-9 * float(np.prod(np.array(shape, np.float64)))
        raise CapacityError(f"{path}: its voxels take {size:.1f} GB as float32, more than there is memory") from None


def read_into(header: VolumeHeader, values: NDArray[np.float32]) -> None:
    """Read the voxels of a file, scaled.

    Args:
        header: of `read_header`.
        values: (channels, [z,] y, x) C-contiguous; written to.

    Raises:
        UnsupportedFormatError: damaged or cut off.
        InputError: values that are NaN or infinite.
        UnexpectedError: the reader was not prepared for what is in the file.
    """
    with reading(header.path):
        _named(header.family).load().read_into(header, values)


def _read_as(path: Path, known: Format) -> VolumeHeader:
    header = replace(known.load().read_header(path), family=known.name)
    if format_of(path) is known:
        return header
    return replace(header, misnamed=f"the file is {known.name}, although its name does not say so; it is read as that")


def _named(family: str) -> Format:
    return next(known for known in FORMATS if known.name == family)
