"""Who is told what happens in a run; nothing is printed below `cli/`."""

from __future__ import annotations

from typing import Generic, TypeVar

from crfrefine.execution.records import Record

RunT = TypeVar("RunT")
RecordT = TypeVar("RecordT", bound=Record)


class Observer(Generic[RunT, RecordT]):
    """Told what happens in a run; each method may be called from any thread, one call at a time, and may be left as it is."""

    def run_started(self, run: RunT) -> None:
        """It is known what is to be done, and where."""

    def case_started(self, case_id: str, number: int) -> None:
        """The computation of a case begins; `number` counts from 1."""

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """A case, or where `case_id` is empty, the run went on to a stage, or to the next step of it."""

    def note(self, text: str, *, case_id: str = "") -> None:
        """Something was assumed or left aside, about a case, or where `case_id` is empty, about all of them."""

    def case_ended(self, record: RecordT) -> None:
        """A case is done, was done before, or failed."""

    def run_ended(self, run: RunT) -> None:
        """Nothing more will happen."""
