"""Read a file of any supported format, or the files of a network's output.

The header comes first, then the voxels, at once or piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from crfrefine.base.failures import reading
from crfrefine.base.geometry import Reorientation, reorientation, reverse_grid
from crfrefine.base.limits import MAX_LABEL, require_few_labels, run_ahead, run_all
from crfrefine.base.notes import Note, NoteKind
from crfrefine.errors import CrfRefineError, GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io import paths, streams
from crfrefine.io.npz import in_fortran_order
from crfrefine.io.paths import LOGITS_SUFFIXES, VOLUME_SUFFIXES, Format
from crfrefine.io.streams import Decoder, allocate_array, open_bytes
from crfrefine.io.volume import (
    PIECE_BYTES,
    RareHeaderError,
    Volume,
    VolumeHeader,
    iter_pieces,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read the header of a file in one of the formats with these suffixes.

    Raise UnsupportedFormatError (unknown, damaged, cut off, ambiguous layout), InputError (missing,
    or cannot be opened) or UnexpectedError.
    """
    path, expected = paths.file_to_read(Path(path), suffixes)
    # A damaged header may hold numbers out of range; the checks find them, without warnings.
    with reading(path), np.errstate(all="ignore"):
        states = {path: path.stat()}
        if states[path].st_size == 0:
            raise UnsupportedFormatError(f"{path}: the file is empty; copy or download it again")
        actual = expected
        try:
            header: VolumeHeader = import_module(expected.module).read_header(path)
        except RareHeaderError as rare:
            by_itk = import_module(paths.FORMAT_OF_NAME[paths.ITK].module)
            header = by_itk.read_header(path, expected.name)
            note = Note.of(NoteKind.READ_BY_ITK, reason=str(rare))
            header = replace(
                header,
                family=paths.ITK,
                notes=(note,),
                time=rare.time,
                voxel_files=rare.voxel_files,
            )
        except UnsupportedFormatError as error:
            header, actual = _read_by_content(path, expected, suffixes, error)
        for voxels in header.voxel_files:
            states[voxels] = voxels.stat()

    notes = header.notes
    source = header.source
    if paths.FORMAT_OF_SUFFIX.get(paths.suffix_of(path)) is not actual:
        notes = (Note.of(NoteKind.OTHER_FORMAT, format=actual.name), *notes)
    elif source is not None and source.start == 0 and not header.voxel_files:
        # The file is compressed as a whole, or not at all.
        is_gzip = source.encoding == "gzip"
        if is_gzip != streams.is_named_gzip(path):
            kind = NoteKind.COMPRESSED if is_gzip else NoteKind.NOT_COMPRESSED
            notes = (Note.of(kind), *notes)
    if source is not None and source.encoding == "raw" and not actual.has_tail:
        num_bytes = math.prod(header.stored_shape) * source.dtype.itemsize
        surplus = states[source.path].st_size - (source.start + source.offset + num_bytes)
        if surplus > 0:
            notes = (*notes, Note.of(NoteKind.BEHIND_VOXELS, surplus=surplus))
    return replace(header, family=header.family or actual.name, notes=notes, states=states)


def _read_by_content(
    path: Path, expected: Format, suffixes: tuple[str, ...], error: UnsupportedFormatError
) -> tuple[VolumeHeader, Format]:
    """Read a header in the format of its content, which is not the expected one.

    Raise the error of the expected format if it is, or UnsupportedFormatError if SimpleITK has to
    read the header, or if its voxels are in another file: the name of a header decides which other
    files hold voxels, and which files must not be replaced.
    """
    actual = paths.recognize(path)
    if actual is None or actual is expected:
        # The voxels of a header may be a pointer to them.
        for voxels in paths.voxels_beside(path):
            kind = paths.recognize(voxels)
            if isinstance(kind, paths.ForeignKind) and kind.is_text:
                hint = kind.hint(voxels.name)
                raise UnsupportedFormatError(f"{error}\n  {hint}") from None
        raise error
    explained = UnsupportedFormatError(f"{error}\n  {actual.hint('It')}")
    if not isinstance(actual, Format) or not set(actual.suffixes) <= set(suffixes):
        raise explained from None
    try:
        header: VolumeHeader = import_module(actual.module).read_header(path)
    except RareHeaderError:
        raise explained from None
    if header.voxel_files:
        raise explained from None
    return header, actual


# What changes with the content of a file.
_content_state = attrgetter("st_ino", "st_size", "st_mtime_ns")


def _require_unchanged(header: VolumeHeader) -> None:
    """Raise InputError if a file changed since its header was read: both must be of one case."""
    for path, state in header.states.items():
        if _content_state(path.stat()) != _content_state(state):
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
                code = import_module(paths.FORMAT_OF_NAME[header.family].module)
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


