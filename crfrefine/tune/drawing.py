"""The strokes of a case, from the first one on: drawn, taken back, drawn again, and kept in a file.

The file is written whole at the end of each stroke. It has those that were taken back, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array
from crfrefine.base.limits import MAX_LABEL
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.writing import write_small_file
from crfrefine.refinement.strokes import BACKGROUND, Strokes

_MAX_MARKS = 1000  # edits that are known again if they are sent twice

Places = NDArray[np.int64]
NOWHERE: Places = np.empty(0, np.int64)


class Edit(NamedTuple):
    """A stroke."""

    voxels: Places  # sorted places in the grid, the last axis the fastest
    value: int  # a label, BACKGROUND, or 0 for nothing

    def to_dict(self) -> dict[str, Any]:
        """Return the first place and the length of each run of places, and the value."""
        starts = np.flatnonzero(np.diff(self.voxels, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(self.voxels)))
        runs = (self.voxels[starts].tolist(), lengths.tolist())
        return {"value": self.value, "runs": runs}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], num_voxels: int) -> Edit:
        """Restore a stroke in a grid of so many voxels.

        Raise ValueError, TypeError or KeyError for one that nobody can have drawn.
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


class Drawing:
    """The strokes of a case. Its methods may be called from any thread."""

    def __init__(self, grid: Sequence[int], given: Strokes | None = None) -> None:
        """Begin with strokes from elsewhere, which cannot be taken back."""
        self._grid = tuple(grid)
        self._path: Path | None = None
        self._edits: list[Edit] = []
        if given is not None:
            self._edits = _edits_of_strokes(given, self._grid)
        self._num_given = len(self._edits)
        self._num_done = len(self._edits)
        self._given = _digest_of_edits(self._edits, self._grid)
        self._num_steps = 0
        self._marks: dict[str, None] = {}
        self._lock = threading.RLock()
        # of the files of strokes and result, which belong together
        self.saving_lock = threading.Lock()
        self._values: Array | None = None
        self._digest: str | None = None
        self._saved = self._present_digest()  # of the values that are saved with their result
        self._saving = self._saved  # of those in the file of strokes, whose result may follow
        self._inputs = ""  # those of the saved result, as of `stamp_of_inputs`
        self.problem = ""  # why the file cannot be written

    @classmethod
    def read(cls, path: Path, grid: Sequence[int]) -> Drawing:
        """Read what `keep_in` has written; raise InputError if it is of another grid."""
        try:
            content = json.loads(path.read_bytes())
            stored_grid = content["grid"]
            num_voxels = math.prod(stored_grid)
            edits = [Edit.from_dict(entry, num_voxels) for entry in content["edits"]]
            saved = content["saved"]
            if not 0 <= content["given"] <= content["done"] <= len(edits):
                raise ValueError("it has other numbers of strokes than it says")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: cannot be read: {error}; move it away to begin anew"
            ) from error
        if stored_grid != list(grid):
            raise InputError(
                f"{path}: has strokes on a grid of {stored_grid} voxels, and the case has "
                f"{list(grid)}; move it away, or name another folder with --corrections"
            )
        drawing = cls(grid)
        drawing._edits = edits
        drawing._num_given = content["given"]
        drawing._num_done = content["done"]
        drawing._saved = saved
        drawing._saving = content.get("saving", saved)
        drawing._inputs = content.get("inputs", "")
        given = _digest_of_edits(edits[: drawing._num_given], drawing._grid)
        drawing._given = content.get("given_digest", given)
        drawing._digest = None
        drawing.forget()
        return drawing

    @property
    def values(self) -> Array:
        """(*grid), as in a file of strokes; the array of an older state stays as it is."""
        with self._lock:  # An edit meanwhile would leave the array of the state before it.
            if self._values is None:
                largest = max([BACKGROUND, *(edit.value for edit in self._edits)])
                values = np.zeros(self._grid, np.min_scalar_type(largest), order="F")
                for voxels, value in self._edits[: self._num_done]:
                    values[np.unravel_index(voxels, self._grid)] = value
                self._values = values
            return self._values

    def _present_digest(self) -> str:
        """Return the digest of the strokes of now."""
        with self._lock:
            if self._digest is None:
                self._digest = _digest_of_edits(self._edits[: self._num_done], self._grid)
            return self._digest

    @property
    def largest(self) -> int:
        """The largest label that is drawn."""
        labels = [edit.value for edit in self._edits if edit.value != BACKGROUND]
        return max(labels, default=0)

    @property
    def is_unsaved(self) -> bool:
        """Whether there are strokes that are not saved with their result."""
        return self._present_digest() != self._saved

    @property
    def is_lost(self) -> bool:
        """Whether there are such strokes, and they are gone when the program ends."""
        return self.is_unsaved and (self._path is None or bool(self.problem))

    def has_had(self, values: Array) -> bool:
        """Return whether these values are those of now, or those that were written last."""
        return self._digest_of(values) in (self._saved, self._saving, self._present_digest())

    def _digest_of(self, values: Array) -> str:
        """Return the digest of (*grid) values as in a file of strokes."""
        drawn = np.flatnonzero(values)
        return _digest(drawn, values[np.unravel_index(drawn, self._grid)], self._grid)

    def forget(self) -> None:
        """Free the array, which is made again when it is needed."""
        self._values = None

    def draw(self, edit: Edit, mark: str = "") -> Places:
        """Draw a stroke. One with the mark of an earlier call is the same one, sent again.

        Return the voxels that may have changed, as do `undo` and `redo`.
        """
        with self._lock:
            if self._is_new(mark):
                del self._edits[self._num_done :]
                self._edits.append(edit)
                self._step(1)
        return edit.voxels

    def undo(self, mark: str = "") -> Places:
        """Take the last stroke back, if any."""
        with self._lock:
            if self._is_new(mark) and self._num_done > self._num_given:
                self._step(-1)
                return self._edits[self._num_done].voxels
        return NOWHERE

    def redo(self, mark: str = "") -> Places:
        """Draw the stroke again that was taken back last, if any."""
        with self._lock:
            if self._is_new(mark) and self._num_done < len(self._edits):
                self._step(1)
                return self._edits[self._num_done - 1].voxels
        return NOWHERE

    def follow(self, values: Array) -> None:
        """Take strokes that were changed elsewhere, as one would draw them."""
        changed = np.flatnonzero(values != self.values)
        with self._lock:
            added = _edits_of(changed, values.ravel()[changed])
            self._edits[self._num_done :] = added
            self._step(len(added))
            self._saved = self._present_digest()

    def take(self, given: Strokes) -> bool:
        """Draw strokes from elsewhere unless they are those given before; return whether it did."""
        edits = _edits_of_strokes(given, self._grid)
        digest = _digest_of_edits(edits, self._grid)
        with self._lock:
            if digest == self._given:
                return False
            self._given = digest
            self._edits[self._num_done :] = edits
            self._step(len(edits))
        return True

    def _is_new(self, mark: str) -> bool:
        is_new = not mark or mark not in self._marks
        self._marks[mark] = None
        if len(self._marks) > _MAX_MARKS:
            del self._marks[next(iter(self._marks))]
        return is_new

    def _step(self, by: int) -> None:
        self._num_done += by
        self._num_steps += 1
        self._values = None
        self._digest = None
        self._write()

    # ---- The file

    def keep_in(self, path: Path) -> None:
        """Keep the strokes in a file from now on; write it."""
        with self._lock:
            self._path = path
            if self._num_given < len(self._edits) or self.problem:
                self._write()

    def mark_saving(self, values: Array) -> None:
        """Note that these values are written to the file of strokes, before their result is.

        If the program ends between the two, they are no strokes from elsewhere.
        """
        with self._lock:
            self._saving = self._digest_of(values)
            self._write()

    def mark_saved(self, inputs: str) -> None:
        """Note that the values that were written are saved with their result, of these inputs."""
        with self._lock:
            self._saved = self._saving
            self._inputs = inputs
            self._write()

    def _write(self) -> None:
        """Write the file; on a full disk, strokes stay in memory until it can be written."""
        if self._path is None:
            return
        content = {
            "grid": self._grid,
            "given": self._num_given,
            "done": self._num_done,
            "given_digest": self._given,
            "saved": self._saved,
            "saving": self._saving,
            "inputs": self._inputs,
            "digest": self._present_digest(),
            "edits": [edit.to_dict() for edit in self._edits],
        }
        self.problem = ""
        try:
            write_small_file(self._path, json.dumps(content).encode())
        except CrfRefineError as error:
            self.problem = str(error)

    def describe(self) -> dict[str, Any]:
        """Return what the page shows of the strokes."""
        with self._lock:
            return {
                "drawn": len(_drawn(self._edits[: self._num_done])[0]),
                "step": self._num_steps,  # It rises with each edit.
                "can_undo": self._num_done > self._num_given,
                "can_redo": self._num_done < len(self._edits),
                "problem": self.problem,
            }


