"""All metrics of the package: their functions, names and number formats, and which values are better.

Tables, charts, files and the verdict take names, order and wording from here; nothing else lists metrics. A new metric needs a function,
an entry here, a row in `docs/reference/metrics.md` and a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from crfrefine.metrics import masks, reliability

Better = Literal["higher", "lower", "nearer_zero"]

RegionValues = dict[str, dict[str, float]]  # value of each metric, by region; NaN where undefined
# Differences of ratios are shown in points (hundredths); the ratios themselves from 0 to 1.
POINTS = 100.0
_ADVICE = {"higher": "higher is better", "lower": "lower is better", "nearer_zero": "nearer to zero is better", None: "only describes"}


@dataclass(frozen=True)
class Metric:
    """A metric and its presentation."""

    name: str  # In files and tables.
    title: str  # In headings and charts.
    measure: Callable[[Any], float] = lambda _: math.nan  # Function of a MaskPair, or of the ReliabilitySums of at least one voxel.
    better: Better | None = None  # Which values are better; None if it only describes.
    unit: str = ""  # Unit of its values; empty without one.
    digits: int = 2  # Decimals of a value.
    is_ratio: bool = False  # True if its values are from 0 to 1, and their differences shown in points.
    in_overview: bool = False  # True if the terminal shows it after `evaluate`; files and report show all metrics.
    in_training: bool = False  # True if `train-crf` measures it too; it shows those that are in the overview.
    noun: str = ""  # Name inside of a sentence on the metrics that got worse, if the title would not do.
    follows: str = ""  # Name of another metric that determines it: a loss in it is not reported again.

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


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else ""


_ratio = partial(Metric, better="higher", digits=4, is_ratio=True)
_distance = partial(Metric, better="lower", unit="mm")
_difference = partial(Metric, better="nearer_zero", unit="ml")
_score = partial(Metric, better="lower", digits=5)

# The metric that the verdict is about.
DICE = _ratio("dice", "Dice", lambda pair: masks.dice(pair.counts), in_overview=True, in_training=True)
_MASK_METRICS = (
    DICE,
    _ratio("iou", "IoU", lambda pair: masks.iou(pair.counts), follows="dice"),
    _ratio("sensitivity", "Sensitivity", lambda pair: masks.sensitivity(pair.counts), noun="sensitivity", in_training=True),
    _ratio("precision", "Precision", lambda pair: masks.precision(pair.counts), noun="precision", in_training=True),
    Metric("volume_ml", "Volume", masks.volume_ml, unit="ml"),
    _difference("volume_difference_ml", "Volume difference", masks.volume_difference_ml, noun="volume error", in_training=True),
    _ratio("surface_dice", "Surface Dice", masks.surface_dice, noun="surface Dice", in_overview=True, in_training=True),
    _distance("hd_mm", "Hausdorff distance", masks.hausdorff_mm),
    _distance("hd95_mm", "HD95", masks.hausdorff_95_mm, in_overview=True, in_training=True),
    _distance("assd_mm", "ASSD", masks.average_distance_mm, digits=3, in_overview=True, in_training=True),
    Metric("num_components", "Components", masks.num_components, digits=1),
)
# The metrics of masks, in the order of reports.
MASK_METRICS = {metric.name: metric for metric in _MASK_METRICS}
_ECE = "calibration error (ECE)"
# A proper score, which only the true probabilities minimize.
NLL = _score("nll", "Negative log likelihood", reliability.negative_log_likelihood, noun="negative log likelihood")
# The metrics of probabilities, in the order of reports.
CALIBRATION_METRICS = {
    "ece": _score("ece", "Calibration error (ECE)", reliability.expected_calibration_error, noun=_ECE, in_overview=True),
    "brier": _score("brier", "Brier score", reliability.brier_score),
    "nll": NLL,
}
METRICS = MASK_METRICS | CALIBRATION_METRICS  # all of them


def metric_named(name: str) -> Metric:
    """Return a metric. An unknown one, from a table made elsewhere, only describes, in the unit at the end of its name."""
    unit = name.rpartition("_")[2]
    return METRICS.get(name) or Metric(name, name, unit=unit if unit in ("mm", "ml") else "")
