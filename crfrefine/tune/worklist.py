"""The requests of the page about its cases: those kept, the open one, and all at once.

Locks are taken in this order: the one of reading a case, which is held while it is read; that of
`OpenCase`; that of `KeptCases`; that of a `Drawing`. While one of the last three is held, nothing
is read or computed, and no earlier one is asked for. A session's own locks are held while it
computes, the lock of saving a case before the one of its whole result; a drawing's may follow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from crfrefine.base.limits import memory_left
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.memory import bytes_of_case
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.infer.inputs import RunInputs
from crfrefine.tune.batch import Batch
from crfrefine.tune.chosen import OF_CASE, OF_PAGE, to_text
from crfrefine.tune.corrections import CORRECTED, OUTDATED, SAVED
from crfrefine.tune.drawing import UnreadableDrawingError
from crfrefine.tune.finding import number_of_first
from crfrefine.tune.kept import KeptCases
from crfrefine.tune.opened import OpenCase
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.session import Session
from crfrefine.tune.values import Json


class NoSuchCaseError(InputError):
    """The page names a case that this program does not have; an earlier one may have had it."""


class Worklist:
    """The cases that the page goes through. Its methods may be called from any thread."""

    def __init__(self, options: TuneOptions, inputs: RunInputs) -> None:
        self._inputs = inputs
        self.kept = KeptCases(options, inputs)
        self._refused: dict[int, str] = {}  # why cases could not be opened or saved
        self.opened = OpenCase(self._read_first(), self.kept.read, self._read_next)
        self.batch = Batch(inputs, options.inputs, self.opened.give_way)
        self._beginning = threading.Lock()  # Only one begins work on all cases.

    def _read_first(self) -> Session | None:
        """Read the case that the options name, else the first case to be done.

        If that cannot be read, it is the first case of all; of cases whose strokes are damaged, the
        next one. None means that all are damaged.
        """
        options = self.kept.options
        first = number_of_first(self._inputs, options)
        number = first
        if options.first is None:
            number = self.kept.first_to_do()
        for candidate in (number, first, *range(len(self._inputs.cases))):
            try:
                return self.kept.read(candidate)
            except UnreadableDrawingError as error:
                self._refuse(candidate, error)
            except CrfRefineError:
                if candidate == first:
                    raise
        return None

    def _refuse(self, number: int, error: CrfRefineError) -> None:
        """Keep the reason why a case could not be opened or saved."""
        self._refused[number] = f"{self._inputs.cases[number].case_id}: {error}\n"

    def number_of(self, name: object) -> int:
        """Return the number of a case by its name."""
        for number, files in enumerate(self._inputs.cases):
            if files.case_id == name:
                return number
        raise NoSuchCaseError(f"no case {name!r} in this run; what was drawn in it is kept")

    def session(self, number: int) -> Session:
        """Return the open case; raise InputError if another one is open."""
        return self.opened.session(number)

    def ask(self, number: int, act: Callable[..., Json], **sent: Any) -> Json:
        """Return what an action of the open case gives; raise InputError if another one is open."""
        return act(self.session(number), **sent)

    def in_case(self, number: int, act: Callable[..., Json], **sent: Any) -> Json:
        """Return what an action of a case gives, as of `OpenCase.in_case`."""
        self._require_case(number)
        return self.opened.in_case(number, partial(act, **sent))

    def edit(self, number: int, act: Callable[..., Json], **sent: Any) -> Json:
        """Return what an action gives that edits the strokes of a case, and the state of that."""
        return {**self.in_case(number, act, **sent), "state": self.kept.state(number)}

    def look(self, number: int, mark: str) -> Json:
        """Return strokes and parameters of the open case, which others may have changed."""
        session = self.session(number)
        session.take_outside()
        case_id = session.case.case_id
        toml = to_text(self.kept.chosen.of_case(case_id), case_id)
        return {**session.drawing.describe(), "state": self.kept.state(number), "toml": toml}

    def choose(self, number: int, preset: str, changes: Json) -> Json:
        """Take parameters for a case, as of `ChosenParameters.resolve`."""
        self._require_case(number)
        self.kept.chosen.choose(self._inputs.cases[number].case_id, preset, changes)
        return {}

    def describe(self) -> Json:
        """Return the cases with their states, the open one, and the work on all.

        A case is saved if its result is that with the parameters of the page.
        """
        is_counting = self.batch.is_counting  # before the counts are looked at
        is_saving = self.batch.is_saving
        cases = []
        for number in range(len(self._inputs.cases)):
            counted = self.batch.describe(number, self.kept.chosen.of_page)
            cases.append({**self.kept.describe(number), **counted})
        refused = []
        for number, why in dict(self._refused).items():
            if cases[number]["state"] != SAVED:  # It may have been saved by itself.
                refused.append(why)
        return {
            "open": self.opened.number,
            "is_counting": is_counting,
            "cases": cases,
            "is_saving": is_saving,
            "refused": "".join(refused),
            "folder": self.kept.describe_folder(),
        }

    def keep(self) -> Json:
        """Keep all strokes in files from now on, as of `KeptCases.keep`; return the cases."""
        self.kept.keep()
        return self.describe()

    def review(self, number: int, review: str | None, note: str | None) -> Json:
        """Note a state and a text of a case; None leaves the present one. Return the cases."""
        self._require_case(number)
        self.kept.review(number, review, note)
        return self.describe()

    def keep_lost(self) -> str:
        """Keep strokes and notes that would be gone; return the folder, "" if none would be."""
        if not self.kept.describe_folder()["num_lost"]:
            return ""
        return str(self.keep()["folder"]["path"])

    def save_all(self, preset: str, changes: Json) -> Json:
        """Begin to save each case whose strokes are not those of its result; return the cases.

        A case that was saved before keeps its parameters; the others get those of the page. These
        are chosen for the open case, as of `choose`.
        """
        self.choose(self.opened.number, preset, changes)
        return self._save_each((CORRECTED,), OF_CASE)

    def save_anew(self, preset: str, changes: Json) -> Json:
        """Begin to save all cases with strokes with the same parameters; return the cases."""
        self.choose(self.opened.number, preset, changes)
        return self._save_each((CORRECTED, OUTDATED), OF_PAGE)

    def _save_each(self, states: Sequence[str], preset: str) -> Json:
        """Begin to save each case that is in these states when its turn comes; return the cases."""

        def save(number: int) -> None:
            if self.kept.state(number) in states:
                try:
                    self.in_case(number, Session.save_case, preset=preset, changes={})
                except CrfRefineError as error:
                    self._refuse(number, error)

        with self._beginning:
            if not self.batch.is_saving:
                self._refused = {}
                self.batch.save_all(save)
        return self.describe()

    def count_changes(self, preset: str, changes: Json) -> Json:
        """Begin to count the voxels that the CRF changes in each case with these parameters."""
        case_id = self._inputs.cases[self.opened.number].case_id
        parameters = self.kept.chosen.resolve(case_id, preset, changes)
        with self._beginning:
            self.batch.count_changes(parameters)
        return {}

    def open(self, number: int) -> Json:
        """Open a case, as of `OpenCase.open`; return the cases."""
        self._require_case(number)
        self.opened.open(number)
        return self.describe()

    def read_ahead(self, number: int) -> Json:
        """Begin to read the case that is probably opened next, if there is memory for two."""
        self._require_case(number)
        self.opened.read_ahead(number)
        return {}

    def _require_case(self, number: int) -> None:
        if not 0 <= number < len(self._inputs.cases):
            raise InputError(f"{number}: no such case")

    def _read_next(self, number: int) -> Session | None:
        """Read a case; None if there is no memory for it beside the open one."""
        files = self._inputs.cases[number]
        headers = read_case_headers(files, replace(self._inputs.reading, mask_mode="none"))
        _, needed, _ = bytes_of_case(headers)
        if needed > memory_left(self.kept.options.inputs.max_memory):
            return None
        return self.kept.read(number)

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        return self.opened.is_busy or self.batch.is_busy

    def end(self) -> None:
        """Stop all work at its next step."""
        self.opened.end()
        self.batch.end()
        self.kept.chosen.write_again()
        self.kept.release()
