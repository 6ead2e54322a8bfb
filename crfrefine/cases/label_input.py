"""Read a label map, or one binary file per structure, in place of a network's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import count_labels
from crfrefine.arrays.one_hot import MOST_SHOWN, channels_of, describe_labels, one_hot_logits, present_labels
from crfrefine.arrays.padding import plane_blocks
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.labels import MOST_OFF, WholeNumbers, read_where, read_whole_numbers
from crfrefine.io.logits import LogitsHeader

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from crfrefine.cases.declared_labels import DeclaredLabels
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.io.volume import VolumeHeader

Place = Callable[["NDArray[Any]"], "NDArray[Any]"]
"""Returns ([z,] y, x) labels of a file on the grid of the image."""

KIND = "labels"
"""`LogitsHeader.kind` of a label map."""

LOST = "structures that lose most of their voxels"
"""The note on structures that others cover begins with it."""

_MOST_GRAY_VALUES = 256
"""Under "auto", a file with more different values is rather an image."""


@dataclass(frozen=True)
class LabelMap:
    """A label map on the image's grid.

    Attributes:
        labels: ([z,] y, x), uint8 or uint16.
        channel_labels: the labels that occur, background, and at least two; ascending.
        num_labels: L, background included.
        notes: what the user should know, one sentence each.
        lost: voxels of each label that the files have and this label map lacks.
    """

    labels: NDArray[np.unsignedinteger[Any]]
    channel_labels: tuple[int, ...]
    num_labels: int
    notes: tuple[str, ...]
    lost: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelInput:
    """A label map as logits.

    Attributes:
        logits: (channels, [z,] y, x) float32.
        channel_labels: the label of each channel.
        num_labels: L, background included.
        notes: what the user should know, one sentence each.
        absent: labels that have a channel without occurring in the case.
    """

    logits: NDArray[np.float32]
    channel_labels: tuple[int, ...]
    num_labels: int
    notes: tuple[str, ...]
    absent: tuple[int, ...] = ()


def read_label_header(paths: Sequence[Path], are_structures: bool, options: ReadingOptions) -> LogitsHeader | None:
    """Read the headers of a label map or of structures; return None if the files are to be read as logits or probabilities.

    Raises:
        InputError: a file with several values per voxel, although the options say that it is a label map.
        UnsupportedFormatError: a file cannot be read.
    """
    if options.input_type not in ("auto", KIND) or (len(paths) > 1 and not are_structures):
        return None
    files = tuple(io.read_header(path) for path in paths)
    for file in files:
        if file.num_channels == 1 and file.affine is not None:
            continue
        if options.input_type == "auto":
            return None
        what = "no geometry" if file.affine is None else f"{file.num_channels}"
        raise InputError(
            f"{file.path}: expected a label map with one value per voxel, this file has {what}; for logits or probabilities, leave "
            "--input-type labels out"
        )
    declared = options.declared
    # Without a declaration, only the voxels tell.
    num_labels = 0 if declared is None else declared.num_labels
    return LogitsHeader(files, num_labels, files[0].grid_shape, files[0].affine, KIND)


class LabelMapReader:
    """Reads the label map of one case: first `jobs` run, together with those of the case's other files, then `finish`.

    Args:
        header: of the label map.
        options: how to read.
    """

    def __init__(self, header: LogitsHeader, options: ReadingOptions) -> None:
        self._file = header.files[0]
        self._options = options
        self._found: WholeNumbers | None = None

    def jobs(self) -> list[Callable[[], None]]:
        """Return the job that reads the file."""
        return [self._read]

    def _read(self) -> None:
        self._found = read_whole_numbers(self._file)

    def finish(self, place: Place) -> LabelInput:
        """Return the label map as logits, after the job has run; as for `place`."""
        return _as_logits(self.place(place), self._options)

    def place(self, place: Place) -> LabelMap:
        """Return the label map on the image's grid, after the job has run.

        Args:
            place: puts the labels onto that grid.

        Raises:
            InputError: values that are not labels, or labels that are not declared.
        """
        path = self._file.path
        assert self._found is not None
        labels = _as_labels(self._found, path, is_certain=self._options.input_type == KIND)
        present = present_labels(labels)
        if self._options.input_type != KIND and len(present) > _MOST_GRAY_VALUES:
            raise InputError(
                f"{path}: one value per voxel, {len(present)} different ones, as in an image; expected logits with one value per label, "
                "background included. For a label map, give --input-type labels"
            )
        _require_declared(present, self._options.declared, path)
        reason = "requested" if self._options.input_type == KIND else "it has one value per voxel, whole numbers from 0 up"
        self._found = None
        return _placed(labels, present, place, self._options, (f"{path.name} is taken as a label map: {reason}",))


class StructuresReader:
    """Reads one binary file per structure into one label map, file after file; `finish` does the work.

    Args:
        header: of the files.
        options: how to read; `declared` has the numbers of the structures.
    """

    def __init__(self, header: LogitsHeader, options: ReadingOptions) -> None:
        self._files = header.files
        self._options = options

    def jobs(self) -> list[Callable[[], None]]:
        """Return no job: the files are read one after the other, so that only one of them is in memory."""
        return []

    def finish(self, place: Place) -> LabelInput:
        """Return the structures as the logits of one label map; as for `place`."""
        return _as_logits(self.place(place), self._options)

    def place(self, place: Place) -> LabelMap:
        """Return the structures as one label map on the image's grid.

        Args:
            place: puts the labels onto that grid.

        Raises:
            InputError: a file is not binary.
            GridMismatchError: two structures are on different grids.
        """
        declared = self._options.declared
        assert declared is not None
        labels, overlap = merge_structures(self._files, declared.structures)
        folder = self._files[0].path.parent.name
        notes = [f"{folder} is taken as one file per structure: {counted(len(self._files), 'file')}, {overlap.num_structures} not empty"]
        placed = _placed(labels, present_labels(labels), place, self._options, (*notes, *overlap.notes))
        lost = {declared.structures[name]: size for name, (left, size) in overlap.losers.items() if not left}
        return replace(placed, lost={**placed.lost, **lost})


@dataclass
class Overlap:
    """What became of structures that share voxels.

    Attributes:
        num_structures: structures whose files are not empty.
        num_voxels: voxels of several structures.
        example: the names of two such structures.
        losers: by name, the structures that keep less than half of their voxels: how many are left, of how many.
    """

    num_structures: int = 0
    num_voxels: int = 0
    example: tuple[str, str] = ("", "")
    losers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence each; none without an overlap."""
        if not self.num_voxels:
            return ()
        one, other = map(shorten, self.example)
        note = f"structures overlap, and the smaller one keeps the voxel: {self.num_voxels} voxels, such as of {one} and {other}"
        if not self.losers:
            return (note,)
        return note, f"{self.lost}; if it is a union of others, leave its file out and unite its refined parts"

    @property
    def lost(self) -> str:
        """The structures that keep less than half of their voxels, in words; empty if there are none."""
        losers = [f"{shorten(name)} keeps {left} of {size} voxels" for name, (left, size) in self.losers.items()]
        return f"{LOST} to smaller ones: {listed(losers, MOST_SHOWN)}" if losers else ""