def placed_on(header: VolumeHeader, grid: VolumeHeader | None) -> VolumeHeader:
    """Return a header, its axes turned to those of a grid if the file's voxels are on that grid."""
    if grid is None or header.affine is None or grid.affine is None or header.on_same_grid(grid):
        return header
    turn = reorientation(grid.grid_shape, grid.affine, header.grid_shape, header.affine)
    if turn is None:
        return header
    return replace(
        header,
        grid_shape=grid.grid_shape,
        affine=grid.affine,
        spacing=grid.spacing,
        qform=None,
        turned=(header, turn),
        turning=Note.of(
            NoteKind.TURNED,
            header.path.name,
            before=header.orientation,
            after=grid.orientation,
        ),
    )


def with_channel_axis(header: VolumeHeader, grid: VolumeHeader) -> VolumeHeader:
    """Return the header of a network's output with the channels that the image's grid shows.

    A volume (x, y, label) over a plane has the labels on its last axis. An array (z, y, x) without
    geometry over a volume (x, y, z) has one channel. Any other header is returned as it is.
    """
    is_plane = (*grid.grid_shape, 1)[2] == 1
    whole = (*header.grid_shape, header.num_channels)
    if header.affine is None and not is_plane and whole == grid.grid_shape:
        array = replace(header, grid_shape=whole, num_channels=1, turned=None)
        if header.turned is None:
            return array
        return in_fortran_order(array)

    is_stack = len(header.grid_shape) == 3 and header.grid_shape[2] > 1
    if not is_plane or not is_stack or header.num_channels > 1:
        return header
    if header.spacing is None or header.source is None:
        return header
    plane = replace(
        header,
        grid_shape=header.grid_shape[:2],
        num_channels=header.grid_shape[2],
        spacing=header.spacing[:2],
        source=replace(header.source, inner=None),
        segments=(),
    )
    if placed_on(plane, grid).on_same_grid(grid):
        return plane
    return header


def _turned_blocks(decoder: Decoder, stored: VolumeHeader, turn: Reorientation) -> Iterator[bytes]:
    """Yield the turned channels of a file, one in memory, or all if the file interleaves them."""
    at_once = 1 if decoder.is_by_channel else stored.num_channels
    for first in range(0, stored.num_channels, at_once):
        shape = (at_once, *(*stored.grid_shape, 1)[2::-1])
        values = allocate_array(shape, stored.path, decoder.kept_type)
        decoder.fill(values, first)
        for channel in values:
            yield np.ascontiguousarray(turn.apply(channel)).tobytes()
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


def read_channels(*headers: VolumeHeader, nan_files: NanFiles = None) -> NDArray[np.float32]:
    """Read files on one grid as float32, scaled, (channels, [z,] y, x); raises as `read_pieces`."""
    values, jobs = reading_jobs(headers, nan_files)
    run_all(jobs, 1)
    return values


def read_array(
    header: VolumeHeader,
    nan_files: NanFiles = None,
    values: NDArray[Any] | None = None,
    *,
    as_stored: bool = False,
) -> NDArray[Any]:
    """Read a file into an array of float32, or into a new one in the type of its pieces.

    It is (channels, [z,] y, x). As stored, values are not scaled, and may be NaN or infinite.
    Raises as `read_pieces`.
    """
    allows_nan = nan_files is not None
    with (
        reading(header.path),
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
    headers: Sequence[VolumeHeader], nan_files: NanFiles = None, *, num_before: int = 0
) -> tuple[NDArray[np.float32], list[Callable[[], object]]]:
    """Return an array for the channels of files, (channels, [z,] y, x), and a job per file.

    The files are on one grid. The jobs may run together. `num_before` channels before those of the
    files are the caller's.
    """
    first = headers[0]
    num_channels = num_before + sum(header.num_channels for header in headers)
    shape = (num_channels, *first.stored_shape[1:])
    values: NDArray[np.float32] = allocate_array(shape, first.path)
    jobs: list[Callable[[], object]] = []
    start = num_before
    for header in headers:
        stop = start + header.num_channels
        jobs.append(partial(read_array, header, nan_files, values[start:stop]))
        start = stop
    return values, jobs


@dataclass(frozen=True)
class Piece:
    """Consecutive planes of one channel, or of all channels."""

    channels: slice  # the channels, counted from 0
    # the planes of the grid: indices along its slowest axis in storage, z, or y of a 2-D grid
    planes: slice
    # (channels, planes, [y,] x) C-contiguous, finite; the caller's own. In the stored type
    # (float16, float32, int8, uint8, int16, uint16) if the file has no scaling; else scaled
    # float32. All pieces of a file have the same type.
    values: NDArray[Any]


def read_pieces(
    *headers: VolumeHeader, most_bytes: int = PIECE_BYTES
) -> Generator[Piece, None, None]:
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
        with reading(header.path), open_voxels(header, as_stored=as_stored) as decoder:
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


