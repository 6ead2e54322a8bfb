"""The settings of a run, and the result of a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crfrefine.cases.reading_options import RegionReading
from crfrefine.evaluate.regions import RegionPlan
from crfrefine.metrics.registry import RegionValues
from crfrefine.runs.records import Record


@dataclass(frozen=True)
class Settings:
    """The settings that the values of a case depend on, besides its files."""

    plan: RegionPlan  # Regions, and the label to ignore.
    tolerance_mm: float  # Tolerance of the surface Dice.
    resample: bool = False  # Whether predictions on another grid are interpolated onto that of the reference.
    channels: Mapping[str, RegionReading] = field(default_factory=dict)  # By method, which channels of its files are regions.


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured" or "failed"."""

    status: str = "measured"
    values: dict[str, RegionValues] = field(default_factory=dict)  # By method; methods that could not be measured are missing.
    # Optional results that are missing and structures that others cover, each after the name of the method, or "reference".
    warnings: list[str] = field(default_factory=list)
