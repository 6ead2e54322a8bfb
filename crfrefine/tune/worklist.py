"""The cases of the page: one is open, the next one is read ahead, and each has a state."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.base.limits import memory_limit, thread_pool
from crfrefine.cases.case_headers import bytes_of_case, read_case_headers
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.infer.inputs import RunInputs
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.ahead import ReadAhead
from crfrefine.tune.case import CaseRefiner, open_case
from crfrefine.tune.corrections import (
    CORRECTED,
    OUTDATED,
    SAVED,
    UNTOUCHED,
    Corrections,
    FolderLock,
    stamp_of_inputs,
)
from crfrefine.tune.drawing import Drawing
from crfrefine.tune.finding import number_of_first
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.review import Review, Reviews
from crfrefine.tune.session import Session

_PAUSE = 0.02  # seconds after which a count that gives way to the page looks again


class _EndedError(Exception):
    """The page has ended, and so does the count of changes."""


class Worklist:
    """The cases that the page goes through. Its methods may be called from any thread."""

    def __init__(self, options: TuneOptions, inputs: RunInputs) -> None:
        self._options = options
        self._inputs = inputs
        self._folder_lock: FolderLock | None = None
        if options.corrections is not None:
            self._folder_lock = FolderLock(options.corrections)
        self._reviews = Reviews([files.case_id for files in inputs.cases])
        if options.corrections is not None:
            self._reviews.keep_in(options.corrections)
        # The strokes of each case that was open. They outlive its arrays, and are never read twice.
        self._drawings: dict[int, Drawing] = {}
        self._drawings_lock = threading.Lock()
        # Two readers of one case would keep its strokes twice.
        self._reading_locks = [threading.Lock() for _ in inputs.cases]
        self._stamps: dict[int, str] = {}  # of the inputs of each case, when they were seen last
        self._session = self._read(number_of_first(inputs, options))
        # Of what is open and read ahead; nothing is read or computed while it is held.
        self._lock = threading.Lock()
        self._opening = self._session.number  # the case that was asked for last
        self._ahead = ReadAhead(self._read_next, self._give_way)
        self._counter = thread_pool(1, "count changes", gives_way=True)
        self._counting: Future[None] | None = None
        self._saver = thread_pool(1, "save all", gives_way=True)
        self._saving: Future[None] | None = None
        self._refused: dict[int, str] = {}  # why cases could not be saved
        self._parameters = options.inputs.parameters  # those that the page has
        # The voxels that the CRF changes, by the number of the case; None: it cannot be refined.
        self._num_changed: dict[int, int | None] = {}
        self._has_ended = False

    def session(self, number: int) -> Session:
        """Return the open case; raise InputError if another one is open."""
        with self._lock:
            session = self._session
        if session.number == number:
            return session
        name = session.case.case_id
        raise InputError(f"another case is open now, {name}: reload the page to see it")

    def _read(self, number: int) -> Session:
        """Read a case; its strokes are those of an earlier time that it was open, if any."""
        with self._reading_locks[number]:
            options = self._options
            known = self._drawings.get(number)
            session = Session(options, self._inputs, number, known)
            with self._drawings_lock:
                self._drawings[number] = session.drawing
                self._stamps[number] = session.stamp
                if self._options is not options:  # `keep` was called meanwhile.
                    self._keep_drawing(number, session.drawing)
                    session.keep_in(self._corrections_of(number))
        return session

    def _corrections_of(self, number: int) -> Corrections:
        """Return the files of a case in the folder of corrections."""
        assert self._options.corrections is not None
        return Corrections.of_case(self._inputs.cases[number].case_id, self._options.corrections)

    def _keep_drawing(self, number: int, drawing: Drawing) -> None:
        """Keep the strokes of a case in the folder of corrections."""
        files = self._corrections_of(number)
        files.check()
        drawing.keep_in(files.drawing)

    def refine(self, number: int, **state: Any) -> dict[str, Any]:
        """Refine the open case, as of `Session.refine`."""
        return self.session(number).refine(**state)

    def save(self, number: int, **parameters: Any) -> dict[str, Any]:
        """Write parameters, as of `Session.save`."""
        return self.session(number).save(**parameters)

    def draw(self, number: int, **stroke: Any) -> dict[str, Any]:
        """Draw a stroke in a case, as of `Session.draw`."""
        return self._edit(number, lambda session: session.draw(**stroke))

    def undo(self, number: int, mark: str) -> dict[str, Any]:
        """Take the last stroke of a case back, if any."""
        return self._edit(number, lambda session: session.undo(mark))

    def redo(self, number: int, mark: str) -> dict[str, Any]:
        """Draw the stroke of a case again that was taken back last, if any."""
        return self._edit(number, lambda session: session.redo(mark))

    def look(self, number: int, mark: str) -> dict[str, Any]:
        """Return the strokes of the open case, which another tab may have edited."""
        return {**self.session(number).drawing.describe(), "state": self._state_of(number)}

    def _edit(self, number: int, edit: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        """Edit the strokes of a case."""
        return {**self._in_case(number, edit), "state": self._state_of(number)}

    def _in_case(self, number: int, act: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        """Do something with a case.

        It need not be the open one: a tab may show a case while another tab has opened one.
        """
        self._require_case(number)
        session = self._session
        if session.number != number:
            session = self._read(number)
        try:
            return act(session)
        finally:
            if session is not self._session:
                session.drawing.forget()

    def save_case(self, number: int, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the strokes and the result of a case, as of `Session.save_case`."""
        return self._in_case(number, lambda session: session.save_case(preset, changes))

    def describe(
        self, preset: str | None = None, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the cases with their states, the open one, and what is being done.

        A case is saved if its result is that with these parameters; None means the last ones.
        """
        if preset is not None:
            self._parameters = self._session.parameters(preset, changes or {})
        with self._lock:
            is_counting = self._counting is not None and not self._counting.done()
            cases = []
            for number, files in enumerate(self._inputs.cases):
                review = self._reviews.of_case(files.case_id)
                entry = {
                    "name": files.case_id,
                    "review": review.state,
                    "note": review.note,
                    "state": self._state_of(number),
                    "is_counted": number in self._num_changed,
                    "changed": self._num_changed.get(number),
                }
                cases.append(entry)
            refused = []
            for number, why in dict(self._refused).items():
                if cases[number]["state"] != SAVED:  # It may have been saved by itself.
                    refused.append(why)
            return {
                "open": self._session.number,
                "is_counting": is_counting,
                "cases": cases,
                "is_saving": self._saving is not None and not self._saving.done(),
                "refused": "".join(refused),
                "folder": self._describe_folder(),
            }

    def _describe_folder(self) -> dict[str, Any]:
        """Return where strokes are kept, or where they could be."""
        folder = self._options.corrections
        drawings = dict(self._drawings)
        lost = {number for number, drawing in drawings.items() if drawing.is_lost}
        if folder is None or self._reviews.problem:
            for number, files in enumerate(self._inputs.cases):
                if self._reviews.of_case(files.case_id) != Review():
                    lost.add(number)
        return {
            "path": str(folder or _offered_folder().resolve()),
            "is_used": folder is not None,
            # cases whose strokes or notes are gone when the program ends
            "num_lost": len(lost),
            # why strokes or notes cannot be written; "" if all can
            "problem": max([self._reviews.problem, *(one.problem for one in drawings.values())]),
        }

    def _state_of(self, number: int) -> str:
        drawing = self._drawings.get(number)
        if drawing is not None and drawing.is_unsaved:
            return CORRECTED
        if self._options.corrections is None:
            return UNTOUCHED
        files = self._inputs.cases[number]
        if number not in self._stamps:
            self._stamps[number] = stamp_of_inputs(files)
        corrections = Corrections.of_case(files.case_id, self._options.corrections)
        return corrections.state(self._parameters, self._stamps[number])

    def keep(self) -> dict[str, Any]:
        """Keep all strokes in files from now on: those of `--corrections`, or the offered folder.

        Strokes and notes that a disk did not take are written again. Return the cases.
        """
        # A case that is being read keeps its strokes from the end of that on.
        with self._lock, self._drawings_lock:
            folder = self._options.corrections or _offered_folder().resolve()
            if self._folder_lock is None:
                self._folder_lock = FolderLock(folder)
                self._options = replace(self._options, corrections=folder)
                self._ahead.drop()  # It could not be saved.
            for number, drawing in self._drawings.items():
                self._keep_drawing(number, drawing)
            self._session.keep_in(self._corrections_of(self._session.number))
            self._reviews.keep_in(folder)
        return self.describe()

    def review(self, number: int, review: str, note: str) -> dict[str, Any]:
        """Note a state and a text of a case; return the cases."""
        self._require_case(number)
        with self._lock:
            self._reviews.note(self._inputs.cases[number].case_id, review, note)
        return self.describe()

    def keep_lost(self) -> str:
        """Keep strokes and notes that would be gone; return the folder, "" if none would be."""
        if not self._describe_folder()["num_lost"]:
            return ""
        return str(self.keep()["folder"]["path"])

    def save_all(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to save each case whose strokes, or whose parameters, are not those of its result.

        Return the cases.
        """
        parameters = self._session.parameters(preset, changes)

        def save() -> None:
            for number in range(len(self._inputs.cases)):
                if self._has_ended:
                    return
                if self._state_of(number) not in (CORRECTED, OUTDATED):
                    continue
                try:
                    self.save_case(number, preset, changes)
                except CrfRefineError as error:
                    self._refused[number] = f"{self._inputs.cases[number].case_id}: {error}\n"

        with self._lock:
            self._parameters = parameters
            if self._saving is None or self._saving.done():
                self._refused = {}
                self._saving = self._saver.submit(save)
        return self.describe(preset, changes)

    def open(self, number: int) -> dict[str, Any]:
        """Open a case in place of the one that is open, whose strokes are kept.

        It stops computing at once. Return the cases. If the other one cannot be read, the case that
        is open stays open. Where several are opened at a time, the last one that was asked for is.
        """
        self._require_case(number)
        with self._lock:
            self._opening = number
            is_open = number == self._session.number
            if is_open:
                self._stay_open()
            else:
                self._session.end()
                reading = self._ahead.take(number)
        if not is_open:
            self._open(number, reading)
        return self.describe()

    def _open(self, number: int, reading: Future[Session | None] | None) -> None:
        """Read a case, unless it is read ahead, and open it, unless another one was asked for."""
        try:
            session = None if reading is None else reading.result()
            if session is None:
                session = self._read(number)
        except BaseException:
            with self._lock:
                if number == self._opening:
                    self._stay_open()
            raise
        with self._lock:
            left = session
            if number == self._opening:
                left = self._session
                self._session = session
            left.end()
            left.drawing.forget()

    def _stay_open(self) -> None:
        """Let the open case compute again, after another one was not opened."""
        if not self._has_ended:
            self._session.resume()

    def _require_case(self, number: int) -> None:
        if not 0 <= number < len(self._inputs.cases):
            raise InputError(f"{number}: no such case")

    def read_ahead(self, number: int) -> dict[str, Any]:
        """Begin to read the case that is probably opened next, if there is memory for two."""
        self._require_case(number)
        with self._lock:
            if number != self._session.number and not self._has_ended:
                self._ahead.begin(number)
        return {}

    def _read_next(self, number: int) -> Session | None:
        """Read a case; None if there is no memory for it beside the open one."""
        files = self._inputs.cases[number]
        inputs = self._options.inputs
        headers = read_case_headers(files, replace(self._inputs.reading, mask_mode="none"))
        _, needed, _ = bytes_of_case(headers)
        if needed > memory_limit(inputs.max_memory).left:
            return None
        return self._read(number)

    def count_changes(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to count the voxels that the CRF changes in each case with these parameters."""
        parameters = self._session.parameters(preset, changes)

        def count() -> None:
            try:
                for number in range(len(self._inputs.cases)):
                    self._num_changed[number] = self._count_changed(number, parameters)
            except _EndedError:
                return

        with self._lock:
            if self._counting is None or self._counting.done():
                self._num_changed = {}
                self._counting = self._counter.submit(count)
        return {}

    def _count_changed(self, number: int, parameters: CrfParameters) -> int | None:
        inputs = self._options.inputs
        self._give_way()
        try:
            reading = self._inputs.reading
            case = open_case(self._inputs.cases[number], reading, inputs.threads)
            refiner = CaseRefiner(case, inputs, keeps_kernels=False)
            result = refiner.refine(parameters, self._give_way)
        except CrfRefineError:  # Whoever opens the case is told why.
            return None
        return int(np.count_nonzero(result.label_map != case.network_labels))

    def _give_way(self, *progress: object, ahead: Session | None = None) -> None:
        """Wait while the page waits for a result; raise _EndedError once the page has ended.

        The result of `ahead` does not wait once it is the open case.
        """
        while not self._has_ended:
            shown = self._session
            if shown is ahead or not shown.is_computing:
                return
            time.sleep(_PAUSE)
        raise _EndedError

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        is_working = any(task and not task.done() for task in (self._counting, self._saving))
        return is_working or self._ahead.is_busy or self._session.is_computing

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        self._session.end()
        self._ahead.end()
        for pool in (self._counter, self._saver):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._folder_lock is not None:
            self._folder_lock.release()


def _offered_folder() -> Path:
    """Return the first folder for corrections that does not exist yet."""
    for number in itertools.count(1):
        folder = Path("corrections" if number == 1 else f"corrections-{number}")
        if not folder.exists():
            return folder
    raise AssertionError
