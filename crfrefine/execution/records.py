"""What every command keeps on record of a case, and which cases need not be done again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from crfrefine.failures import Failure

FAILED = "failed"


@dataclass
class Record:
    """What became of a case.

    Attributes:
        case_id: its name.
        status: "failed", or what the command calls it else.
        times: seconds of each stage; "stage.part" is a part of a stage.
        notes: what was assumed about its files.
        failures: what went wrong.
    """

    case_id: str
    status: str = FAILED
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Spent on the case; its stages may have overlapped those of others."""
        return sum(seconds for stage, seconds in self.times.items() if "." not in stage) + 0.0

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        self.status = FAILED
        self.failures.append(failure)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they stand in a JSON file, the command's own ones after name and status."""
        fields = dataclasses.asdict(self)
        shared = {name: fields.pop(name) for name in ("times", "notes")}
        del fields["failures"]
        return {**fields, **shared, **error_fields(self.failures[0] if self.failures else None)}


def error_fields(failure: Failure | None) -> dict[str, str | None]:
    """Return a failure as it stands in a JSON file."""
    if failure is None:
        return dict.fromkeys(("error", "error_kind", "error_traceback"))
    return {"error": failure.message, "error_kind": failure.kind, "error_traceback": failure.traceback}


RecordT_co = TypeVar("RecordT_co", bound=Record, covariant=True)


class Task(Protocol[RecordT_co]):
    """A case that is to be done."""

    @property
    def case_id(self) -> str:
        """Its name."""

    def earlier(self) -> RecordT_co | None:
        """Return the record of an earlier run, if its output is there, whole, and of these inputs."""


def reusable(task: Task[RecordT_co], resume: bool) -> RecordT_co | None:
    """Return the record that makes it needless to do a case again, with `--continue`; None: it is to be done."""
    return task.earlier() if resume else None
