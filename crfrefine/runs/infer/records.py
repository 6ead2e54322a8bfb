"""Records of a folder run, case by case, and their JSON file. `docs/reference/summary.md` lists the fields."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.base.text import listed
from crfrefine.io.json import without_nonfinite
from crfrefine.runs.execution.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crfrefine.arrays.label_maps import LabelChanges
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.failures import Failure
    from crfrefine.engines.base import MeanFieldReport

SCHEMA = 1

VANISHED = "labels that vanished"
"""The note on labels that a case has lost begins with it; what to do about it follows a semicolon."""


@dataclass
class CaseRecord(Record):
    """The outcome of one case: `status` is "done", "skipped" (its output existed) or "failed".

    Fields that the case did not reach keep their defaults. A skipped case has those of the run that refined it, where its summary is known.

    Attributes:
        output: the label map.
        written: time of the label map's last change, UTC: a later change shows that the record is not about that label map.
        probabilities: the marginals, if requested.
        logits: the refined logits, if requested.
        preview: the picture, if requested.
        structures: the folder of one binary file per structure, if requested.
        grid_shape: voxels along each axis.
        spacing: mm, one per grid axis.
        num_labels: L, background included.
        num_modalities: channels of the image.
        num_voxels_in_mask: voxels inside the mask.
        num_padding_voxels: voxels in the mask that were excluded because all labels had the same logit.
        voxels_removed: voxels of components that the small-object rules turned into background.
        voxels_filled: voxels of holes that they filled.
        input_type: "logits", "probabilities" or "labels": type of the network's output.
        regions: the regions of the network's sigmoid channels; None: its channels are labels.
        device: the device that computed it; None: the case did not get that far.
        report: iterations, convergence, energy and filters of the mean field; None: the case did not get that far.
        changes: voxels of each label in the network's argmax and after refinement; None: the case did not get that far.
        vanished_labels: the labels that the network's result has, in its own files too, and the refined label map lacks.
        other_parameters: the tables of parameters that a skipped case was refined with, those that are not as in this run.
        kept: the record as the summary of an earlier run has it; its fields stand in the file, but for `status`, `output` and
            `other_parameters`.
    """

    output: Path | None = None
    written: str | None = None
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: Path | None = None
    grid_shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    num_labels: int | None = None
    num_modalities: int | None = None
    num_voxels_in_mask: int | None = None
    num_padding_voxels: int | None = None
    voxels_removed: int | None = None
    voxels_filled: int | None = None
    input_type: str | None = None
    regions: RegionScheme | None = None
    device: str | None = None
    report: MeanFieldReport | None = None
    changes: LabelChanges | None = None
    vanished_labels: tuple[int, ...] = ()
    other_parameters: dict[str, Any] | None = None
    kept: dict[str, Any] | None = None

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        super().fail(failure)
        self.output = self.written = self.probabilities = self.logits = self.preview = self.structures = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they stand in a JSON file, those of the run and of the labels beside the others."""
        values: dict[str, Any] = {}
        for name, value in super().to_dict().items():
            values |= (value or _NOT_REACHED[name]) if name in _NOT_REACHED else {name: value}
        if self.regions is not None:
            values["regions"] = self.regions.to_dict()
        kept = values.pop("kept") or {}
        own = {"status": self.status, "other_parameters": self.other_parameters} | ({"output": self.output} if self.output else {})
        return values | kept | own


_NOT_REACHED: dict[str, dict[str, Any]] = {
    "report": {"num_iterations": None, "converged": None, "energy": (), "filters": ()},
    "changes": {"voxels_changed": None, "voxels_before": (), "voxels_after": ()},
}


@dataclass
class RunSummary:
    """The outcome of a run.

    Attributes:
        device: the device that computes it, or several, such as "cuda:0,1".
        requested_device: the requested device, such as "auto".
        threads: CPU threads.
        max_memory: bytes that the run could take at its start; None: no limit is known.
        max_memory_source: what sets this limit, a phrase.
        parameters: the CRF's parameters as `CrfParameters.to_dict` returns them.
        num_parts: number of processes that share the cases.
        part_id: this process among them, from 0.
        label_names: name of each label by its number, where each structure has a file of its own; else empty.
        num_cases: cases of this part.
        all_cases: the label map of each case of the run by its name, those of the other parts too, in the order of the parts.
        output_folder: where results go: a folder, or for one case a file.
        inputs: the folders and files that were named as inputs.
        working_folder: where relative paths of this run begin.
        command: the arguments of the command line; empty if it was not started from there.
        resumed: whether label maps that were there were kept.
        started: start time, UTC.
        seconds: wall time.
        interrupted: whether it was stopped before the end.
        cases: one record per processed case, in order.
        earlier: records of an earlier run of the same cases, kept until these are processed.
    """

    device: str
    threads: int
    parameters: dict[str, Any]
    requested_device: str = "auto"
    max_memory: int | None = None
    max_memory_source: str = ""
    num_parts: int = 1
    part_id: int = 0
    label_names: dict[int, str] = field(default_factory=dict)
    num_cases: int = 0
    all_cases: dict[str, str] = field(default_factory=dict)
    output_folder: str = ""
    inputs: tuple[str, ...] = ()
    working_folder: str = ""
    command: tuple[str, ...] = ()
    resumed: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    interrupted: bool = False
    cases: list[CaseRecord] = field(default_factory=list)
    earlier: list[CaseRecord] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    def head(self) -> dict[str, Any]:
        """Return plain values for a file, those of the run alone; None for numbers that JSON does not have."""
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
    except OSError:
        return None
    return datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="microseconds")


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return str(value)
