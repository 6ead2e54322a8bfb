"""A stroke as the voxels that it draws, and all strokes as the values of a sparse array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.strokes import BACKGROUND, Strokes
from crfrefine.base.array_types import Array, Integers
from crfrefine.base.limits import MAX_LABEL
from crfrefine.tune.values import Json


class Edit(NamedTuple):
    """A stroke."""

    voxels: Integers  # sorted places in the grid, the last axis the fastest
    value: int  # a label, BACKGROUND, or 0 for nothing

    def to_text(self) -> str:
        """Return JSON: the first place and the length of each run of places, and the value."""
        starts = np.flatnonzero(np.diff(self.voxels, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(self.voxels)))
        runs = (self.voxels[starts].tolist(), lengths.tolist())
        return json.dumps({"value": self.value, "runs": runs}, separators=(",", ":"))

    @classmethod
    def from_dict(cls, entry: Json, num_voxels: int) -> Edit:
        """Restore a stroke in a grid of so many voxels.

        Raise ValueError, TypeError or KeyError for one that cannot be drawn.
        """
        value = entry["value"]
        firsts, lengths = entry["runs"]
        if type(value) is not int or not 0 <= value <= MAX_LABEL:
            raise ValueError(f"{value}: no label")
        offsets = np.arange(sum(lengths)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        voxels = np.repeat(np.array(firsts, np.int64), lengths) + offsets
        if (np.diff(voxels, prepend=-1, append=num_voxels) <= 0).any():
            raise ValueError("a stroke has voxels twice, or outside of the grid")
        return cls(voxels, value)


def sparse(values: Array) -> tuple[Integers, Array]:
    """Return the sorted places of the voxels that are drawn, and their values."""
    places = np.flatnonzero(values)
    return places, values[np.unravel_index(places, values.shape)]


def sparse_strokes(strokes: Strokes, grid: Sequence[int]) -> tuple[Integers, Integers]:
    """Return the places of drawn voxels, and their values as in a file of strokes."""
    voxels = np.ravel_multi_index(tuple(strokes.positions), tuple(grid))
    return voxels, np.where(strokes.labels == 0, BACKGROUND, strokes.labels)


def digest(places: Integers, values: Array, grid: Sequence[int]) -> str:
    """Return a text that is that of equal strokes alone; "" if nothing is drawn."""
    if not len(places):
        return ""
    # As in files, the first axis is the fastest.
    stored = np.ravel_multi_index(np.unravel_index(places, grid), tuple(grid), order="F")
    order = np.argsort(stored)
    content = stored[order].astype("<i8").tobytes() + values[order].astype("<u2").tobytes()
    return hashlib.sha256(content).hexdigest()


def edits_of(voxels: Integers, values: Array) -> list[Edit]:
    """Return an edit for each value."""
    edits = []
    for value in np.unique(values).tolist():
        edits.append(Edit(np.sort(voxels[values == value]), value))
    return edits
