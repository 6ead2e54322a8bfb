"""Read one binary file per structure into a label map, instead of a network's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from crfrefine.arrays.label_maps import (
    count_labels,
    present_labels,
)
from crfrefine.arrays.network import LabelMapNetwork
from crfrefine.base.array_types import Bool, Labels
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.cases.other_grid import WorkGrid, union_of
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.reading import (
    read_whole_numbers,
)
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import Segment, Segments, VolumeHeader

if TYPE_CHECKING:
    from crfrefine.cases.case_headers import CaseHeaders
    from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.cases.label_input import on_image_grid


def read_structures(
    headers: CaseHeaders, options: ReadingOptions, notes: list[Note]
) -> LabelMapNetwork:
    """Read one binary file per structure into a label map on the grid of the image.

    `notes` gets those for the user.
    """
    assert options.declared is not None
    numbers = options.declared.structures
    header = headers.network
    grid = grid_of_structures(header.files)
    structures = headers.files.structures
    labels, kept, num_shared = merge_structures(header.files, structures, grid, numbers)
    note = NoteKind.STRUCTURES(
        name=header.path.parent.name,
        files=len(header.files),
        not_empty=sum(size > 0 for _, size in kept.values()),
    )
    notes.append(note)
    if num_shared:
        notes.append(NoteKind.SHARED_BY_STRUCTURES(voxels=num_shared))
    losers = list_losers(kept)
    if losers:
        notes.append(NoteKind.LOSING_STRUCTURES(structures=losers))
    lost = {}
    for name, (num_left, size) in kept.items():
        if size and not num_left:
            lost[numbers[name]] = size
    num_labels = options.declared.num_labels
    label_map = LabelMapNetwork(labels, present_labels(labels), num_labels, lost=lost)
    return on_image_grid(label_map, grid, headers, options, notes)


def segments_of_structures(headers: CaseHeaders, options: ReadingOptions) -> Segments:
    """Return the segment of each structure: that of its file, if the file has a single one."""
    assert options.declared is not None
    numbers = options.declared.structures
    segments = {name: Segment(number, name) for name, number in numbers.items()}
    for name, file in zip(headers.files.structures, headers.network.files, strict=True):
        if len(file.segments) == 1:
            segments[name] = replace(file.segments[0], label=segments[name].label)
    return tuple(segments.values())


# The voxels that each structure keeps where structures overlap, and those of its file.
Kept: TypeAlias = Mapping[str, tuple[int, int]]


def list_losers(kept: Kept) -> list[str]:
    """Return in words which structures keep less than half of their voxels."""
    losers = []
    for name, (num_left, size) in kept.items():
        if 2 * num_left < size:
            losers.append(f"{shorten(name)} keeps {num_left} of {size} voxels")
    return losers


def grid_of_structures(files: Sequence[VolumeHeader]) -> VolumeHeader:
    """Return the header of the grid that holds all structures, which may be stored in boxes.

    Raises GridMismatchError if voxels of a file are not at those of the first one.
    """
    first = files[0]
    others = [file for file in files if not first.on_same_grid(file)]
    for file in others:
        if WorkGrid(first).map_to(file).in_whole_voxels is None:
            raise GridMismatchError(
                f"{file.path}: not on the grid of the other structures\n"
                f"{first.difference_from(file)}"
            )
    return union_of(first, others)


def merge_structures(
    files: Sequence[VolumeHeader],
    names: Sequence[str],
    grid: VolumeHeader,
    numbers: Mapping[str, int],
) -> tuple[Labels, Kept, int]:
    """Read one binary file per structure, one after the other, into one label map on a grid.

    The smallest structure keeps a voxel; of equally large ones, the first by number. `names` are
    those of the structures of the files, `numbers` those of all structures. Return ([z,] y, x)
    labels, the facts that structures keep, and how many voxels several of them have. Raises
    InputError for other values than 0 and 1.
    """
    largest = max(numbers.values())
    dtype = np.min_scalar_type(largest)
    labels = allocate_array(grid.stored_grid, files[0].path, dtype)
    labels[:] = 0
    is_shared = np.zeros(labels.shape, np.bool_)
    sizes = np.zeros(largest + 1, np.int64)
    for name, file in zip(names, files, strict=True):
        number = numbers[name]
        stored = read_structure(file)
        inside = WorkGrid(grid).nearest(file, stored, "structure", [], outside="are background")
        sizes[number] = np.count_nonzero(inside)
        others = labels[inside]
        is_taken = others != 0
        is_shared[inside] |= is_taken
        is_smaller = sizes[number] < sizes[others]
        is_as_large = sizes[number] == sizes[others]
        wins = ~is_taken | is_smaller | (is_as_large & (number < others))
        labels[inside] = np.where(wins, labels.dtype.type(number), others)

    num_left = count_labels(labels, largest + 1)
    kept = {name: (num_left[number], int(sizes[number])) for name, number in numbers.items()}
    return labels, kept, int(np.count_nonzero(is_shared))


def read_structure(file: VolumeHeader) -> Bool:
    """Return where a binary file is 1; InputError for other values than 0 and 1."""
    expected = (
        "a file of one structure holds 0 and 1; a label map is given by itself: -p FILE, or "
        "-p FOLDER with the name of the case"
    )
    values = read_whole_numbers(file, 0.0, expected)
    if values.max() > 1:
        raise InputError(
            f"{file.path}: expected 0 and 1, found values up to {values.max()}: {expected}"
        )
    return values == 1
