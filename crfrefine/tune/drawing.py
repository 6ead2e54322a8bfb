"""The strokes of a case, from the first one on: drawn, taken back, drawn again, and kept in a file.

The file is written whole at the end of each stroke. It has those that were taken back, too. What
another program writes in it meanwhile is taken as further strokes, and never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.strokes import BACKGROUND, Strokes
from crfrefine.base.array_types import Array, Integers
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.writing import write_small_file
from crfrefine.tune.edits import Edit, digest, edits_of, sparse, sparse_strokes
from crfrefine.tune.values import Json

_MAX_MARKS = 200  # edits that are known again if they are sent twice, also after a restart
NOWHERE: Integers = np.empty(0, np.int64)


class UnreadableDrawingError(InputError):
    """A file of strokes that cannot be read, or is of another grid."""


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
        # The array of the present strokes, and what the voxels of each edit had before; None means
        # that it is made again when it is needed.
        self._values: Array | None = None
        self._before: list[Array] = []
        self._given = ""  # digest of the strokes from elsewhere
        self._marks: dict[str, None] = {}
        self._lock = threading.RLock()
        # of the files of strokes and result, which belong together
        self.saving_lock = threading.Lock()
        # The places and values of the strokes that both this page and their file have had; None
        # means that these are not known.
        self._shared: tuple[Integers, Array] | None = None
        self._inputs = ""  # those of the saved result, as of `stamp_of_inputs`
        self.result = ""  # digest of the file of the saved result; "" means that it is not known
        self._stamp: object = None  # of the file when it was read or written
        self.problem = ""  # why the file cannot be written
        if given is not None:
            self.take(given)
        self._num_given = self._num_done
        self._saved_state = self._state
        self._saved = self._given  # digest of the values that are saved with their result
        self._saving = self._saved  # of those in the file of strokes, whose result may follow
        self._saving_state = self._state

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
        drawing._add(edits)
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
                self._before = []
                nothing = np.zeros(self._grid, np.uint8, order="F")
                self._values = self._drawn(nothing, map(self._edit, range(self._num_done)))
            return self._values

    def _drawn(self, values: Array, edits: Iterable[Edit]) -> Array:
        """Draw edits in an array, which may be changed; return it, or a wider one."""
        for edit in edits:
            if edit.value > np.iinfo(values.dtype).max:
                values = values.astype(np.uint16)
            places = np.unravel_index(edit.voxels, self._grid)
            self._before.append(values[places])
            values[places] = edit.value
        return values

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

    def draw(self, edit: Edit, mark: str = "") -> None:
        """Draw a stroke. One with the mark of an earlier call is the same one, sent again."""
        with self._lock:
            if self._begin(mark):
                self._add([edit])

    def undo(self, mark: str = "") -> Integers:
        """Take the last stroke back, if any; return the voxels that may have changed."""
        with self._lock:
            if not self._begin(mark) or self._num_done == self._num_given:
                return NOWHERE
            values = self.values.copy(order="K")
            self._num_done -= 1
            edit = self._edit(self._num_done)
            values[np.unravel_index(edit.voxels, self._grid)] = self._before.pop()
            self._values = values
            self._write()
        return edit.voxels

    def redo(self, mark: str = "") -> Integers:
        """Draw the stroke again that was taken back last, if any; return its voxels."""
        with self._lock:
            if not self._begin(mark) or self._num_done == len(self._edits):
                return NOWHERE
            edit = self._edit(self._num_done)
            self._num_done += 1
            self._step([edit])
        return edit.voxels

    def take_outside(self, values: Array) -> bool:
        """Take what another program has written to the file of strokes, as one would draw it.

        What was drawn here since both had the same strokes stays, if these are known. Return
        whether there was anything to take.
        """
        shared = sparse(values)
        present = digest(*shared, self._grid)
        with self._lock:
            is_known = present in (self._saved, self._saving) or np.array_equal(values, self.values)
            if not is_known:
                base = self.values
                if self._shared is not None:
                    base = np.zeros_like(values)
                    base[np.unravel_index(self._shared[0], self._grid)] = self._shared[1]
                self._follow(values, base)
                self._saving = present
                self._write()
            self._shared = shared
        return not is_known

    def _follow(self, values: Array, base: Array) -> None:
        """Draw the voxels in which values differ from others."""
        changed = np.flatnonzero(values != base)
        self._add(edits_of(changed, values.ravel()[changed]))

    def take(self, given: Strokes) -> bool:
        """Draw strokes from elsewhere unless they are those given before; return whether it did."""
        voxels, values = sparse_strokes(given, self._grid)
        present = digest(voxels, values, self._grid)
        with self._lock:
            if present == self._given:
                return False
            self._given = present
            self._add(edits_of(voxels, values))
        return True

    def has_done(self, mark: str) -> bool:
        """Return whether an edit with this mark is done already."""
        return mark in self._marks

    def _begin(self, mark: str) -> bool:
        """Return whether an edit is a new one; then what others have drawn comes before it."""
        if self.has_done(mark):
            return False
        if mark:
            self._marks[mark] = None
        if len(self._marks) > _MAX_MARKS:
            del self._marks[next(iter(self._marks))]
        self.take_file()
        return True

    def _add(self, edits: Sequence[Edit]) -> None:
        """Draw further edits, instead of those taken back."""
        if edits:
            del self._edits[self._num_done :]
        for edit in edits:
            text = edit.to_text()
            state = hashlib.sha256((self._state + text).encode()).hexdigest()
            self._edits.append(_KeptEdit(text, edit.value, state))
            self._num_done += 1
        self._step(edits)

    def _step(self, edits: Sequence[Edit]) -> None:
        """Draw edits that are done now in the array, if there is one, and write the file."""
        if edits and self._values is not None:
            self._values = self._drawn(self._values.copy(order="K"), edits)
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
            self._shared = sparse(values)
            self._saving = digest(*self._shared, self._grid)
            self._saving_state = self._state if values is self._values else "?"
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

    def describe(self) -> Json:
        """Return the page's view of the strokes."""
        with self._lock:
            return {
                "drawn": int(np.count_nonzero(self.values)),
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