def merge_structures(files: Sequence[VolumeHeader], numbers: Mapping[str, int]) -> tuple[NDArray[np.unsignedinteger[Any]], Overlap]:
    """Read one binary file per structure, one after the other, into one label map.

    Where structures overlap, the one with the fewest voxels keeps a voxel (of two equally large ones the first by number), so that a
    structure inside another one survives. The order of the files does not matter.

    Args:
        files: headers.
        numbers: number of each structure by its name, which is that of its file.

    Returns:
        The label map ([z,] y, x), and where structures overlapped.

    Raises:
        InputError: a file is not binary.
        GridMismatchError: two structures are on different grids.
    """
    first = files[0]
    for file in files:
        if not first.on_same_grid(file):
            raise GridMismatchError(f"{file.path}: not on the grid of the other structures\n{first.difference_from(file)}")
    largest = max(numbers.values())
    shape = files[0].grid_shape[::-1]
    labels: NDArray[np.unsignedinteger[Any]] = np.zeros(shape, np.min_scalar_type(largest))
    shared = np.zeros(shape, np.bool_)
    overlap = Overlap()
    names = {number: name for name, number in numbers.items()}
    sizes = np.zeros(largest + 1, np.int64)
    for file in files:
        number = numbers[io.stem_of(file.path)]
        inside = _inside(file).reshape(shape)
        sizes[number] = np.count_nonzero(inside)
        if not sizes[number]:
            continue
        others = labels[inside]
        taken = others != 0
        if taken.any():
            if not overlap.num_voxels:
                overlap.example = names[int(others[taken][0])], names[number]
            twice = inside.copy()
            twice[inside] = taken
            shared |= twice
            overlap.num_voxels = int(np.count_nonzero(shared))
        # Of two equally large ones, the first by name keeps the voxel.
        wins = ~taken | (sizes[number] < sizes[others]) | ((sizes[number] == sizes[others]) & (number < others))
        labels[inside] = np.where(wins, labels.dtype.type(number), others)
    overlap.num_structures = int(np.count_nonzero(sizes))
    if overlap.num_voxels:
        left = count_labels(labels, largest + 1)
        overlap.losers = {name: (left[number], int(sizes[number])) for name, number in numbers.items() if 2 * left[number] < sizes[number]}
    return labels, overlap


