"""The result of a case, in memory and as a JSON file, and the check whether a later run may reuse it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.cases.region_reading import RegionReading
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.pairing import CasePair
from crfrefine.evaluate.regions import RegionPlan
from crfrefine.io.atomic import atomic_files, remove_file
from crfrefine.io.json import without_nonfinite
from crfrefine.io.recognition import files_read
from crfrefine.metrics.registry import RegionValues
from crfrefine.runs.execution.records import Record

SCHEMA = 1
"""Schema of a case's file; a case with a file of another schema is measured again."""


@dataclass(frozen=True)
class Settings:
    """The settings that the values of a case depend on, besides its files."""

    plan: RegionPlan  # Regions, and the label to ignore.
    tolerance_mm: float  # Tolerance of the surface Dice.
    resample: bool = False  # Whether predictions on another grid are interpolated onto that of the reference.
    channels: Mapping[str, RegionReading] = field(default_factory=dict)  # By method, which channels of its files are regions.


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured", "reused" (an earlier run measured it) or "failed"."""

    status: str = "measured"
    values: dict[str, RegionValues] = field(default_factory=dict)  # By method; methods that could not be measured are missing.
    # Optional results that are missing and structures that others cover, each after the name of the method, or "reference".
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A case to measure."""

    pair: CasePair  # Its files.
    settings: Settings  # Settings of the run.
    file: Path  # File of its result.

    @property
    def case_id(self) -> str:
        """Its name."""
        return self.pair.case_id

    def earlier(self) -> CaseResult | None:
        """Return the result of an earlier run, if it is complete and has the same files and settings."""
        try:
            return from_json(self.file, fingerprint(self.pair, self.settings))
        except (CrfRefineError, OSError):
            return None

    def keep(self, result: CaseResult) -> None:
        """Write the result, or remove that of an earlier run if the case failed now."""
        try:
            identity = None if result.failures else fingerprint(self.pair, self.settings)
        except (CrfRefineError, OSError):
            identity = None  # The files changed while they were read.
        if identity is None:
            remove_file(self.file)
        else:
            with atomic_files(self.file) as (file,):
                file.write(to_json(result, identity))


def fingerprint(pair: CasePair, settings: Settings) -> dict[str, Any]:
    """Return what must match for a result to be reused: files with size and time of change, settings, version.

    Raises:
        OSError: a file no longer exists.
        CrfRefineError: a header that names another file cannot be read.
    """
    methods = {
        name: {
            "label_map": _identity(files.label_map),
            "scores": [_identity(path) for path in files.probabilities],
            "asked_for_scores": files.asked_for_probabilities,  # Decides whether unusable ones are a warning or a failure.
        }
        for name, files in pair.methods.items()
    }
    plan = settings.plan
    return {
        "schema": SCHEMA,
        "version": crfrefine.__version__,
        "reference": _identity(pair.reference),
        "methods": methods,
        "tolerance_mm": settings.tolerance_mm,
        "resample": settings.resample,
        "ignore_label": plan.ignore_label,
        "labels": list(plan.labels),
        "regions": {name: list(labels) for name, labels in plan.named.items()},
        "structures": dict(pair.structures),
        "channels": {
            name: [reading.problem, reading.num_labels, None if reading.scheme is None else reading.scheme.to_dict()]
            for name, reading in settings.channels.items()
        },
    }


def to_json(result: CaseResult, identity: Mapping[str, Any]) -> bytes:
    """Return the content of a case's file; null for undefined values."""
    content = {
        "case": result.case_id,
        "fingerprint": identity,
        "seconds": result.seconds,
        "warnings": result.warnings,
        "notes": result.notes,
        "values": result.values,
    }
    return (json.dumps(without_nonfinite(content), indent=1, allow_nan=False) + "\n").encode()


def from_json(path: Path, identity: Mapping[str, Any]) -> CaseResult | None:
    """Return the result in a case's file, or None if there is no reusable one."""
    try:
        content = json.loads(path.read_bytes())
        if content["fingerprint"] != identity:
            return None
        values = {
            method: {
                region: {metric: math.nan if value is None else float(value) for metric, value in row.items()}
                for region, row in rows.items()
            }
            for method, rows in content["values"].items()
        }
        case_id, seconds, notes, warnings = content["case"], float(content["seconds"]), content["notes"], content["warnings"]
        if not all(isinstance(text, str) for text in (case_id, *notes, *warnings)) or not math.isfinite(seconds):
            return None
        return CaseResult(case_id, "reused", {"measure": seconds}, list(notes), values=values, warnings=list(warnings))
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # Missing, incomplete, or not ours: measure again.


def _identity(path: Path | None) -> list[Any] | None:
    """Return name, size and time of change of a file, and of the file with its voxels."""
    if path is None:
        return None
    found: list[Any] = []
    # Of a folder of structures, every file counts.
    for one in sorted(path.iterdir()) if path.is_dir() else files_read(path):
        status = one.stat()
        found.append([str(one.resolve()), status.st_size, status.st_mtime_ns])
    return found