@lru_cache(maxsize=20_000)
def has_unsaved(path: Path, _mtime_ns: int, inputs: str) -> bool:
    """Return whether a file of a drawing, of a time, has strokes not saved with their result.

    A result of other inputs is none.
    """
    try:
        content = json.loads(path.read_bytes())
        is_of_others = content.get("inputs", "") not in ("", inputs)
        return bool(content["saved"] != content["digest"] or is_of_others)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True  # Whoever opens the case is told why.


def _drawn(edits: Sequence[Edit]) -> tuple[Places, Array]:
    """Return the sorted places of the voxels that edits draw, and their values."""
    places = np.concatenate([NOWHERE, *(edit.voxels for edit in edits)])
    values = np.concatenate([NOWHERE, *(np.full(len(voxels), value) for voxels, value in edits)])
    # Of several edits of a voxel the last one counts.
    drawn, last = np.unique(places[::-1], return_index=True)
    values = values[::-1][last]
    return drawn[values != 0], values[values != 0]


def _digest_of_edits(edits: Sequence[Edit], grid: Sequence[int]) -> str:
    return _digest(*_drawn(edits), grid)


def _digest(places: Places, values: Array, grid: Sequence[int]) -> str:
    """Return a text that is that of equal strokes alone; "" if nothing is drawn."""
    if not len(places):
        return ""
    # As in files, the first axis is the fastest.
    stored = np.ravel_multi_index(np.unravel_index(places, grid), tuple(grid), order="F")
    order = np.argsort(stored)
    content = stored[order].astype("<i8").tobytes() + values[order].astype("<u2").tobytes()
    return hashlib.sha256(content).hexdigest()


def _edits_of(voxels: Places, values: Array) -> list[Edit]:
    """Return an edit for each value."""
    edits = []
    for value in np.unique(values).tolist():
        edits.append(Edit(np.sort(voxels[values == value]), value))
    return edits


def _edits_of_strokes(strokes: Strokes, grid: Sequence[int]) -> list[Edit]:
    """Return an edit for each label that is drawn."""
    voxels = np.ravel_multi_index(tuple(strokes.positions), tuple(grid))
    return _edits_of(voxels, np.where(strokes.labels == 0, BACKGROUND, strokes.labels))
