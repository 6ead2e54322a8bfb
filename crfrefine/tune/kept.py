"""The data kept of each case, with its state: strokes, notes, and saved files."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path

from crfrefine.infer.inputs import RunInputs
from crfrefine.tune.chosen import ChosenParameters
from crfrefine.tune.corrections import (
    CORRECTED,
    SAVED,
    UNTOUCHED,
    FolderLock,
    read_address,
    stamp_of_inputs,
    write_address,
)
from crfrefine.tune.drawing import Drawing
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.review import TO_DO, Review, Reviews
from crfrefine.tune.session import Session
from crfrefine.tune.values import Json


class KeptCases:
    """The cases of the page, and their kept data, in a folder or without one in memory.

    Its methods may be called from any thread.
    """

    def __init__(self, options: TuneOptions, inputs: RunInputs) -> None:
        self.options = options
        self.inputs = inputs
        self.chosen = ChosenParameters(options.inputs.parameters, options.output)
        self._lock = threading.Lock()  # While it is held, nothing is read or computed.
        # Two readers of one case would keep its strokes twice.
        self._reading_locks = [threading.Lock() for _ in inputs.cases]
        self._folder_lock: FolderLock | None = None
        if options.corrections is not None:
            self._folder_lock = FolderLock(options.corrections)
        self.address: tuple[int, str] | None = None  # port and token of the page
        self._reviews = Reviews([files.case_id for files in inputs.cases])
        if options.corrections is not None:
            self._reviews.keep_in(options.corrections)
            self.address = read_address(options.corrections)
            self.chosen.keep_in(options.corrections)
        # The strokes of each case that was open. They outlive its arrays, and are never read twice.
        self._drawings: dict[int, Drawing] = {}
        self._stamps: dict[int, str] = {}  # of the inputs of each case, when they were seen last

    def read(self, number: int) -> Session:
        """Read a case; its strokes are those of an earlier time that it was open, if any."""
        with self._reading_locks[number]:
            options = self.options
            drawing = self._drawings.get(number)
            session = Session(options, self.inputs, number, drawing, self.chosen)
            with self._lock:
                self._drawings[number] = session.drawing
                self._stamps[number] = session.stamp
                if self.options is not options:  # A folder was taken meanwhile.
                    self._keep_drawing(number)
        return session

    def _keep_drawing(self, number: int) -> None:
        """Keep the strokes of a case in the folder of corrections."""
        files = self.chosen.corrections_of(self.inputs.cases[number].case_id)
        assert files is not None
        files.check()
        self._drawings[number].keep_in(files.drawing)

    def state(self, number: int) -> str:
        """Return the state of a case, as of `Corrections.state`."""
        drawing = self._drawings.get(number)
        if drawing is not None and drawing.is_unsaved:
            return CORRECTED
        files = self.inputs.cases[number]
        corrections = self.chosen.corrections_of(files.case_id)
        if corrections is None:
            return UNTOUCHED
        if number not in self._stamps:
            self._stamps[number] = stamp_of_inputs(files)
        return corrections.state(self.chosen.last(files.case_id), self._stamps[number])

    def first_to_do(self) -> int:
        """Return the number of the first case that is neither saved nor noted as done; else 0."""
        for number, files in enumerate(self.inputs.cases):
            is_to_do = self._reviews.of_case(files.case_id).state == TO_DO
            if is_to_do and self.state(number) != SAVED:
                return number
        return 0

    def describe(self, number: int) -> Json:
        """Return name, state and notes of a case."""
        case_id = self.inputs.cases[number].case_id
        review = self._reviews.of_case(case_id)
        return {
            "name": case_id,
            "review": review.state,
            "note": review.note,
            "state": self.state(number),
        }

    def describe_folder(self) -> Json:
        """Return where strokes are kept, or where they could be."""
        folder = self.options.corrections
        with self._lock:
            self._reviews.read_again()
        drawings = dict(self._drawings)
        lost = {number for number, drawing in drawings.items() if drawing.is_lost}
        if folder is None or self._reviews.problem:
            for number, files in enumerate(self.inputs.cases):
                if self._reviews.of_case(files.case_id) != Review():
                    lost.add(number)
        problems = [self._reviews.problem, self.chosen.problem]
        problems += [drawing.problem for drawing in drawings.values()]
        return {
            "path": str(folder or _offered_folder().resolve()),
            "is_used": folder is not None,
            # cases whose strokes or notes are gone when the program ends
            "num_lost": len(lost),
            # why strokes or notes cannot be written; "" if all can
            "problem": max(problems),
        }

    def keep(self) -> Path:
        """Keep all strokes in files from now on: those of `--corrections`, or the offered folder.

        Strokes and notes that a disk did not take are written again. Return the folder.
        """
        # A case that is being read keeps its strokes from the end of that on.
        with self._lock:
            folder = self.options.corrections or _offered_folder().resolve()
            if self._folder_lock is None:
                self._folder_lock = FolderLock(folder)
                self.options = replace(self.options, corrections=folder)
            self.chosen.keep_in(folder)
            for number in self._drawings:
                self._keep_drawing(number)
            self._reviews.keep_in(folder)
            if self.address is not None:
                write_address(folder, *self.address)
        return folder

    def review(self, number: int, state: str | None, note: str | None) -> None:
        """Note a state and a text of a case; None leaves the present one."""
        case_id = self.inputs.cases[number].case_id
        with self._lock:
            self._reviews.note(case_id, state, note)

    def use_address(self, port: int, token: str) -> None:
        """Keep the address of the page, which the next start has again."""
        with self._lock:
            self.address = (port, token)
            if self.options.corrections is not None:
                write_address(self.options.corrections, port, token)

    def release(self) -> None:
        """Give the folder back."""
        if self._folder_lock is not None:
            self._folder_lock.release()


def _offered_folder() -> Path:
    """Return the first folder for corrections that does not exist yet."""
    folder = Path("corrections")
    numbers = itertools.count(2)
    while folder.exists():
        folder = Path(f"corrections-{next(numbers)}")
    return folder
