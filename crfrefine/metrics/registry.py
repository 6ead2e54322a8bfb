"""All metrics of the package: their functions, names and number formats, and which values are better.

Tables, charts, files and the verdict take names, order and wording from here; nothing else lists metrics. A new metric needs a function,
an entry here, a row in `docs/reference/metrics.md` and a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from crfrefine.metrics import counts, masks, reliability
from crfrefine.metrics.counts import OverlapCounts
from crfrefine.metrics.masks import MaskPair
from crfrefine.metrics.reliability import ReliabilitySums

Better = Literal["higher", "lower", "nearer_zero"]
Empty = Literal["both", "prediction", "reference"]
"""Which of the two masks of a region are empty: both, or only one."""

RegionValues = dict[str, dict[str, float]]
"""Value of each metric, by region; NaN where undefined."""

POINTS = 100.0
"""Differences of ratios are shown in points (hundredths); the ratios themselves from 0 to 1."""

_ADVICE = {"higher": "higher is better", "lower": "lower is better", "nearer_zero": "nearer to zero is better", None: "only describes"}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric and its presentation.

    Attributes:
        name: name in files and tables.
        title: name in headings and charts.
        better: which values are better; None if it only describes.
        unit: unit of its values; empty without a unit.
        digits: decimals of a value.
        is_ratio: whether its values are from 0 to 1, and their differences shown in points.
        in_overview: whether the terminal shows it after `evaluate`; files and report show all metrics.
        in_training: whether `train-crf` measures it too; it shows those that are in the overview.
        noun: name inside of a sentence on what got worse, if the title would not do; else empty.
        follows: name of another metric that determines it; a loss in it is not reported again. Empty without one.
    """

    name: str
    title: str
    better: Better | None = None
    unit: str = ""
    digits: int = 2
    is_ratio: bool = False
    in_overview: bool = False
    in_training: bool = False
    noun: str = ""
    follows: str = ""

    @property
    def advice(self) -> str:
        """Which values are better, in words."""
        return _ADVICE[self.better]

    @property
    def difference_unit(self) -> str:
        """Displayed unit of differences."""
        return "points" if self.is_ratio else self.unit

    @property
    def difference_factor(self) -> float:
        """Factor from differences of values to the displayed numbers."""
        return POINTS if self.is_ratio else 1.0

    def value_text(self, value: float) -> str:
        """Return a value as displayed, without its unit; empty if undefined."""
        return _number(value, self.digits)

    def difference_text(self, difference: float, sign: str = "+") -> str:
        """Return a difference of two values as displayed, without its unit; empty if undefined. The sign is that of positive numbers."""
        return _number(self.difference_factor * difference, 2 if self.is_ratio else self.digits, sign)

    def interval_text(self, low: float, high: float, sign: str = "+") -> str:
        """Return an interval of differences as displayed; empty if undefined."""
        return "" if math.isnan(low) else f"{self.difference_text(low, sign)} to {self.difference_text(high, sign)}"


@dataclass(frozen=True, kw_only=True)
class MaskMetric(Metric):
    """A metric of two masks.

    Attributes:
        measure: the function that computes it.
        undefined_if_empty: it has no value if these masks are empty.
    """

    measure: Callable[[MaskPair], float]
    undefined_if_empty: frozenset[Empty] = frozenset()


@dataclass(frozen=True, kw_only=True)
class RatioMetric(MaskMetric):
    """A metric of two masks from 0 to 1; 1 is perfect."""

    better: Better | None = "higher"
    digits: int = 4
    is_ratio: bool = True
    undefined_if_empty: frozenset[Empty] = frozenset({"both"})


@dataclass(frozen=True, kw_only=True)
class DistanceMetric(MaskMetric):
    """A distance between the boundaries of two masks."""

    better: Better | None = "lower"
    unit: str = "mm"
    undefined_if_empty: frozenset[Empty] = frozenset({"both", "prediction", "reference"})


@dataclass(frozen=True, kw_only=True)
class CalibrationMetric(Metric):
    """A metric of probabilities."""

    measure: Callable[[ReliabilitySums], float]  # The function that computes it from sums over at least one voxel.
    better: Better | None = "lower"
    digits: int = 5


def _of_counts(function: Callable[[OverlapCounts], float]) -> Callable[[MaskPair], float]:
    return lambda pair: function(pair.counts)


Kind = TypeVar("Kind", bound=Metric)


def _by_name(metrics: Iterable[Kind]) -> dict[str, Kind]:
    return {metric.name: metric for metric in metrics}


DICE = RatioMetric(name="dice", title="Dice", measure=_of_counts(counts.dice), in_overview=True, in_training=True)
"""The metric that the verdict is about."""

MASK_METRICS = _by_name(
    (
        DICE,
        RatioMetric(name="iou", title="IoU", measure=_of_counts(counts.iou), follows="dice"),
        RatioMetric(
            name="sensitivity",
            title="Sensitivity",
            noun="sensitivity",
            measure=_of_counts(counts.sensitivity),
            undefined_if_empty=frozenset({"both", "reference"}),
            in_training=True,
        ),
        RatioMetric(
            name="precision",
            title="Precision",
            noun="precision",
            measure=_of_counts(counts.precision),
            undefined_if_empty=frozenset({"both", "prediction"}),
            in_training=True,
        ),
        MaskMetric(name="volume_ml", title="Volume", measure=masks.volume_ml, unit="ml"),
        MaskMetric(
            name="volume_difference_ml",
            title="Volume difference",
            noun="volume error",
            measure=masks.volume_difference_ml,
            better="nearer_zero",
            unit="ml",
            in_training=True,
        ),
        RatioMetric(name="surface_dice", title="Surface Dice", noun="surface Dice", measure=masks.surface_dice, in_overview=True),
        DistanceMetric(name="hd_mm", title="Hausdorff distance", measure=masks.hausdorff_mm),
        DistanceMetric(name="hd95_mm", title="HD95", measure=masks.hausdorff_95_mm, in_overview=True, in_training=True),
        DistanceMetric(name="assd_mm", title="ASSD", measure=masks.average_distance_mm, digits=3, in_overview=True, in_training=True),
        MaskMetric(name="num_components", title="Components", measure=masks.num_components, digits=1),
    )
)
"""The metrics of masks, in the order of reports."""

CALIBRATION_METRICS = _by_name(
    (
        CalibrationMetric(
            name="ece",
            title="Calibration error (ECE)",
            noun="calibration error (ECE)",
            measure=reliability.expected_calibration_error,
            in_overview=True,
        ),
        CalibrationMetric(name="brier", title="Brier score", measure=reliability.brier_score),
        CalibrationMetric(
            name="nll",
            title="Negative log likelihood",
            noun="negative log likelihood",
            measure=reliability.negative_log_likelihood,
        ),
    )
)
"""The metrics of probabilities, in the order of reports."""

NLL = CALIBRATION_METRICS["nll"]
"""A proper score, which only the true probabilities minimize."""

METRICS: dict[str, Metric] = {**MASK_METRICS, **CALIBRATION_METRICS}
"""All of them."""


def metric_named(name: str) -> Metric:
    """Return a metric. An unknown one, from a table made elsewhere, only describes, in the unit at the end of its name."""
    unit = name.rpartition("_")[2]
    return METRICS.get(name) or Metric(name=name, title=name, unit=unit if unit in ("mm", "ml") else "")


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else ""
