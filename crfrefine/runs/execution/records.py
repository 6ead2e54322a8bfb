"""The record of a case, common to all commands, and observers of a run: nothing is printed below `cli/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from crfrefine.base.failures import Failure

FAILED = "failed"


def ignore(*arguments: object) -> None:
    """Do nothing."""


@dataclass
class Record:
    """The outcome of a case."""

    case_id: str
    status: str = FAILED  # "failed", or another one of the command
    times: dict[str, float] = field(default_factory=dict)  # seconds of each stage; "stage.part" is a part of a stage
    notes: list[str] = field(default_factory=list)  # assumptions about its files
    failures: list[Failure] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on the case; its stages may have overlapped with other cases."""
        return sum(seconds for stage, seconds in self.times.items() if "." not in stage) + 0.0

    def failed_by(self, kind: type[Exception]) -> bool:
        """Return whether an error of this kind failed the case."""
        return any(failure.kind == kind.__name__ for failure in self.failures)

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        self.status = FAILED
        self.failures.append(failure)


def error_fields(failure: Failure | None) -> dict[str, str | None]:
    """Return a failure for a JSON file."""
    if failure is None:
        return dict.fromkeys(("error", "error_kind", "error_traceback"))
    return {"error": failure.message, "error_kind": failure.kind, "error_traceback": failure.traceback}


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

    def case_ended(self, record: RecordT) -> None:
        """A case is done, was done earlier, or failed."""

    def run_ended(self, run: RunT) -> None:
        """The run has ended."""
