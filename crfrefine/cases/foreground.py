"""Recognize files that hold only a network's foreground, and compute their background."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.foreground import (
    ForegroundSums,
    decide_channel,
    fill_background,
    fill_background_of_channel,
)
from crfrefine.arrays.probabilities import BY_HAND, SUM_TOLERANCE, plane_blocks
from crfrefine.arrays.scales import are_rounded_probabilities, divide_by_scale
from crfrefine.base.array_types import Float32
from crfrefine.base.limits import run_all
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.roles import is_in_range
from crfrefine.errors import InputError
from crfrefine.io.headers import NetworkHeader
from crfrefine.io.reading import (
    LABEL_TOLERANCE,
    Piece,
    content_state,
    decoded_pieces,
    read_channels,
    read_pieces,
    reading_jobs,
)
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.cases.reading_options import ReadingOptions

_PIECE_BYTES = 1 << 20
_HALF = 0.5  # a probability of label 1 below it is background


# Findings in files, by path, state and question: their headers are read more than once.
_known: dict[Any, bool] = {}
_MAX_KNOWN = 10_000


def holds_labels(
    header: VolumeHeader, *, of_region: bool = False, needs_foreground: bool = False
) -> bool:
    """Return as `_look_for_labels`, which reads the voxels of floats once, of integers never."""
    source = header.source
    if source is not None and source.dtype.kind in "iu" and not source.is_scaled:
        return True
    if not header.states:
        return _look_for_labels(header, of_region, needs_foreground)
    states = [(str(path), content_state(state)) for path, state in header.states.items()]
    question = (tuple(states), of_region, needs_foreground)
    if question not in _known:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[question] = _look_for_labels(header, of_region, needs_foreground)
    return _known[question]


def _look_for_labels(header: VolumeHeader, of_region: bool, needs_foreground: bool) -> bool:
    """Return whether the values of a file with one per voxel are labels, and no scores.

    Labels are whole numbers, or a mask of nearly 1, as where a program has scaled it. Scores are
    probabilities of label 1, in [0, 1]; those `of_region` are any numbers that are not all whole.
    The voxels are read for it. Raises InputError for values that are neither labels nor
    probabilities: a mask of another value than 1, below 0.5, and with `needs_foreground` any values
    that all lie below 0.5, unless they are 0: no voxel would have label 1.
    """
    is_whole = True
    low = 1.0  # the range of the values that are not 0
    high = 0.0
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES):
        values = piece.values
        if values.dtype.kind != "f":
            return True
        if is_whole:
            is_whole = not np.mod(values, 1).any()
        if of_region:
            if not is_whole:
                return False
            continue
        if values.min() < -SUM_TOLERANCE or values.max() > 1 + SUM_TOLERANCE:
            return True
        low = min(low, float(values.min(initial=1.0, where=values != 0)))
        high = max(high, float(values.max()))
    if 0 < high < _HALF and (low == high or needs_foreground):
        raise InputError(
            f"{header.path}: one value per voxel, up to {high:.3g}: neither a label map, of whole "
            "numbers, nor probabilities that reach 0.5 anywhere, so that no voxel would get a "
            "label\n  Write a mask as 0 and 1; for the probability of label 1 where there is none "
            f"of it, give\n  {BY_HAND.format('probabilities')}."
        )
    return is_whole or low == high >= 1 - LABEL_TOLERANCE  # a scaled mask


def holds_rounded_probabilities(header: VolumeHeader) -> bool:
    """Return whether the values of a file with one per voxel are probabilities of label 1.

    These have a scale, as the user says, but the file may be a label map nevertheless. Its voxels
    are read for it.
    """
    values = read_channels(header)[0]
    if np.mod(values, 1).any() or not is_in_range(values):
        return True
    return are_rounded_probabilities(values.astype(np.uint16), min_values=2)


def read_all_channels(header: NetworkHeader, options: ReadingOptions) -> tuple[Float32, list[Note]]:
    """Return the channels of an output with its background, (labels, [z,] y, x), and notes."""
    values, jobs = reading_jobs(header.files, num_before=int(header.lacks_background))
    run_all(jobs, 1)
    return values, complete_channels(values, header, options)


def complete_channels(
    values: Float32, header: NetworkHeader, options: ReadingOptions
) -> list[Note]:
    """Bring channels that were read, (labels, [z,] y, x), to their scale; return notes.

    If the files lack the background, it is computed into channel 0.
    """
    if options.scale is not None:
        divide_by_scale(values[int(header.lacks_background) :], options.scale, header.path)
    if not header.lacks_background:
        return []
    background = Background(header, options, pieces_of(values[1:]))
    if background.scale not in (None, options.scale):
        values[1:] /= np.float32(background.scale)
    if background.sums is None:
        fill_background_of_channel(values, background.kind)
    else:
        fill_background(values, background.sums)
    return background.notes


def pieces_of(values: Float32) -> Iterator[Piece]:
    """Yield the pieces of channels in memory, (channels, [z,] y, x): planes of all of them."""
    for planes in plane_blocks(values):
        yield Piece(slice(0, len(values)), planes, values[:, planes])


def scaled_pieces(header: NetworkHeader, scale: float | None) -> Generator[Piece]:
    """Yield the pieces of files; with a scale, they are divided by it, as float32."""
    for piece in read_pieces(*header.files):
        if scale is not None:
            piece = piece._replace(
                values=divide_by_scale(piece.values.astype(np.float32), scale, header.path)
            )
        yield piece


class Background:
    """The background of files that lack it, as one pass over their channels tells it."""

    def __init__(
        self, header: NetworkHeader, options: ReadingOptions, pieces: Iterable[Piece]
    ) -> None:
        """Read all pieces, which are brought to the user's scale; `notes` are for the user.

        Raise InputError for values that are no logits or probabilities of the foreground.
        """
        self._header = header
        self.scale = options.scale  # by which the channels of the files are to be divided, or None
        self.kind = "probabilities"  # what all channels hold, or "logits"
        self.sums: Float32 | None = None  # ([z,] y, x) over several channels
        if header.num_channels == 1:
            # Its lowest, highest and not whole values show its content.
            telling: list[float] = []
            broken: list[float] = []
            for piece in pieces:
                values = piece.values
                telling += [float(values.min()), float(values.max())]
                broken = broken or values[np.mod(values, 1) != 0][:1].tolist()
            self.kind, note = decide_channel(
                np.array(telling + broken), options.type_of_scores, header.kind, header.path
            )
            self.notes = [note]
            return
        shape = header.first.stored_grid
        is_rounded = options.scale is not None
        foreground = ForegroundSums(shape, str(header.path), is_rounded=is_rounded)
        for piece in pieces:
            for label, values in enumerate(piece.values, start=piece.channels.start + 1):
                foreground.add(label, values, piece.planes)
        note = NoteKind.CHANNELS_WITHOUT_BACKGROUND(header.path.name, channels=header.num_channels)
        self.notes = [note, *foreground.check()]
        self.sums = foreground.sums
        if foreground.scale != 1:
            self.scale = foreground.scale

    def read_pieces(self) -> Generator[Piece]:
        """Yield the pieces of all channels, the background of some planes before the others."""
        for piece in scaled_pieces(self._header, self.scale):
            planes = piece.planes
            values = piece.values.astype(np.float32, copy=False)
            if piece.channels.start == 0:
                background = np.zeros_like(values[:1])
                if self.sums is not None:
                    np.minimum(self.sums[planes], 1, out=background[0])
                    np.subtract(1, background, out=background)
                elif self.kind == "probabilities":
                    np.subtract(1, values, out=background)
                yield Piece(slice(0, 1), planes, background)
                del background  # It would stay in memory beside the other channels.
            if self.sums is not None:
                values /= np.maximum(self.sums[planes], 1)
            channels = slice(piece.channels.start + 1, piece.channels.stop + 1)
            yield Piece(channels, planes, values)
