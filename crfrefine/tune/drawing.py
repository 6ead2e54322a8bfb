"""The strokes of a case, from the first one on: drawn, taken back, drawn again, and kept in a file.

The file is written whole at the end of each stroke. It has those that were taken back, too. What
another program writes in it meanwhile is taken as further strokes, and never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
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

_MAX_MARKS = 200  # edits that are known again if they are sent twice, also after a restart

Places = NDArray[np.int64]
NOWHERE: Places = np.empty(0, np.int64)


class UnreadableDrawingError(InputError):
    """A file of strokes that cannot be read, or is of another grid."""


class Edit(NamedTuple):
    """A stroke."""

    voxels: Places  # sorted places in the grid, the last axis the fastest
    value: int  # a label, BACKGROUND, or 0 for nothing

    def to_text(self) -> str:
        """Return JSON: the first place and the length of each run of places, and the value."""
        starts = np.flatnonzero(np.diff(self.voxels, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(self.voxels)))
        runs = (self.voxels[starts].tolist(), lengths.tolist())
        return json.dumps({"value": self.value, "runs": runs}, separators=(",", ":"))

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], num_voxels: int) -> Edit:
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


class _KeptEdit(NamedTuple):
    """An edit as its file has it, which is smaller than its voxels."""

    text: str
    value: int
    state: str  # a text that only these strokes have, up to this one


class Drawing:
    """The strokes of a case. Its methods may be called from any thread."""

    def __init__(self, grid: Sequence[int], given: Strokes | None = None) -> None:
        """Begin with strokes from elsewhere, which cannot be taken back."""
        self._grid = tuple(grid)
        self._path: Path | None = None
        self._edits: list[_KeptEdit] = []
        self._num_done = 0
        # The array of the present strokes, how many voxels it has, and what the voxels of each edit
        # had before; None means that it is made again when it is needed.
        self._values: Array | None = None
        self._num_drawn = 0
        self._before: list[Array] = []
        edits = [] if given is None else _edits_of_strokes(given, self._grid)
        self._append(edits)
        self._num_given = self._num_done
        self._given = _digest_of_edits(edits, self._grid)
        self._marks: dict[str, None] = {}
        self._lock = threading.RLock()
        # of the files of strokes and result, which belong together
        self.saving_lock = threading.Lock()
        self._saved_state = self._state
        self._saved = self._given  # digest of the values that are saved with their result
        self._saving = self._saved  # of those in the file of strokes, whose result may follow
        self._saving_state = self._state
        # The places and values of the strokes that both this page and their file have had; None
        # means that these are not known.
        self._shared: tuple[Places, Array] | None = None
        self._inputs = ""  # those of the saved result, as of `stamp_of_inputs`
        self.result = ""  # digest of the file of the saved result; "" means that it is not known
        self._stamp: object = None  # of the file when it was read or written
        self.problem = ""  # why the file cannot be written

    @classmethod
    def read(cls, path: Path, grid: Sequence[int]) -> Drawing:
        """Read what `keep_in` has written; or raise UnreadableDrawingError."""
        drawing = cls(grid)
        drawing._stamp = stamp_of_file(path)
        try:
            content = json.loads(path.read_bytes())
            stored_grid = content["grid"]
            num_voxels = math.prod(stored_grid)
            edits = [Edit.from_dict(entry, num_voxels) for entry in content["edits"]]
            saved = content["saved"]
            num_done = content["done"]
            num_given = content["given"]
            if not 0 <= num_given <= num_done <= len(edits):
                raise ValueError("it has other numbers of strokes than it says")
            marks = dict.fromkeys(content.get("marks", ()))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnreadableDrawingError(
                f"{path}: cannot be read: {error}; move it away to begin anew"
            ) from error
        if stored_grid != list(grid):
            raise UnreadableDrawingError(
                f"{path}: has strokes on a grid of {stored_grid} voxels, and the case has "
                f"{list(grid)}; move it away, or name another folder with --corrections"
            )
        drawing._append(edits)
        drawing._num_given = num_given
        drawing._num_done = num_done
        drawing._marks = marks
        drawing._saved = saved
        drawing._saving = content.get("saving", saved)
        drawing._inputs = content.get("inputs", "")
        drawing.result = content.get("result", "")
        drawing._given = content.get("given_digest", "")
        # Files of earlier versions have the digest of the values of now.
        state = drawing._state if content.get("digest") == saved else "?"
        drawing._saved_state = content.get("saved_state", state)
        return drawing

    def _append(self, edits: Sequence[Edit]) -> None:
        """Add edits to those that are done, instead of those taken back."""
        if edits:
            del self._edits[self._num_done :]
        for edit in edits:
            text = edit.to_text()
            state = hashlib.sha256((self._state + text).encode()).hexdigest()
            self._edits.append(_KeptEdit(text, edit.value, state))
            self._num_done += 1

    def _edit(self, number: int) -> Edit:
        return Edit.from_dict(json.loads(self._edits[number].text), math.prod(self._grid))

    @property
    def _state(self) -> str:
        """A text that only the present strokes have; "" without any."""
        return self._edits[self._num_done - 1].state if self._num_done else ""

    @property
    def values(self) -> Array:
        """(*grid), as in a file of strokes; the array of an older state stays as it is."""
        with self._lock:  # An edit meanwhile would leave the array of the state before it.
            if self._values is None:
                self._values = np.zeros(self._grid, np.uint8, order="F")
                self._before = []
                self._num_drawn = 0
                for number in range(self._num_done):
                    self._do(self._edit(number))
            return self._values

    def _do(self, edit: Edit) -> None:
        """Draw an edit in the array, which may be changed."""
        assert self._values is not None
        if edit.value > np.iinfo(self._values.dtype).max:
            self._values = self._values.astype(np.uint16)
        places = np.unravel_index(edit.voxels, self._grid)
        before = self._values[places]
        self._before.append(before)
        self._values[places] = edit.value
        self._num_drawn -= int(np.count_nonzero(before))
        if edit.value:
            self._num_drawn += len(before)

    def _own_values(self) -> None:
        """Take a copy of the array, which may be changed."""
        self._values = self.values.copy(order="K")

    @property
    def labels(self) -> set[int]:
        """The labels that are drawn or were taken back."""
        return {edit.value for edit in self._edits} - {0, BACKGROUND}

    @property
    def is_unsaved(self) -> bool:
        """Whether there are strokes that are not saved with their result."""
        return self._state != self._saved_state

    @property
    def is_lost(self) -> bool:
        """Whether there are such strokes, and they are gone when the program ends."""
        return self.is_unsaved and (self._path is None or bool(self.problem))

    def forget(self) -> None:
        """Free the array, which is made again when it is needed."""
        with self._lock:
            self._values = None
            self._before = []

    def draw(self, edit: Edit, mark: str = "") -> Places:
        """Draw a stroke. One with the mark of an earlier call is the same one, sent again.

        Return the voxels that may have changed, as do `undo` and `redo`.
        """
        with self._lock:
            if self._is_new(mark):
                self.take_file()
                self._append([edit])
                self._step([edit])
        return edit.voxels

    def undo(self, mark: str = "") -> Places:
        """Take the last stroke back, if any."""
        with self._lock:
            if not self._is_new(mark):
                return NOWHERE
            self.take_file()
            if self._num_done == self._num_given:
                return NOWHERE
            self._own_values()
            assert self._values is not None
            edit = self._edit(self._num_done - 1)
            before = self._before.pop()
            self._values[np.unravel_index(edit.voxels, self._grid)] = before
            self._num_drawn += int(np.count_nonzero(before))
            if edit.value:
                self._num_drawn -= len(before)
            self._num_done -= 1
            self._step([])
        return edit.voxels

    def redo(self, mark: str = "") -> Places:
        """Draw the stroke again that was taken back last, if any."""
        with self._lock:
            if self._is_new(mark):
                self.take_file()
                if self._num_done < len(self._edits):
                    edit = self._edit(self._num_done)
                    self._num_done += 1
                    self._step([edit])
                    return edit.voxels
        return NOWHERE

    def take_outside(self, values: Array) -> bool:
        """Take what another program has written to the file of strokes, as one would draw it.

        What was drawn here since both had the same strokes stays, if these are known. Return
        whether there was anything to take.
        """
        digest = self._digest_of(values)
        with self._lock:
            shared = _sparse(values)
            is_known = digest in (self._saved, self._saving) or np.array_equal(values, self.values)
            if not is_known:
                base = self.values
                if self._shared is not None:
                    base = np.zeros_like(values)
                    base[np.unravel_index(self._shared[0], self._grid)] = self._shared[1]
                self._follow(values, base)
                self._saving = digest
                self._write()
            self._shared = shared
        return not is_known

    def _follow(self, values: Array, base: Array) -> None:
        """Draw the voxels in which values differ from others."""
        changed = np.flatnonzero(values != base)
        added = _edits_of(changed, values.ravel()[changed])
        self._append(added)
        self._step(added)

    def take(self, given: Strokes) -> bool:
        """Draw strokes from elsewhere unless they are those given before; return whether it did."""
        edits = _edits_of_strokes(given, self._grid)
        digest = _digest_of_edits(edits, self._grid)
        with self._lock:
            if digest == self._given:
                return False
            self._given = digest
            self._append(edits)
            self._step(edits)
        return True

    def has_done(self, mark: str) -> bool:
        """Return whether an edit with this mark is done already."""
        return mark != "" and mark in self._marks

    def _is_new(self, mark: str) -> bool:
        is_new = not mark or mark not in self._marks
        if mark:
            self._marks[mark] = None
        if len(self._marks) > _MAX_MARKS:
            del self._marks[next(iter(self._marks))]
        return is_new

    def _step(self, edits: Sequence[Edit]) -> None:
        """Draw edits that were appended in the array, if there is one, and write the file."""
        if edits and self._values is not None:
            self._own_values()
            for edit in edits:
                self._do(edit)
        self._write()

    # ---- The file

    def keep_in(self, path: Path) -> None:
        """Keep the strokes in a file from now on; write it."""
        with self._lock:
            self._path = path
            self.take_file()
            if self._num_given < len(self._edits) or self.problem:
                self._write()

    def mark_saving(self, values: Array) -> None:
        """Note that these values are written to the file of strokes, before their result is.

        If the program ends between the two, they are no strokes from elsewhere.
        """
        with self._lock:
            self._saving = self._digest_of(values)
            self._saving_state = self._state if values is self._values else "?"
            self._shared = _sparse(values)
            self.result = ""
            self._write()

    def mark_saved(self, inputs: str, result: str) -> None:
        """Note that the values that were written are saved with their result, of these inputs.

        `result` is the digest of its file.
        """
        with self._lock:
            self._saved = self._saving
            self._saved_state = self._saving_state
            self._inputs = inputs
            self.result = result
            self._write()

    def _digest_of(self, values: Array) -> str:
        """Return the digest of (*grid) values as in a file of strokes."""
        return _digest(*_sparse(values), self._grid)

    def take_file(self) -> None:
        """Take what another program has written to the file of the drawing, as one would draw it.

        A file that cannot be read is reported, and stays as it is.
        """
        with self._lock, suppress(UnreadableDrawingError):
            if self._path is None or stamp_of_file(self._path) in (None, self._stamp):
                return
            others = Drawing.read(self._path, self._grid)
            self._stamp = others._stamp
            self._follow(others.values, self.values)

    def _write(self) -> None:
        """Write the file; on a full disk, strokes stay in memory until it can be written."""
        if self._path is None:
            return
        if stamp_of_file(self._path) not in (None, self._stamp):
            self.problem = f"{self._path}: was changed elsewhere, and cannot be read; move it away"
            return
        content = {
            "grid": self._grid,
            "given": self._num_given,
            "done": self._num_done,
            "given_digest": self._given,
            "saved": self._saved,
            "saving": self._saving,
            "inputs": self._inputs,
            "result": self.result,
            "state": self._state,
            "saved_state": self._saved_state,
            "marks": list(self._marks),
        }
        edits = ",".join([edit.text for edit in self._edits])
        text = f'{json.dumps(content)[:-1]}, "edits": [{edits}]}}'
        self.problem = ""
        try:
            write_small_file(self._path, text.encode())
            self._stamp = stamp_of_file(self._path)
        except CrfRefineError as error:
            self.problem = str(error)

    def describe(self) -> dict[str, Any]:
        """Return the page's view of the strokes."""
        with self._lock:
            self.values  # noqa: B018  It counts the drawn voxels.
            return {
                "drawn": self._num_drawn,
                "step": self._state,  # It differs while other strokes are done.
                "can_undo": self._num_done > self._num_given,
                "can_redo": self._num_done < len(self._edits),
                "problem": self.problem,
            }


