"""Whether a case of a folder run is done, failed or missing: what its record says, and which of its files are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from crfrefine.io.paths import is_there
from crfrefine.runs.infer.records import time_of_change

DONE, FAILED, MISSING = "done", "failed", "missing"

_OUTPUTS = ("output", "probabilities", "logits", "preview", "structures")


@dataclass(frozen=True)
class PlacedRecord:
    """A record of a case.

    Attributes:
        values: its fields.
        folder: where its relative paths begin.
        parameters: what the case was refined with, as text to compare.
    """

    values: Mapping[str, Any]
    folder: str
    parameters: str


@dataclass(frozen=True)
class CaseStatus:
    """What is known of a case.

    Attributes:
        case_id: its name.
        part_id: the part that has it.
        state: "done", "failed" or "missing".
        output: its label map.
        reason: the error of a failed case, or what is not there; None if done.
        has_old_output: whether it is not done, and a label map of an earlier run has its name.
        is_changed: whether the label map was changed after it was recorded.
    """

    case_id: str
    part_id: int
    state: str
    output: Path
    reason: str | None = None
    has_old_output: bool = False
    is_changed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        return {"case_id": self.case_id, "part_id": self.part_id, "state": self.state, "output": str(self.output), "reason": self.reason}


def case_status(case_id: str, part_id: int, label_map: Path, record: PlacedRecord | None, first_start: str, parameters: str) -> CaseStatus:
    """Return what is known of a case. Files are not opened: `infer --continue` reads them to their end."""
    changed = time_of_change(label_map)
    there = changed is not None
    if record is None:
        if changed is not None and (not first_start or datetime.fromisoformat(changed) >= datetime.fromisoformat(first_start)):
            return CaseStatus(case_id, part_id, DONE, label_map)
        reason = "not reached; the label map that is there is from before the run" if there else "not reached"
        return CaseStatus(case_id, part_id, MISSING, label_map, reason, has_old_output=there)
    values = record.values
    if values["status"] == FAILED:
        reason = str(values.get("error") or "no reason is recorded")
        return CaseStatus(case_id, part_id, FAILED, label_map, reason, has_old_output=there)
    named = [label_map, *(resolve(values[name], record.folder) for name in _OUTPUTS if values.get(name))]
    gone = next((path for path in named if not is_there(path)), None)
    if gone is not None:
        return CaseStatus(case_id, part_id, MISSING, label_map, f"{gone} is gone")
    if record.parameters != parameters:
        return CaseStatus(case_id, part_id, MISSING, label_map, "refined with other parameters than those of the last run")
    is_changed = values.get("written") is not None and values["written"] != changed
    return CaseStatus(case_id, part_id, DONE, label_map, is_changed=is_changed)


def resolve(path: object, folder: str) -> Path:
    """Return a path of a summary as an absolute one."""
    return Path(folder) / str(path)
