"""Observers receive the events of a run; nothing is printed below `cli/`."""

from __future__ import annotations

from typing import Generic, TypeVar

from crfrefine.runs.execution.records import Record

RunT = TypeVar("RunT")
RecordT = TypeVar("RecordT", bound=Record)


class Observer(Generic[RunT, RecordT]):
    """Receives the events of a run. Methods may be called from any thread, one call at a time; overriding them is optional."""

    def run_started(self, run: RunT) -> None:
        """The cases and the device are known."""

    def case_started(self, case_id: str, number: int) -> None:
        """The computation of a case begins; `number` counts from 1."""

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """A case, or with an empty `case_id` the run, entered a stage, or the next step of it."""

    def note(self, text: str, *, case_id: str = "") -> None:
        """Something was assumed or ignored for a case, or with an empty `case_id`, for all cases."""

    def warning(self, text: str) -> None:
        """Something concerns the security of the user's account; shown even where nothing but errors is."""

    def case_ended(self, record: RecordT) -> None:
        """A case is done, was done earlier, or failed."""

    def run_ended(self, run: RunT) -> None:
        """The run has ended."""
