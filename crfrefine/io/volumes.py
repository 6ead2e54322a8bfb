"""One way to read any of the formats: the header first, then the voxels into an array of the caller's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import CapacityError
from crfrefine.failures import reading
from crfrefine.io.paths import LOGITS_SUFFIXES, NIFTI, NPZ, require_file, require_suffix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read what a file says about its volume, without its voxels.

    Args:
        path: its suffix names the format.
        suffixes: the formats that may be.

    Raises:
        UnsupportedFormatError: unknown suffix, damaged or cut off, or a layout that would have to be guessed.
        InputError: no such file, or it cannot be opened.
        UnexpectedError: the reader was not prepared for what is in the file.
    """
    path = Path(path)
    require_suffix(path, suffixes)
    require_file(path)
    with reading(path):
        header: VolumeHeader = _module(path).read_header(path)
    return header


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
        _module(header.path).read_into(header, values)


def _module(path: Path) -> ModuleType:
    suffix = require_suffix(path)
    if suffix in NIFTI:
        from crfrefine.io import nifti

        return nifti
    if suffix in NPZ:
        from crfrefine.io import npz

        return npz
    from crfrefine.io import text_formats

    return text_formats
