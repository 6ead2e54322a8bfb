"""What `crfrefine status` reports of runs, of their parts and cases, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.runs.execution.records import FAILED

DONE, MISSING = "done", "missing"
STATES = (DONE, FAILED, MISSING)


@dataclass(frozen=True)
class CaseStatus:
    """What is known of a case."""

    case_id: str
    part_id: int
    state: str  # one of STATES
    output: Path  # its label map
    reason: str | None = None  # the error of a failed case, or what is not there
    has_old_output: bool = False  # it is not done, and a label map of an earlier run has its name
    is_changed: bool = False  # its label map was changed after it was recorded

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        return {"case_id": self.case_id, "part_id": self.part_id, "state": self.state, "output": str(self.output), "reason": self.reason}


@dataclass(frozen=True)
class PartStatus:
    """What is left of a part."""

    part_id: int  # from 0
    counts: Mapping[str, int]  # number of its cases by state
    run: str  # "ended", "interrupted" (or still running), or "not started" where there is no record of it
    summary: Path | None  # that of its last run
    command: str | None  # does what is left

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        summary = None if self.summary is None else str(self.summary)
        counts = {f"num_{state}": self.counts[state] for state in STATES}
        return {"part_id": self.part_id, "run": self.run, **counts, "summary": summary, "command": self.command}


@dataclass(frozen=True)
class RunStatus:
    """What is left of a folder run, over all its parts and all earlier runs of the same inputs into the same folder."""

    output_folder: str
    cases: Sequence[CaseStatus]  # in the order of their names
    parts: Sequence[PartStatus]  # all that have cases, those that never started too
    notes: Sequence[str]

    @property
    def is_complete(self) -> bool:
        """Whether all cases are done."""
        return all(case.state == DONE for case in self.cases)

    @property
    def commands(self) -> list[str]:
        """The commands that do the rest, one per part with cases left."""
        return [part.command for part in self.parts if part.command is not None]

    def of_state(self, state: str) -> list[CaseStatus]:
        """Return the cases that are "done", "failed" or "missing"."""
        return [case for case in self.cases if case.state == state]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        counts = {f"num_{state}": len(self.of_state(state)) for state in STATES}
        return {
            "output_folder": self.output_folder,
            "is_complete": self.is_complete,
            "num_cases": len(self.cases),
            **counts,
            "num_parts": len(self.parts),
            "parts": [part.to_dict() for part in self.parts],
            "cases": [case.to_dict() for case in self.cases],
            "notes": list(self.notes),
            "commands": self.commands,
        }


@dataclass
class StatusReport:
    """The runs of some summaries."""

    runs: list[RunStatus] = field(default_factory=list)  # by output folder and inputs, in the order of the summaries
    notes: list[str] = field(default_factory=list)  # files that could not be used

    @property
    def is_complete(self) -> bool:
        """Whether all cases of all runs are done, and all summaries could be read."""
        return not self.notes and all(run.is_complete for run in self.runs)
