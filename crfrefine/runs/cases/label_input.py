"""Read a label map, or one binary file per structure, instead of a network's logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import channels_of, count_labels, labels_of_one_hot, present_labels
from crfrefine.arrays.probabilities import plane_blocks
from crfrefine.base.array_types import Array, Float32, Labels
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.paths import stem_of
from crfrefine.io.reading import LABEL_TOLERANCE, LogitsHeader, Piece, read_whole_numbers
from crfrefine.io.volume import Segment, VolumeHeader
from crfrefine.runs.cases.other_grid import WorkGrid

if TYPE_CHECKING:
    from crfrefine.runs.cases.reading_options import ReadingOptions

KIND = "labels"  # `LogitsHeader.kind` of a label map
EXCHANGED = "-i and -p seem to be exchanged: -i takes the images, -p the network's output."
MAX_SHOWN = 12  # most labels that a message lists
_MAX_GRAY_VALUES = 256  # under "auto", a file with more different values is rather an image


@dataclass(frozen=True)
class LabelMap:
    """A label map on the image's grid."""

    labels: Labels  # ([z,] y, x) as it is read, (*grid) in a `Case`; uint8 or uint16
    # the labels that occur, background, and at least two; ascending
    channel_labels: tuple[int, ...]
    num_labels: int  # L, background included
    notes: tuple[str, ...]  # notes for the user, one sentence each
    # Voxels of each label that the files have and this label map lacks: other structures have them,
    # or the grid is coarser.
    lost: Mapping[int, int] = field(default_factory=dict)
    # names and colors of the labels in its file, or in those of structures
    segments: tuple[Segment, ...] = ()
    # mm between voxels of a file on a coarser grid along each axis of the image; None means the
    # image's grid, or a finer one.
    file_spacing: tuple[float, ...] | None = None


def label_map_header(files: Sequence[VolumeHeader], options: ReadingOptions) -> LogitsHeader | None:
    """Put the headers of a label map or structures together."""
    # None means that the files are to be read as logits or probabilities.
    other = next((file for file in files if file.num_channels > 1 or file.affine is None), None)
    if other is not None:
        if options.input_type == "auto":
            return None
        what = "no geometry" if other.affine is None else str(other.num_channels)
        raise InputError(
            f"{other.path}: expected a label map with one value per voxel, this file has {what}; for logits or probabilities, leave "
            "--input-type labels out"
        )
    # Without a declaration, only the voxels tell.
    if options.declared is None:
        num_labels = 0
    else:
        num_labels = options.declared.num_labels
    return LogitsHeader(tuple(files), num_labels, KIND)


def read_label_map(
    header: LogitsHeader,
    images: Sequence[VolumeHeader],
    options: ReadingOptions,
    *,
    are_structures: bool,
) -> LabelMap:
    """Read a label map, or one binary file per structure into one, onto the grid of the images."""
    # Structures are read one after the other, so that only one of them is in memory.
    first = header.files[0]
    declared = options.declared
    lost: dict[int, int] = {}
    if are_structures:
        assert declared is not None
        numbers = declared.structures
        merged = merge_structures(header.files, numbers)
        labels = merged.labels
        present = present_labels(merged.labels)
        taken = f"{first.path.parent.name} is taken as one file per structure"
        notes = [
            f"{taken}: {counted(len(header.files), 'file')}, {merged.num_structures} not empty"
        ]
        if merged.num_shared:
            notes.append(
                f"structures overlap, and the smaller one keeps the voxel: {merged.num_shared} voxels"
            )
        if merged.lost:
            notes.append(
                f"{merged.lost}; if it is a union of others, leave its file out and unite its refined parts"
            )
        lost = {numbers[name]: size for name, (left, size) in merged.losers.items() if not left}
        # The segment of a structure is that of its file, if the file has a single one.
        own = {
            stem_of(file.path): file.segments[0] for file in header.files if len(file.segments) == 1
        }
        segments = tuple(
            replace(own.get(name, Segment(number, name)), label=number)
            for name, number in numbers.items()
        )
    else:
        labels, present = _read_one(first, options, images[0])
        if options.input_type == KIND:
            reason = "requested"
        else:
            reason = "it has one value per voxel, whole numbers from 0 up"
        notes = [f"{first.path.name} is taken as a label map: {reason}"]
        segments = first.segments
    num_labels = 0 if declared is None else declared.num_labels
    found = LabelMap(labels, present, num_labels, tuple(notes), lost, segments)
    return _on_grid(found, first, images[0])


def read_one_hot(
    header: LogitsHeader,
    values: Float32 | Iterable[Piece],
    like: VolumeHeader,
    options: ReadingOptions,
) -> LabelMap | None:
    """Return the label map of one-hot channels.

    None if they are something else, or declared as such.
    """
    # `values` are the channels, (L, [z,] y, x), or their pieces.
    if options.input_type != "auto":
        return None
    pieces: Iterable[tuple[int, slice, Array]]
    if isinstance(values, np.ndarray):
        pieces = ((0, planes, values[:, planes]) for planes in plane_blocks(values))
    else:
        pieces = ((piece.channels.start, piece.planes, piece.values) for piece in values)
    labels = labels_of_one_hot(
        pieces, (header.num_labels, *header.files[0].grid_shape[::-1]), header.path
    )
    if labels is None:
        return None
    notes = [
        f"{header.path.name} is taken as a label map: each voxel has 1 in one channel and 0 in the others"
    ]
    found = LabelMap(labels, present_labels(labels), header.num_labels, tuple(notes))
    return _on_grid(found, header.files[0], like)


