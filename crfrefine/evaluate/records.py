"""The result of a case: in memory, as the JSON file that a later run reuses, and what tells whether it may."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.evaluate.pairing import CasePair
from crfrefine.evaluate.regions import RegionPlan
from crfrefine.failures import Failure
from crfrefine.io.files import files_read
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.registry import RegionValues

SCHEMA = 1
"""Of the file of a case; a number of its own, so that files of other versions are measured again."""


@dataclass(frozen=True)
class Settings:
    """What the values of a case depend on, besides its files.

    Attributes:
        plan: regions, and the label to ignore.
        tolerance_mm: of the surface Dice.
    """

    plan: RegionPlan
    tolerance_mm: float


@dataclass(frozen=True)
class Problem:
    """Something in a case that could not be measured.

    Attributes:
        message: what was expected, what came, which file.
        kind: name of the error's class.
        method: the method concerned; None: the whole case.
        traceback: where it was raised, of an error that nobody expected.
    """

    message: str
    kind: str
    method: str | None = None
    traceback: str | None = None


@dataclass
class CaseResult:
    """What was measured in a case.

    Attributes:
        case_id: its name.
        values: by method; a method that could not be measured is not there.
        problems: what could not be measured.
        warnings: what is missing although it might have been there, with the name of the method.
        notes: what was assumed about its files.
        seconds: that measuring took.
        is_reused: whether an earlier run measured it.
    """

    case_id: str
    values: dict[str, RegionValues] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_reused: bool = False

    def fail(self, failure: Failure, method: str | None = None) -> None:
        """Record that the case, or a method in it, could not be measured."""
        self.problems.append(Problem(failure.message, failure.kind, method, failure.traceback))


def fingerprint(pair: CasePair, settings: Settings) -> dict[str, Any]:
    """Return what must be the same for a result to be reused: files with size and time of change, settings, version.

    Raises:
        OSError: a file is not there any more.
        CrfRefineError: a header that names another file cannot be read.
    """
    methods = {
        name: {
            "label_map": _identity(files.label_map),
            "scores": [_identity(path) for path in files.probabilities],
            "asked_for_scores": files.asked_for_probabilities,  # Those that cannot be used are a warning, or a failure.
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
        "ignore_label": plan.ignore_label,
        "labels": list(plan.labels),
        "regions": {name: list(labels) for name, labels in plan.named.items()},
    }


def to_json(result: CaseResult, identity: Mapping[str, Any]) -> bytes:
    """Return the content of a case's file; null where a value is undefined."""
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
    """Return the result in a case's file, or None where there is none that may be reused."""
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
        warnings, notes = list(content["warnings"]), list(content["notes"])
        return CaseResult(content["case"], values, warnings=warnings, notes=notes, seconds=content["seconds"], is_reused=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # Not there, or not whole, or not ours: measured again.


def _identity(path: Path | None) -> list[Any] | None:
    """Return name, size and time of change of a file, and of the one with its voxels."""
    if path is None:
        return None
    found: list[Any] = []
    for one in files_read(path):
        status = one.stat()
        found.append([str(one.resolve()), status.st_size, status.st_mtime_ns])
    return found
