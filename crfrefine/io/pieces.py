"""Read the voxels of a file piece by piece, in their stored type and in the order of the file, so that the whole is never in memory."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crfrefine.base.failures import reading
from crfrefine.base.parallel import run_ahead
from crfrefine.io.content import MAX_BYTES, cuts
from crfrefine.io.decode import Decoder, allocate_array, read_whole
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
        whole = read_whole(stream, shape, header.path) if stream.is_reversed else None
        by_channel = decoder.one_channel_after_the_other or stream.is_reversed
        for channels, inside in cuts((shape[0], last - first, *shape[2:]), dtype.itemsize, most_bytes, by_channel=by_channel):
            here = slice(first + inside.start, first + inside.stop)
            if whole is not None:
                yield Piece(channels, here, whole[channels, here].copy(order="C"))
                continue
            if here.start == first:
                decoder.skip(first)
            values = allocate_array((channels.stop - channels.start, here.stop - here.start, *shape[2:]), header.path, dtype)
            decoder.fill(values, channels.start, here.start)
            if not decoder.found_bad:
                yield Piece(channels, here, values)
            if here.stop == last:
                decoder.skip(shape[1] - last)
        if whole is None:
            decoder.finish()
