"""What a folder run did, case by case, and the JSON file that says so. `docs/reference/summary.md` lists the fields."""

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
    """What became of one case: `status` is "done", "skipped" (its output was there) or "failed".

    Fields stay at their defaults as far as the case did not get.

    Attributes:
        output: the label map.
        probabilities: the marginals, where asked for.
        logits: the refined logits, where asked for.
        preview: the picture, where asked for.
        grid_shape: voxels along each axis.
        spacing: mm, one a grid axis.
        num_labels: L, background included.
        num_modalities: channels of the image.
        num_voxels_in_mask: voxels inside the mask.
        num_padding_voxels: those of them where all labels had the same logit; they took no part.
        input_type: "logits" or "probabilities": how the network's output was taken.
        report: what the mean field says about its run; None: it did not get there.
        changes: voxels of each label in the network's argmax and after refinement; None: it did not get there.
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
    """What became of a whole run.

    Attributes:
        device: where it was computed.
        requested_device: what was asked for, such as "auto".
        threads: CPU threads.
        parameters: the CRF's parameters as `CrfParameters.to_dict` returns them.
        num_parts: number of processes that share the cases.
        part_id: this process among them, from 0.
        num_cases: cases of this part.
        started: when, UTC.
        seconds: wall time.
        interrupted: whether it was stopped before the end.
        cases: one record for each case that was looked at, in order.
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
        """Return plain values as they stand in the JSON file; None for numbers that JSON does not have."""
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
