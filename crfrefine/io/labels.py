"""Read label maps and masks piece by piece: a byte or two per voxel, whatever the type in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.labels import MAX_LABEL
from crfrefine.errors import InputError
from crfrefine.io.decode import allocate_array
from crfrefine.io.pieces import decoded_pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader

MAX_OFF = 0.1
"""Largest distance of a label from a whole number: some tools write a scaling that turns 1 into 0.988."""

_PIECE_BYTES = 1 << 20  # In the processor's cache, so that looking at a value twice costs little.


@dataclass(frozen=True)
class WholeNumbers:
    """The values of a file, rounded, and whether they can be labels."""

    # ([z,] y, x), the smallest of uint8 and uint16; without meaning if `low` or `high` is out of range.
    labels: NDArray[np.unsignedinteger[Any]]
    off: float  # largest distance of a value from a whole number
    low: float  # smallest value, rounded
    high: float  # largest value, rounded

    def require_range(self, path: Path) -> None:
        """Raise InputError if a value cannot be a label."""
        if self.low < 0 or self.high > MAX_LABEL:
            raise InputError(f"{path}: not a label map: expected labels from 0 to {MAX_LABEL}, found {self.low:.0f} to {self.high:.0f}")


def read_whole_numbers(header: VolumeHeader) -> WholeNumbers:
    """Read a file with one value per voxel as whole numbers; beyond the result it takes a few megabytes.

    Args:
        header: of the file; the type in it may be any, with a scaling.

    Raises:
        InputError: several values per voxel; values that are NaN or infinite.
        UnsupportedFormatError: damaged or cut off.
        CapacityError: the labels do not fit into memory.
    """
    require_scalar(header, "a label map")
    labels: NDArray[np.unsignedinteger[Any]] = allocate_array(header.grid_shape[::-1], header.path, np.dtype(np.uint8))
    off, low, high = 0.0, np.inf, -np.inf
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        values = piece.values[0]
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            off = max(off, float(np.abs(values - rounded).max()))
            values = rounded
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if low < 0 or high > MAX_LABEL:
            continue  # The rest tells how far they are out of range.
        if high > np.iinfo(labels.dtype).max:
            labels = labels.astype(np.uint16)
        labels[piece.planes] = values
    return WholeNumbers(labels, off, low, high)


def read_where(header: VolumeHeader, condition: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Return where the values of a file with one value per voxel fulfill a condition, ([z,] y, x); it takes a few megabytes besides."""
    require_scalar(header, "a mask")
    found: NDArray[np.bool_] = allocate_array(header.grid_shape[::-1], header.path, np.dtype(np.bool_))
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        found[piece.planes] = condition(piece.values[0])
    return found


def is_nonzero(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where values are not zero."""
    found: NDArray[np.bool_] = values != 0
    return found


def require_scalar(header: VolumeHeader, what: str) -> None:
    """Raise InputError if a file has several values per voxel."""
    if header.num_channels > 1:
        raise InputError(f"{header.path}: expected {what} with one value per voxel, this file has {header.num_channels}")