def is_whole(path: str | Path) -> bool:
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
    advice: str = "it may be a probability map or an image",
    rounding: str = "",
) -> NDArray[np.unsignedinteger[Any]]:
    """Read a label map, ([z,] y, x), in the smaller of uint8 and uint16 that holds it.

    Beyond it, that takes a few megabytes. Raise InputError, with advice, if a value is farther than
    `tolerance` from a whole number or cannot be a label, or if all would be rounded to 0; else as
    `read_pieces`. The advice on `rounding` comes first where that would help.
    """
    require_scalar(header, "a label map")
    shape = header.stored_shape[1:]
    labels = allocate_array(shape, header.path, np.dtype(np.uint8))
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
        if low < 0 or high > MAX_LABEL:
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
        raise InputError(
            f"{header.path}: not a label map: expected whole numbers, "
            f"found values off by up to {largest_error:.2g}; {advice}"
        )
    if low < 0 or high > MAX_LABEL:
        raise InputError(
            f"{header.path}: not a label map: expected labels from 0 to {MAX_LABEL}, "
            f"found {low:.0f} to {high:.0f}"
        )
    return labels


def read_mask(header: VolumeHeader) -> NDArray[np.bool_]:
    """Return where a file with one value per voxel is not zero, ([z,] y, x)."""
    require_scalar(header, "a mask")
    shape = header.stored_shape[1:]
    mask = allocate_array(shape, header.path, np.dtype(np.bool_))
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        mask[piece.planes] = piece.values[0]
    return mask


def require_scalar(header: VolumeHeader, what: str) -> None:
    """Raise InputError if a file has several values per voxel."""
    if header.num_channels > 1:
        raise InputError(
            f"{header.path}: expected {what} with one value per voxel, "
            f"this file has {header.num_channels}"
        )


@dataclass(frozen=True)
class LogitsHeader:
    """The headers of a network's output: logits, probabilities, a label map or structures."""

    files: tuple[VolumeHeader, ...]  # one with all labels, or one per label or structure
    num_labels: int  # L, background included
    # "logits" or "probabilities" if the file declares it, "labels" for a label map or structures
    # (by `crfrefine.cases.label_input`), else None.
    kind: str | None
    # Whether the files hold only the labels from 1 on, so that the background has to be computed.
    lacks_background: bool = False

    @property
    def is_label_map(self) -> bool:
        """Whether it is a label map, or binary masks of structures that become one."""
        return self.kind == "labels"

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""
        return self.files[0].path

    @property
    def num_channels(self) -> int:
        """Channels in the files."""
        return self.num_labels - int(self.lacks_background)


def logits_header(
    headers: Sequence[VolumeHeader], *, fewest: int = 2, grid: VolumeHeader | None = None
) -> LogitsHeader:
    """Put the headers of a case's logits together: one file with all labels, or one per label.

    Files are in the order of labels, and have `fewest` channels or more. Axes are turned to those
    of the image `grid`. Raise InputError (one label, or files that do not belong together),
    CapacityError or GridMismatchError.
    """
    first = headers[0]
    are_several = len(headers) > 1
    num_labels = len(headers) if are_several else first.num_channels
    if num_labels < fewest:
        raise InputError(
            f"{first.path}: logits of one label only; "
            "expected one value per label at each voxel, background included\n"
            "  A label map lacks the scores; export the network's output before the argmax, "
            "or refine the label map with\n"
            "  --input-type labels. "
            "A single foreground channel holds probabilities between 0 and 1,\n"
            "  or is given with --input-type logits; else give one file per label, -p BACKGROUND\n"
            "  -p FOREGROUND. The sigmoid channel of a single region needs its labels:\n"
            "  --regions NAME=1."
        )
    require_few_labels(num_labels, str(first.path))
    files = [first]
    for header in headers[1:]:
        files.append(placed_on(header, first))
    if are_several:
        for file in files:
            if file.num_channels > 1 or file.affine is None:
                raise InputError(
                    f"{file.path}: expected one label, as in each of the {num_labels} files, "
                    f"this one has {file.num_channels}"
                )
            if file.grid_shape != first.grid_shape or not file.on_same_grid(first):
                raise GridMismatchError(
                    f"{file.path}: the logits of two labels are on different grids\n"
                    f"{first.difference_from(file)}"
                )
    placed = tuple(placed_on(file, grid) for file in files)
    return LogitsHeader(placed, num_labels, first.kind)


def read_logits(
    paths: Sequence[str | Path], *, fewest: int = 2, grid: VolumeHeader | None = None
) -> NDArray[np.float32]:
    """Return a case's logits or probabilities, (L, *grid); arguments as of `logits_header`."""
    header = logits_header([read_header(path) for path in paths], fewest=fewest, grid=grid)
    return reverse_grid(read_channels(*header.files))