def _on_grid(found: LabelMap, first: VolumeHeader, like: VolumeHeader) -> LabelMap:
    """Return the label map of a file on the image's grid; 0 labels mean an undeclared number."""
    labels = found.labels
    present = found.channel_labels
    lost = found.lost
    notes = [*found.notes]
    placed = WorkGrid(like).nearest(first, labels, "label map", notes, outside="become background")
    file_spacing = None
    if not np.may_share_memory(placed, labels):
        assert first.affine is not None
        assert like.affine is not None
        axes = slice(len(like.grid_shape))
        # Voxels of the file that one voxel of the image is long, along each axis.
        lengths = np.linalg.norm(
            np.linalg.solve(first.affine[:3, :3], like.affine[:3, :3]), axis=0
        )[axes]
        if (lengths < 1.0 - 1e-6).any():
            file_spacing = tuple(
                (np.linalg.norm(like.affine[:3, :3], axis=0)[axes] / lengths).tolist()
            )
        # On another grid, small structures may be lost.
        before = present
        present = present_labels(placed)
        lost = {
            label: int(np.count_nonzero(labels == label))
            for label in sorted({*before} - {0, *present})
        } | dict(lost)
    channels = channels_of(present)
    size = found.num_labels or channels[-1] + 1
    return LabelMap(placed, channels, size, tuple(notes), lost, found.segments, file_spacing)


def _read_one(
    file: VolumeHeader, options: ReadingOptions, image: VolumeHeader
) -> tuple[Labels, tuple[int, ...]]:
    """Return the labels of a label map as in its file, and those that occur."""
    is_certain = options.input_type == KIND
    advice = (
        "logits need one value per label (-p BACKGROUND -p FOREGROUND), or --regions NAME=1 for a "
        "single region; for the log-odds of label 1 alone, a network's output before the sigmoid, "
        "give --input-type logits"
    )
    advice += f"\n  {EXCHANGED}" if image.num_channels > 1 else ""
    # In doubt, only whole numbers are labels.
    labels = read_whole_numbers(file, LABEL_TOLERANCE if is_certain else 0.0, advice)
    present = present_labels(labels)
    if not is_certain and len(present) > _MAX_GRAY_VALUES:
        expected = "expected logits with one value per label, background included. For a label map, give --input-type labels"
        raise InputError(
            f"{file.path}: one value per voxel, {len(present)} different ones, as in an image; {expected}"
        )
    declared = options.declared
    if declared is not None and (unknown := sorted(set(present) - set(declared.numbers))):
        raise InputError(
            f"{file.path}: has labels that are not declared: {listed(unknown, MAX_SHOWN)}\n"
            f"  Expected labels among {listed(declared.numbers, MAX_SHOWN)} of {declared.source}: add them, or merge them in the label map."
        )
    return labels, present


class MergedStructures(NamedTuple):
    """A label map of structures, of which the smallest one keeps a voxel.

    Of equally large ones, the first by number.
    """

    labels: Labels  # ([z,] y, x)
    num_structures: int  # that are not empty
    num_shared: int  # voxels of several structures
    losers: dict[str, tuple[int, int]]  # keep less than half of their voxels: how many, of how many

    @property
    def lost(self) -> str:
        """The losers in words; empty without any."""
        losers = [
            f"{shorten(name)} keeps {left} of {size} voxels"
            for name, (left, size) in self.losers.items()
        ]
        if losers:
            return f"structures that lose most of their voxels to smaller ones: {listed(losers, MAX_SHOWN)}"
        return ""


def merge_structures(files: Sequence[VolumeHeader], numbers: Mapping[str, int]) -> MergedStructures:
    """Read one binary file per structure, one after the other, into one label map."""
    first = files[0]
    largest = max(numbers.values())
    for file in files:
        if not first.on_same_grid(file):
            raise GridMismatchError(
                f"{file.path}: not on the grid of the other structures\n{first.difference_from(file)}"
            )
    labels: Labels = np.zeros(first.grid_shape[::-1], np.min_scalar_type(largest))
    shared = np.zeros(labels.shape, np.bool_)
    sizes = np.zeros(largest + 1, np.int64)
    for file in files:
        expected = "a file of one structure holds 0 and 1; a label map is given by itself: -p FILE, or -p FOLDER with the name of the case"
        values = read_whole_numbers(file, 0.0, expected)
        number = numbers[stem_of(file.path)]
        if values.max() > 1:
            raise InputError(
                f"{file.path}: expected 0 and 1, found values up to {values.max()}: {expected}"
            )
        inside = values.reshape(labels.shape) == 1
        sizes[number] = np.count_nonzero(inside)
        others = labels[inside]
        taken = others != 0
        shared[inside] |= taken
        wins = (
            ~taken
            | (sizes[number] < sizes[others])
            | ((sizes[number] == sizes[others]) & (number < others))
        )
        labels[inside] = np.where(wins, labels.dtype.type(number), others)
    left = count_labels(labels, largest + 1)
    losers = {
        name: (left[number], int(sizes[number]))
        for name, number in numbers.items()
        if 2 * left[number] < sizes[number]
    }
    return MergedStructures(
        labels, int(np.count_nonzero(sizes)), int(np.count_nonzero(shared)), losers
    )
