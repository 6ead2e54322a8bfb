"""The record of a case, common to all commands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from crfrefine.base.failures import Failure
from crfrefine.errors import CapacityError

FAILED = "failed"


@dataclass
class Record:
    """The outcome of a case.

    Attributes:
        case_id: its name.
        status: "failed", or another status of the command.
        times: seconds of each stage; "stage.part" is a part of a stage.
        notes: assumptions about its files.
        failures: the errors.
    """

    case_id: str
    status: str = FAILED
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on the case; its stages may have overlapped with other cases."""
        return sum(seconds for stage, seconds in self.times.items() if "." not in stage) + 0.0

    @property
    def lacks_memory(self) -> bool:
        """Whether the case failed because it needs more memory than there was."""
        return any(failure.kind == CapacityError.__name__ for failure in self.failures)

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        self.status = FAILED
        self.failures.append(failure)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON file, with the command's own fields after name and status."""
        fields = dataclasses.asdict(self)
        shared = {name: fields.pop(name) for name in ("times", "notes")}
        del fields["failures"]
        return {**fields, **shared, **error_fields(self.failures[0] if self.failures else None)}


def error_fields(failure: Failure | None) -> dict[str, str | None]:
    """Return a failure for a JSON file."""
    if failure is None:
        return dict.fromkeys(("error", "error_kind", "error_traceback"))
    return {"error": failure.message, "error_kind": failure.kind, "error_traceback": failure.traceback}
