"""Read the voxels of a file of any supported format, or of a network's output.

They come after the header, at once or piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from crfrefine.base.axes import Axes
from crfrefine.base.failures import naming_file
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import MAX_LABEL, Job, run_ahead, run_all
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import formats, streams
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.headers import logits_header, placed_on, read_header, require_scalar
from crfrefine.io.streams import FLOAT32, Decoder, allocate_array, open_bytes
from crfrefine.io.volume import (
    PIECE_BYTES,
    Volume,
    VolumeHeader,
    iter_pieces,
)

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool, Float32


# What changes with the content of a file.
content_state = attrgetter("st_ino", "st_size", "st_mtime_ns")


def _require_unchanged(header: VolumeHeader) -> None:
    """Raise InputError if a file changed since its header was read: both must be of one case."""
    for path, state in header.states.items():
        if content_state(path.stat()) != content_state(state):
            raise InputError(
                f"{path}: was changed while it was read; "
                "run again when nothing writes to it any more"
            )


@contextmanager
def open_voxels(
    header: VolumeHeader, *, allows_nan: bool = False, as_stored: bool = False
) -> Iterator[Decoder]:
    """Open a file at its first voxel; raise InputError if it changed since its header was read.

    As stored, values are not scaled, and may be NaN or infinite.
    """
    _require_unchanged(header)
    source = header.source
    try:
        with ExitStack() as files:
            if header.turned is not None:
                stored, turn = header.turned
                in_file = files.enter_context(
                    open_voxels(stored, allows_nan=allows_nan, as_stored=as_stored)
                )
                blocks = streams.BlockReader(_turned_blocks(in_file, stored, turn))
                in_memory = streams.VoxelSource(stored.path, "raw", in_file.kept_type)
                decoder = Decoder(blocks, in_memory, header.stored_shape)
            elif source is None:
                code = import_module(formats.FORMAT_OF_NAME[header.family].module)
                decoder = files.enter_context(code.open_voxels(header))
            else:
                stream = open_bytes(
                    source.path, source.encoding, source.start, source.offset, source.checksum
                )
                decoder = Decoder(files.enter_context(stream), source, header.stored_shape)
            decoder.allows_nan = allows_nan
            if as_stored:
                decoder.keep_stored_values()
            yield decoder
    except CrfRefineError:
        _require_unchanged(header)  # That is the reason then.
        raise
    _require_unchanged(header)


def _turned_blocks(decoder: Decoder, stored: VolumeHeader, turn: Axes) -> Iterator[bytes]:
    """Yield the turned channels of a file, one in memory, or all if the file interleaves them."""
    at_once = 1 if decoder.is_by_channel else stored.num_channels
    for first in range(0, stored.num_channels, at_once):
        shape = (at_once, *(*stored.grid_shape, 1)[2::-1])
        values = allocate_array(shape, stored.path, decoder.kept_type)
        decoder.fill(values, first)
        for channel in values:
            yield np.ascontiguousarray(turn.reversed.apply(channel)).tobytes()
    decoder.finish()


def read_volume(path: str | Path) -> Volume:
    """Read a volume as float32, scaled: (x, y[, z]) or (channels, ...); raises as `read_pieces`."""
    header = read_header(path, VOLUME_SUFFIXES)
    data = reverse_grid(read_channels(header))
    if header.num_channels == 1:
        data = data[0]
    return Volume(data, *header.geometry(), header)


# The paths of files with NaN, which the reading of images adds to; None means that NaN is an error.
NanFiles: TypeAlias = "list[Path] | None"


def read_channels(
    *headers: VolumeHeader, nan_files: NanFiles = None, keeps_type: bool = False
) -> Array:
    """Read files on one grid, scaled, (channels, [z,] y, x); raises as `read_pieces`.

    The values are float32, or of the type that is kept, as of `reading_jobs`.
    """
    values, jobs = reading_jobs(headers, nan_files, keeps_type=keeps_type)
    run_all(jobs, 1)
    return values


def read_array(
    header: VolumeHeader,
    nan_files: NanFiles = None,
    values: Array | None = None,
    *,
    as_stored: bool = False,
) -> Array:
    """Read a file into an array of float32 or its kept type, or into a new one in that.

    It is (channels, [z,] y, x). As stored, values are not scaled, and may be NaN or infinite.
    Raises as `read_pieces`.
    """
    allows_nan = nan_files is not None
    with (
        naming_file(header.path),
        open_voxels(header, allows_nan=allows_nan, as_stored=as_stored) as decoder,
    ):
        if values is None:
            values = allocate_array(header.stored_shape, header.path, decoder.kept_type)
        decoder.fill(values.reshape(header.stored_shape))
        decoder.finish()
    if nan_files is not None and decoder.has_nan:
        nan_files.append(header.path)
    return values


def reading_jobs(
    headers: Sequence[VolumeHeader],
    nan_files: NanFiles = None,
    *,
    num_before: int = 0,
    keeps_type: bool = False,
) -> tuple[Array, list[Job]]:
    """Return an array for the channels of files, (channels, [z,] y, x), and a job per file.

    The files are on one grid. The jobs may run together. `num_before` channels before those of the
    files are the caller's. The array is float32; with `keeps_type`, it has the kept type of the
    files (`VolumeHeader.kept_type`) if they have one in common.
    """
    first = headers[0]
    num_channels = num_before + sum(header.num_channels for header in headers)
    shape = (num_channels, *first.stored_grid)
    dtype = FLOAT32
    if keeps_type and len({header.kept_type for header in headers}) == 1:
        dtype = first.kept_type
    values = allocate_array(shape, first.path, dtype)
    jobs: list[Job] = []
    start = num_before
    for header in headers:
        stop = start + header.num_channels
        jobs.append(partial(read_array, header, nan_files, values[start:stop]))
        start = stop
    return values, jobs


class Piece(NamedTuple):
    """Consecutive planes of one channel, or of all channels."""

    channels: slice  # the channels, counted from 0
    # the planes of the grid: indices along its slowest axis in storage, z, or y of a 2-D grid
    planes: slice
    # (channels, planes, [y,] x) C-contiguous, finite; the caller's own. In the stored type
    # (float16, float32, int8, uint8, int16, uint16) if the file has no scaling; else scaled
    # float32. All pieces of a file have the same type.
    values: Array


def read_pieces(*headers: VolumeHeader, most_bytes: int = PIECE_BYTES) -> Generator[Piece]:
    """Read files piece by piece, while a thread reads one piece ahead.

    Close the generator, or forget it, to stop early.

    A piece has planes of one channel (NIfTI, .npz) or of all (vectors of MetaImage and NRRD), at
    most `most_bytes`, but at least one plane. Two pieces are in memory, a third one while the
    caller gets it. The files are on one grid, and channels are numbered over all of them. Raises
    UnsupportedFormatError (damaged or cut off; the checksum is compared after the last piece),
    InputError (NaN or infinite values, after all pieces without them), CapacityError or
    UnexpectedError.
    """
    return run_ahead(decoded_pieces(*headers, most_bytes=most_bytes))


def decoded_pieces(
    *headers: VolumeHeader, most_bytes: int, as_stored: bool = False
) -> Generator[Piece]:
    """Read files piece by piece in the calling thread; otherwise as `read_pieces`.

    As stored, values are not scaled, and may be NaN or infinite.
    """
    first = 0
    for header in headers:
        with naming_file(header.path), open_voxels(header, as_stored=as_stored) as decoder:
            kept_type = decoder.kept_type
            pieces = iter_pieces(
                header.stored_shape,
                kept_type.itemsize,
                most_bytes,
                by_channel=decoder.is_by_channel,
            )
            for channels, planes in pieces:
                sizes = (channels.stop - channels.start, planes.stop - planes.start)
                values = allocate_array((*sizes, *header.stored_shape[2:]), header.path, kept_type)
                decoder.fill(values, channels.start, planes.start)
                if not decoder.num_bad:
                    numbers = slice(first + channels.start, first + channels.stop)
                    yield Piece(numbers, planes, values)
            decoder.finish()
        first += header.num_channels


def is_intact(path: str | Path) -> bool:
    """Return whether a file has the format of its name, and can be read up to its checksum."""
    try:
        header = read_header(path)
        for _ in decoded_pieces(header, most_bytes=1 << 22):
            pass
    except CrfRefineError:
        return False
    return header.misnamed is None


# Largest distance of a label from a whole number: some tools write a scaling that turns 1 into
# 0.988.
LABEL_TOLERANCE = 0.1
LABEL_ADVICE = "it may be a probability map or an image"
LABEL_LIMITS = (0, MAX_LABEL)
# If more than this share of the voxels other than 0 are nearly whole numbers, the volume is a label
# map that was interpolated, linearly or by splines, which swing about whole numbers; of an image, a
# tenth of the values is so near to one.
_SHARE_WHOLE = 0.2
_NEARLY = 0.05
_PIECE_BYTES = 1 << 20  # In the processor's cache, so that looking at a value twice costs little.


def read_labels(path: str | Path, *, grid: VolumeHeader | None = None) -> Volume:
    """Read a label map in the smallest unsigned type; raise InputError for anything but labels."""
    header = placed_on(read_header(path, VOLUME_SUFFIXES), grid)
    geometry = header.geometry()
    return Volume(read_whole_numbers(header).T, *geometry, header)


def read_whole_numbers(
    header: VolumeHeader,
    tolerance: float = LABEL_TOLERANCE,
    advice: str = LABEL_ADVICE,
    rounding: str = "",
    limits: tuple[int, int] = LABEL_LIMITS,
) -> Array:
    """Read a label map, ([z,] y, x), in the smaller of uint8 and uint16 that holds it.

    Within other limits than those of labels, numbers are int64. Beyond the array, reading takes a
    few megabytes. Raise InputError, with advice, if a value is farther than `tolerance` from a
    whole number or beyond the limits, or if all would be rounded to 0; else as `read_pieces`. The
    advice on `rounding` comes first where that would help.
    """
    require_scalar(header, "a label map")
    shape = header.stored_grid
    lowest, highest = limits
    dtype = np.dtype(np.uint8 if limits == LABEL_LIMITS else np.int64)
    labels = allocate_array(shape, header.path, dtype)
    largest_error = 0.0
    num_whole = 0  # voxels other than 0 that are nearly whole numbers
    num_others = 0
    low = np.inf
    high = -np.inf
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        values = piece.values[0]
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            errors = np.abs(values - rounded)
            largest_error = max(largest_error, float(errors.max()))
            num_others += int(np.count_nonzero(values))
            num_whole += int(np.count_nonzero(values[errors < _NEARLY]))
            values = rounded
        low = min(low, float(values.min()))
        high = max(high, float(values.max()))
        if low < lowest or high > highest:
            continue  # The rest tells how far they are out of range.
        if high > np.iinfo(labels.dtype).max:
            labels = labels.astype(np.uint16)
        labels[piece.planes] = values

    if largest_error > tolerance or (low == high == 0 and largest_error > 0):
        if largest_error <= LABEL_TOLERANCE:
            advice = rounding + advice
        elif num_whole > _SHARE_WHOLE * num_others:
            advice = (
                "many are nearly whole, as where a label map was interpolated: resample it with "
                "nearest neighbor, or cut a mask at half of its value"
            )
        problem = f"whole numbers, found values off by up to {largest_error:.2g}; {advice}"
    elif low < lowest or high > highest:
        problem = (
            f"labels from 0 to {MAX_LABEL}, found {low:.0f} to {high:.0f} "
            "(--map OLD=NEW gives a value a label)"
        )
    else:
        return labels
    raise InputError(f"{header.path}: not a label map: expected {problem}")


def read_mask(header: VolumeHeader, look: Callable[[Array], object] | None = None) -> Bool:
    """Return where a file with one value per voxel is not zero, ([z,] y, x).

    `look` is called with the values of each piece, (planes, [y,] x).
    """
    require_scalar(header, "a mask")
    shape = header.stored_grid
    mask = allocate_array(shape, header.path, np.dtype(np.bool_))
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        mask[piece.planes] = piece.values[0]
        if look is not None:
            look(piece.values[0])
    return mask


def read_logits(
    paths: Sequence[str | Path], *, fewest: int = 2, grid: VolumeHeader | None = None
) -> Float32:
    """Return a case's logits or probabilities, (L, *grid); arguments as of `logits_header`."""
    header = logits_header([read_header(path) for path in paths], fewest=fewest, grid=grid)
    return reverse_grid(read_channels(*header.files))
