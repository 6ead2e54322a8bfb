"""Records of a folder run, case by case, and their JSON file. `docs/reference/summary.md` lists the fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.base.text import listed
from crfrefine.io.json import without_nonfinite
from crfrefine.runs.execution.records import Record, error_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crfrefine.arrays.label_maps import LabelChanges
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.failures import Failure
    from crfrefine.engines.base import MeanFieldReport

SCHEMA = 1

LINES_SUFFIX = ".jsonl"

RECORD_FOLDER = ".crfrefine"
"""In the output folder: the records of runs, a file for each part, since several processes on several machines may write at a time."""

VANISHED = "labels that vanished"
"""The note on labels that a case has lost begins with it; what to do about it follows a semicolon."""


@dataclass
class CaseRecord(Record):
    """The outcome of one case: `status` is "done", "skipped" (its output existed) or "failed".

    Fields that the case did not reach keep their defaults. A skipped case has those of the run that refined it, where its summary is known.
    """

    output: Path | None = None  # the label map
    written: str | None = None  # time of its last change, UTC: a later change shows that the record is of another one
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: Path | None = None
    grid_shape: tuple[int, ...] | None = None  # voxels along each axis
    spacing: tuple[float, ...] | None = None  # mm, one per grid axis
    num_labels: int | None = None  # L, background included
    num_modalities: int | None = None  # channels of the image
    num_voxels_in_mask: int | None = None
    num_padding_voxels: int | None = None  # in the mask, but left out, as all labels had the same logit
    voxels_removed: int | None = None  # of components that the small-object rules removed
    voxels_filled: int | None = None  # of holes that they filled
    input_type: str | None = None  # "logits", "probabilities" or "labels"
    regions: RegionScheme | None = None  # of the network's sigmoid channels; None: they are labels
    device: str | None = None
    report: MeanFieldReport | None = None  # of the mean field
    changes: LabelChanges | None = None  # voxels of each label before and after
    vanished_labels: tuple[int, ...] = ()  # in the network's result, its own files too, and not in the refined label map
    other_parameters: dict[str, Any] | None = None  # tables that a skipped case was refined with, where they are not as in this run
    kept: dict[str, Any] | None = None  # the record of an earlier run; its fields are in the file, except those of this run

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        super().fail(failure)
        self.output = self.written = self.probabilities = self.logits = self.preview = self.structures = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are in a JSON file, those of the mean field and of the labels beside the others."""
        fields = dataclasses.asdict(self)
        kept, times, notes, _ = (fields.pop(name) for name in ("kept", "times", "notes", "failures"))
        values: dict[str, Any] = {}
        for name, value in fields.items():
            values |= (value or _NOT_REACHED[name]) if name in _NOT_REACHED else {name: value}
        values |= {"times": times, "notes": notes, **error_fields(self.failures[0] if self.failures else None)}
        if self.regions is not None:
            values["regions"] = self.regions.to_dict()
        own = {"status": self.status, "other_parameters": self.other_parameters} | ({"output": self.output} if self.output else {})
        return values | (kept or {}) | own


_NOT_REACHED: dict[str, dict[str, Any]] = {
    "report": {"num_iterations": None, "converged": None, "energy": (), "filters": ()},
    "changes": {"voxels_changed": None, "voxels_before": (), "voxels_after": ()},
}


@dataclass
class RunSummary:
    """The outcome of a run."""

    device: str
    threads: int
    parameters: dict[str, Any]  # as `CrfParameters.to_dict` returns them
    choice: Mapping[str, Any] | None = None  # how they were chosen for these cases (`-c auto`); None: they were given
    requested_device: str = "auto"
    max_memory: int | None = None  # bytes that the run could take at its start, if a limit is known
    max_memory_source: str = ""  # what sets this limit, a phrase
    num_parts: int = 1
    part_id: int = 0  # from 0
    label_names: dict[int, str] = field(default_factory=dict)  # by number, where each structure has its own file
    num_cases: int = 0  # of this part
    all_cases: dict[str, str] = field(default_factory=dict)  # the label map of each case, those of other parts too, in their order
    output_folder: str = ""  # or for one case a file
    inputs: tuple[str, ...] = ()
    working_folder: str = ""  # where relative paths of this run begin
    command: tuple[str, ...] = ()  # the arguments of the command line, if it was started from there
    resumed: bool = False  # whether label maps that were there were kept
    started: datetime = field(default_factory=lambda: datetime.now(UTC))  # UTC
    seconds: float = 0.0  # wall time
    interrupted: bool = False  # whether it was stopped before the end
    cases: list[CaseRecord] = field(default_factory=list)  # one per processed case, in order
    earlier: list[CaseRecord] = field(default_factory=list)  # records of an earlier run of the same cases, kept until these are processed

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    def head(self) -> dict[str, Any]:
        """Return plain values for a file, those of the run only; None for numbers that JSON does not have."""
        import crfrefine

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("cases", "earlier")}
        head: dict[str, Any] = without_nonfinite({"schema": SCHEMA, "version": crfrefine.__version__, **fields})
        return head

    def counts(self) -> dict[str, int]:
        """Return the numbers of cases by their status."""
        return {f"num_{status}": self.count(status) for status in ("done", "skipped", "failed")}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the JSON file; None for numbers that JSON does not have."""
        reached = {record.case_id for record in self.cases}
        lists = {
            "cases": [record.to_dict() for record in self.cases],
            "not_reached": [record.to_dict() for record in self.earlier if record.case_id not in reached],
        }
        return {**self.head(), **self.counts(), **without_nonfinite(lists)}

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(self.to_dict(), indent=2, default=_plain, allow_nan=False) + "\n"


def record_file(output: Path, inputs: Sequence[str], part_id: int, num_parts: int) -> Path:
    """Return the record of a run in its output folder. Runs on other inputs, absolute paths, have other files."""
    digest = hashlib.sha256("\0".join(inputs).encode(errors="surrogateescape")).hexdigest()[:8]
    return output / RECORD_FOLDER / f"run-{digest}-part-{part_id}-of-{num_parts}{LINES_SUFFIX}"


def records_in(folder: Path) -> list[Path]:
    """Return the records in an output folder; empty without any."""
    return sorted((folder / RECORD_FOLDER).glob(f"run-*{LINES_SUFFIX}"))


def is_lines(path: Path) -> bool:
    """Return whether a summary of this name has a line per record."""
    return path.name.lower().endswith(LINES_SUFFIX)


def note_on_num_labels(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Return a note if the cases of a run have different numbers of labels, else None.

    Label maps do not count: without a declaration, each has as many labels as its largest one says.
    """
    found: dict[int, list[str]] = {}
    for values in records:
        if values.get("input_type") in ("logits", "probabilities") and isinstance(values.get("num_labels"), int):
            found.setdefault(values["num_labels"], []).append(str(values["case_id"]))
    if len(found) < 2:
        return None
    groups = "; ".join(f"{number} of {listed(case_ids)}" for number, case_ids in sorted(found.items()))
    return f"cases have different numbers of labels, as results of different networks have: {groups}"


def to_line(values: Mapping[str, Any]) -> bytes:
    """Return values as a line of JSON."""
    return (json.dumps(without_nonfinite(dict(values)), default=_plain, allow_nan=False) + "\n").encode()


def time_of_change(path: Path) -> str | None:
    """Return the time of a file's last change, UTC; None if it does not exist."""
    try:
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):  # The latter is of names that no system takes.
        return None
    return datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="microseconds")


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return str(value)
