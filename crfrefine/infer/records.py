"""Records of a folder run, case by case, and their JSON file. `docs/reference/summary.md` lists the fields."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.execution.records import Record
from crfrefine.io.json import without_nonfinite

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import LabelChanges
    from crfrefine.engines.base import MeanFieldReport
    from crfrefine.failures import Failure

SCHEMA = 1


@dataclass
class CaseRecord(Record):
    """The outcome of one case: `status` is "done", "skipped" (its output existed) or "failed".

    Fields that the case did not reach keep their defaults.

    Attributes:
        output: the label map.
        probabilities: the marginals, if requested.
        logits: the refined logits, if requested.
        preview: the picture, if requested.
        grid_shape: voxels along each axis.
        spacing: mm, one per grid axis.
        num_labels: L, background included.
        num_modalities: channels of the image.
        num_voxels_in_mask: voxels inside the mask.
        num_padding_voxels: voxels in the mask that were excluded because all labels had the same logit.
        input_type: "logits" or "probabilities": type of the network's output.
        report: iterations, convergence, energy and filters of the mean field; None: the case did not get that far.
        changes: voxels of each label in the network's argmax and after refinement; None: the case did not get that far.
    """

    output: Path | None = None
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    grid_shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    num_labels: int | None = None
    num_modalities: int | None = None
    num_voxels_in_mask: int | None = None
    num_padding_voxels: int | None = None
    input_type: str | None = None
    report: MeanFieldReport | None = None
    changes: LabelChanges | None = None

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        super().fail(failure)
        self.output = self.probabilities = self.logits = self.preview = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they stand in a JSON file, those of the run and of the labels beside the others."""
        values: dict[str, Any] = {}
        for name, value in super().to_dict().items():
            values |= (value or _NOT_REACHED[name]) if name in _NOT_REACHED else {name: value}
        return values


_NOT_REACHED: dict[str, dict[str, Any]] = {
    "report": {"num_iterations": None, "converged": None, "energy": (), "filters": ()},
    "changes": {"voxels_changed": None, "voxels_before": (), "voxels_after": ()},
}


@dataclass
class RunSummary:
    """The outcome of a run.

    Attributes:
        device: the device that computed it.
        requested_device: the requested device, such as "auto".
        threads: CPU threads.
        parameters: the CRF's parameters as `CrfParameters.to_dict` returns them.
        num_parts: number of processes that share the cases.
        part_id: this process among them, from 0.
        num_cases: cases of this part.
        started: start time, UTC.
        seconds: wall time.
        interrupted: whether it was stopped before the end.
        cases: one record per processed case, in order.
    """

    device: str
    threads: int
    parameters: dict[str, Any]
    requested_device: str = "auto"
    num_parts: int = 1
    part_id: int = 0
    num_cases: int = 0
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    interrupted: bool = False
    cases: list[CaseRecord] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the JSON file; None for numbers that JSON does not have."""
        import crfrefine

        head = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "cases"}
        counts = {f"num_{status}": self.count(status) for status in ("done", "skipped", "failed")}
        cases = [record.to_dict() for record in self.cases]
        summary: dict[str, Any] = without_nonfinite({"schema": SCHEMA, "version": crfrefine.__version__, **head, **counts, "cases": cases})
        return summary

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(self.to_dict(), indent=2, default=_plain, allow_nan=False) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return str(value)