def stamp_of_file(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was written again; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=20_000)
def has_unsaved(path: Path, _mtime_ns: int, inputs: str, *, has_strokes: bool) -> bool:
    """Return whether a file of a drawing, of a time, has strokes not saved with their result.

    A result of other inputs does not count. `has_strokes` tells whether the file of strokes is
    there, which is written with each result.
    """
    try:
        content = json.loads(path.read_bytes())
        saved_inputs = content.get("inputs", "")  # "" means that it was never saved
        if saved_inputs and not has_strokes:
            return True
        is_of_others = saved_inputs not in ("", inputs)
        if "state" in content:
            return bool(content["state"] != content["saved_state"] or is_of_others)
        return bool(content["saved"] != content["digest"] or is_of_others)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True  # Opening the case shows the reason.


def _sparse(values: Array) -> tuple[Places, Array]:
    """Return the sorted places of the voxels that are drawn, and their values."""
    places = np.flatnonzero(values)
    return places, values[np.unravel_index(places, values.shape)]


def _digest_of_edits(edits: Sequence[Edit], grid: Sequence[int]) -> str:
    """Return the digest of edits that have no voxel in common."""
    places = np.concatenate([NOWHERE, *(edit.voxels for edit in edits)])
    values = np.concatenate([NOWHERE, *(np.full(len(voxels), value) for voxels, value in edits)])
    return _digest(places, values, grid)


def _digest(places: Places, values: Array, grid: Sequence[int]) -> str:
    """Return a text that only equal strokes have; "" if nothing is drawn."""
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
