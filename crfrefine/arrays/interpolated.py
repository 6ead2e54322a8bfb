"""Recognize label maps with other numbers than were meant: interpolated, or of swapped bytes.

Values between two labels become new labels there.
"""

from __future__ import annotations

import numpy as np

from crfrefine.arrays.scales import lines_of
from crfrefine.base.array_types import Labels
from crfrefine.base.notes import Note, NoteKind

_BYTE = 256  # values of 8 bits
_MIN_LABELS = 16  # A map with fewer labels is not looked at.
# A label lies only at borders if, over the rows and columns of planes, less than this share of its
# voxels is followed by one of its label, and more than that share lies between a lower and a higher
# value: of the two directions, one often goes along a border.
_SHARE_ALIKE = 0.4
_SHARE_BETWEEN = 0.3
_SHARE_OF_LABELS = 0.5  # More labels than this share have to be only at borders.


def notes_on_labels(labels: Labels, file: str = "") -> list[Note]:
    """Return notes on a label map, ([z,] y, x), whose numbers are hardly those that were meant."""
    notes = []
    note = note_on_interpolated(labels, file)
    if note is not None:
        notes.append(note)
    largest = int(labels.max(initial=0))
    if largest >= _BYTE and not (labels % _BYTE).any():  # The lower 8 of 16 bits are all 0.
        notes.append(NoteKind.BYTES_SWAPPED(file, largest=largest))
    return notes


def note_on_interpolated(labels: Labels, file: str = "") -> Note | None:
    """Return a note on a label map with interpolated borders; None for others.

    `labels` is ([z,] y, x).
    """
    size = int(labels.max(initial=0)) + 1
    if size <= _MIN_LABELS:
        return None
    # Of each label, all voxels, those like the next one, and those between two others.
    counts = np.zeros((3, size), np.int64)
    for lines in lines_of(labels):
        before = lines[:, :-2]
        inner = lines[:, 1:-1]
        after = lines[:, 2:]
        is_between = inner > np.minimum(before, after)
        is_between &= inner < np.maximum(before, after)
        kinds = (inner.reshape(-1), inner[inner == after], inner[is_between])
        for numbers, values in zip(counts, kinds, strict=True):
            numbers += np.bincount(values, minlength=size)
    counts = counts[:, 1:]  # without the background
    number, alike, between = counts[:, counts[0] > 0]
    if number.size < _MIN_LABELS:
        return None
    is_at_border = (alike < _SHARE_ALIKE * number) & (between > _SHARE_BETWEEN * number)
    num_between = int(np.count_nonzero(is_at_border))
    if num_between <= _SHARE_OF_LABELS * number.size:
        return None
    return NoteKind.THIN_LAYERS(file, layers=num_between, labels=number.size)
