"""The events of a run, the same for every command: nothing is printed below `cli/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from crfrefine.base.notes import Note

RunT = TypeVar("RunT")  # the description of a run
CaseT = TypeVar("CaseT")  # that of a case that has ended


class Observer(Generic[RunT, CaseT]):
    """Receives the events of a run.

    Each command has its own description of a run, and of a case that has ended. Methods may be
    called from any thread, one call at a time; overriding them is optional.
    """

    def run_started(self, run: RunT) -> None:
        """The cases and the device are known."""

    def cases_found(self, text: str) -> None:
        """The cases of a pattern are known, before the run starts: how many, with an example.

        The text is empty for the cases of a folder.
        """

    def roles_found(self, summary: str, reasons: Sequence[tuple[str, str]]) -> None:
        """The role of each input is known, from the headers of the first case.

        The summary is a line; the reasons are role and evidence of each file.
        """

    def stage_changed(self, name: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """A case or a training, or with an empty `name` the run, entered a stage or its next step.

        The steps have numbers where they are parts of a case.
        """

    def progressed(self, fraction: float, done: str = "") -> None:
        """About so much of the whole run is done, where it is not counted in cases.

        `done` says it in words, where stages do not.
        """

    def note(self, note: Note, *, case_id: str = "") -> None:
        """Something was assumed or ignored for a case, or without `case_id` for all cases."""

    def case_ended(self, record: CaseT) -> None:
        """A case is done, was done earlier, or failed."""

    def stage_ended(self, text: str) -> None:
        """A part of the run that is no case is over; `text` is its outcome in a line."""

    def run_ended(self, run: RunT) -> None:
        """The run has ended."""


AnyObserver = Observer[Any, Any]  # where no event has a description of the run