def refuse_structures(values: NDArray[np.float32], path: Path) -> None:
    """Raise InputError if files that are to be one per label look like structures: only 0 and 1, and voxels in none of them.

    Otherwise, the first structure would be taken for background, and the background for padding.

    Args:
        values: (L, [z,] y, x), one file per label.
        path: of the first file.
    """
    num_nowhere = 0
    for planes in plane_blocks(values):
        block = values[:, planes]
        if not bool(((block == 0) | (block == 1)).all()):
            return
        num_nowhere += int(np.count_nonzero(~block.any(axis=0)))
    if num_nowhere:
        raise InputError(
            f"{path}: {len(values)} files of 0 and 1, none of them 1 at {num_nowhere} voxels, as for one binary file per structure\n"
            "  For structures, give --input-type labels; for probabilities of all labels, background first, --input-type probabilities."
        )


def _inside(file: VolumeHeader) -> NDArray[np.bool_]:
    """Return where a binary file is 1, ([z,] y, x)."""
    odd: list[NDArray[Any]] = []

    def is_one(values: NDArray[Any]) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = values == 1
        if not bool(((values == 0) | inside).all()):
            odd.append(values[(values != 0) & ~inside])
        return inside

    inside = read_where(file, is_one)
    if odd:
        raise InputError(
            f"{file.path}: expected 0 and 1, as in a binary file of one structure; found {odd[0][0]:.6g} at {sum(map(len, odd))} voxels\n"
            "  A label map with several labels is given by itself: -p FILE, or -p FOLDER with the name of the case."
        )
    return inside


def _as_labels(found: WholeNumbers, path: Path, *, is_certain: bool) -> NDArray[np.unsignedinteger[Any]]:
    """Return values as labels; in doubt, only whole numbers are."""
    if found.off > (MOST_OFF if is_certain else 0.0):
        raise InputError(
            f"{path}: one label only: one value per voxel, and not a whole number (up to {found.off:.2g} away from one) as in a label map\n"
            "  Logits need one value per label at each voxel, background included. A single foreground channel needs its background\n"
            "  beside it: give one file per label, -p BACKGROUND -p FOREGROUND. The sigmoid channel of a single region needs its labels:\n"
            "  --regions NAME=1."
        )
    found.require_range(path)
    return found.labels


def _require_declared(present: Sequence[int], declared: DeclaredLabels | None, path: Path) -> None:
    unknown = sorted(set(present) - set(declared.numbers)) if declared is not None else []
    if declared is not None and unknown:
        raise InputError(
            f"{path}: has labels that are not declared: {describe_labels(unknown)}; it holds {describe_labels(present)}\n"
            f"  Expected labels among {describe_labels(declared.numbers)} of {declared.source}.\n"
            "  Add them there, or merge them in the label map; parameters with a value per label need a value for each."
        )


def _placed(
    labels: NDArray[np.unsignedinteger[Any]], present: Sequence[int], place: Place, options: ReadingOptions, notes: tuple[str, ...]
) -> LabelMap:
    placed = place(labels)
    lost: dict[int, int] = {}
    if not np.may_share_memory(placed, labels):
        # On another grid, small structures may be lost.
        before, present = present, present_labels(placed)
        if gone := set(before) - {0, *present}:
            lost = {label: int(np.count_nonzero(labels == label)) for label in sorted(gone)}
    channels = channels_of(present)
    declared = options.declared
    return LabelMap(placed, channels, channels[-1] + 1 if declared is None else declared.num_labels, notes, lost)


def _as_logits(found: LabelMap, options: ReadingOptions) -> LabelInput:
    labels, channels = found.labels, found.channel_labels
    if not options.all_labels:
        return LabelInput(one_hot_logits(labels, channels), channels, found.num_labels, found.notes)
    everything = tuple(range(found.num_labels))
    absent = tuple(label for label in everything if label not in channels)
    return LabelInput(one_hot_logits(labels, everything, channels), everything, found.num_labels, found.notes, absent)
