"""The records of a run and of its cases, and observers: nothing is printed below `cli/`.

`docs/reference/summary.md` lists the fields.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from crfrefine.base.failures import Failure
from crfrefine.base.text import listed, shorten_value
from crfrefine.io.json import without_nonfinite

FAILED = "failed"
SCHEMA = 2

VANISHED = "labels that vanished"
"""The note on labels that a case has lost begins with it; the advice follows a semicolon."""

RunT = TypeVar("RunT")
RecordT = TypeVar("RecordT", bound="Record")


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


@dataclass
class Record:
    """The outcome of a case, common to all commands."""

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


@dataclass
class CaseRecord(Record):
    """The outcome of a case: `status` is "done", "skipped" (its output existed) or "failed".

    Fields that the case did not reach keep their defaults.
    """

    output: Path | None = None  # the label map
    written: str | None = None  # time of its last change, UTC
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: Path | None = None
    grid_shape: tuple[int, ...] | None = None  # voxels along each axis
    spacing: tuple[float, ...] | None = None  # mm, one per grid axis
    num_labels: int | None = None  # L, background included
    num_modalities: int | None = None  # channels of the image
    num_voxels_in_mask: int | None = None
    num_padding_voxels: int | None = None  # in the mask, but left out: all labels had the same logit
    voxels_removed: int | None = None  # of components that the small-object rules removed
    voxels_filled: int | None = None  # of holes that they filled
    input_type: str | None = None  # "logits", "probabilities" or "labels"
    regions: dict[str, Any] | None = None  # of the sigmoid channels; None means that channels are labels
    device: str | None = None
    num_iterations: int | None = None
    converged: bool | None = None
    energy: tuple[float, ...] = ()  # free energy per iteration
    filters: tuple[str, ...] = ()  # how each kernel was computed
    voxels_changed: int | None = None
    voxels_before: tuple[int, ...] = ()  # per label, background first
    voxels_after: tuple[int, ...] = ()
    vanished_labels: tuple[int, ...] = ()  # in the network's result, but not in the refined label map

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        super().fail(failure)
        self.output = self.written = self.probabilities = self.logits = self.preview = self.structures = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The outputs beside the label map, and the folder of structures."""
        paths = (self.probabilities, self.logits, self.preview, self.structures)
        return tuple(path for path in paths if path is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they stand in a JSON file."""
        fields = {**vars(self)}
        last = {name: fields.pop(name) for name in ("times", "notes")}
        failure = vars(next(iter(fields.pop("failures")), Failure("", "")))
        names = {"error": "message", "error_kind": "kind", "error_traceback": "traceback"}
        return {**fields, **last, **{name: failure[own] or None for name, own in names.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore a record from its JSON; raise TypeError or KeyError if a field has a value of another kind or is missing."""
        check_kinds(cls, values, ("case_id", "status"))
        known = {each.name: values[each.name] for each in dataclasses.fields(cls) if values.get(each.name) is not None}
        known |= {name: Path(known[name]) for name in ("output", "probabilities", "logits", "preview", "structures") if name in known}
        record = cls(**{**known, "failures": []})
        if isinstance(error := values.get("error"), str):
            record.failures.append(Failure(error, str(values.get("error_kind"))))
        return record


def check_kinds(cls: type, values: Mapping[str, Any], required: Sequence[str]) -> None:
    """Raise TypeError or KeyError unless the values of a line have the kinds of a dataclass's fields, and none of these is missing."""
    kinds = {"int": int, "bool": bool, "dict": dict, "list": list, "tuple": list}
    for each in dataclasses.fields(cls):
        value, kind = values.get(each.name), kinds.get(re.split(r"\W", str(each.type))[0], str)
        if value is None and each.name in required:
            raise KeyError(each.name)
        if value is not None and type(value) is not kind:
            raise TypeError(f"{each.name}: expected {kind.__name__}, got {shorten_value(value)}")
    if not all(isinstance(seconds, int | float) for seconds in (values.get("times") or {}).values()):
        raise TypeError("times: expected numbers")


@dataclass
class RunSummary:
    """The outcome of a run."""

    device: str
    threads: int
    parameters: dict[str, Any]  # as `CrfParameters.to_dict` returns them
    network_spacing: float | tuple[float, ...] | str | None = None
    choice: Mapping[str, Any] | None = None  # how `-c auto` chose the parameters; None means that they were given
    requested_device: str = "auto"
    max_memory: int | None = None  # bytes that the run could take at its start, if a limit is known
    max_memory_source: str = ""  # what sets this limit, a phrase
    num_parts: int = 1
    part_id: int = 0  # from 0
    label_names: dict[int, str] = field(default_factory=dict)  # by number, where each structure has its own file
    num_cases: int = 0  # of this part
    all_cases: dict[str, str] = field(default_factory=dict)  # label map of each case of all parts, in the output folder
    output_folder: str = ""  # or for one case a file
    inputs: tuple[str, ...] = ()
    working_folder: str = ""  # where relative paths of this run begin
    command: tuple[str, ...] = ()  # the arguments of the command line, if it was started from there
    resumed: bool = False  # whether label maps that were there were kept
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0  # wall time
    interrupted: bool = False  # whether it was stopped before the end
    cases: list[CaseRecord] = field(default_factory=list)  # one per processed case, in order

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    def head(self) -> dict[str, Any]:
        """Return plain values for a file, without the cases."""
        import crfrefine

        fields = {**vars(self), "started": self.started.isoformat()}
        del fields["cases"]
        return {"schema": SCHEMA, "version": crfrefine.__version__, **fields}

    def to_json(self) -> str:
        """Return the text of the file of `--summary`."""
        counts = {f"num_{status}": self.count(status) for status in ("done", "skipped", "failed")}
        return to_json({**self.head(), **counts, "cases": [record.to_dict() for record in self.cases]}, indent=2)


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return values as JSON with a line break at its end; None for numbers that JSON does not have."""
    return json.dumps(without_nonfinite(dict(values)), indent=indent, default=str, allow_nan=False) + "\n"


def note_on_num_labels(records: Iterable[CaseRecord]) -> str | None:
    """Return a note if the cases of a run have different numbers of labels, else None.

    Label maps do not count: without a declaration, each has as many labels as its largest one says.
    """
    cases: dict[int, list[str]] = {}
    for record in records:
        if record.input_type in ("logits", "probabilities") and record.num_labels is not None:
            cases.setdefault(record.num_labels, []).append(record.case_id)
    if len(cases) < 2:
        return None
    groups = "; ".join(f"{number} of {listed(case_ids)}" for number, case_ids in sorted(cases.items()))
    return f"cases have different numbers of labels, as results of different networks have: {groups}"
