"""Read a volume in pieces, consecutive planes of one channel or of all, and label maps and masks so: it is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.failures import reading
from crfrefine.base.labels import MAX_LABEL
from crfrefine.base.parallel import run_ahead
from crfrefine.errors import InputError
from crfrefine.io.decode import Decoder, allocate_array
from crfrefine.io.volume import MAX_BYTES, iter_pieces
from crfrefine.io.volumes import open_voxels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader


ALL_PLANES = slice(None)


@dataclass(frozen=True)
class Piece:
    """Consecutive planes of one channel, or of all channels."""

    channels: slice  # the channels, counted from 0
    planes: slice  # the planes of the grid: indices along its slowest axis in storage, z, or y of a 2-D grid
    # (channels, planes, [y,] x) C-contiguous, finite; the caller's own. In the stored type (float16, float32, int8, uint8, int16, uint16,
    # in the machine's byte order) if the file has no scaling; else scaled float32. All pieces of a file have the same type.
    values: NDArray[Any]


def read_pieces(header: VolumeHeader, *, planes: slice = ALL_PLANES, most_bytes: int = MAX_BYTES) -> Generator[Piece, None, None]:
    """Read a file piece by piece, while a thread reads one piece ahead.

    Every voxel of the planes is in one piece. Where one channel follows the other in the file (NIfTI, .npz, an NRRD with its channels
    last), a piece is a whole channel or planes of it; where the channels of a voxel or of a plane are together (MetaImage and NRRD
    vectors), it is all channels of some planes. Two pieces are in memory at a time, with the piece that the caller holds; a third one for
    the moment in which the caller gets it. The exception is an .npz in Fortran order, which has to be read as a whole: its last voxels
    may be those of the first plane of the first channel.

    Close the generator, or forget it, to stop early.

    Args:
        header: result of `read_header`.
        planes: consecutive planes to read, such as those of a slab. The others are skipped in a file that is not compressed, and inflated
            but not looked at in others.
        most_bytes: of a piece; a piece has at least one plane, whatever its size.

    Raises:
        UnsupportedFormatError: damaged or cut off. The checksum is compared at the end of the file, after the last piece.
        InputError: values that are NaN or infinite; raised at the end of the file, from the first such piece on no piece is returned.
        CapacityError: a piece does not fit into memory.
        UnexpectedError: the reader raised an unexpected exception.
    """
    return run_ahead(decoded_pieces(header, planes, most_bytes))


def decoded_pieces(header: VolumeHeader, planes: slice = ALL_PLANES, most_bytes: int = MAX_BYTES) -> Generator[Piece, None, None]:
    """Read a file piece by piece in the calling thread; otherwise as `read_pieces`."""
    shape = (header.num_channels, *header.grid_shape[::-1])
    first, last, step = planes.indices(shape[1])
    if step != 1 or first >= last:
        raise ValueError(f"expected consecutive planes of the {shape[1]} of {header.path}, got {planes}")
    with reading(header.path), open_voxels(header) as stream:
        decoder, dtype = Decoder(stream, shape), stream.kept_type
        by_channel = decoder.one_channel_after_the_other
        for channels, inside in iter_pieces((shape[0], last - first, *shape[2:]), dtype.itemsize, most_bytes, by_channel=by_channel):
            here = slice(first + inside.start, first + inside.stop)
            if here.start == first:
                decoder.skip(first)
            values = allocate_array((channels.stop - channels.start, here.stop - here.start, *shape[2:]), header.path, dtype)
            decoder.fill(values, channels.start, here.start)
            if not decoder.num_bad:
                yield Piece(channels, here, values)
            if here.stop == last:
                decoder.skip(shape[1] - last)
        decoder.finish()


# Label maps and masks: a byte or two per voxel, whatever the type in the file.


LABEL_TOLERANCE = 0.1
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


def read_mask(header: VolumeHeader, condition: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.bool_]:
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
