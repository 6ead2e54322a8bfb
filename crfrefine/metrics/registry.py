"""All metrics of the package: names, number formats, and which values are better.

A metric is computed by the method of its name: of masks in `MaskPair`, of probabilities in
`ReliabilitySums`; those of lesions are put together in `lesion_scores`. Nothing else lists metrics.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

Better = Literal["higher", "lower", "nearer_zero"]

RegionValues = dict[str, dict[str, float]]  # value of each metric, by region; NaN where undefined
# Differences of ratios are shown in points (hundredths); the ratios themselves from 0 to 1.
POINTS = 100.0
_ADVICE = {
    "higher": "higher is better",
    "lower": "lower is better",
    "nearer_zero": "nearer to zero is better",
    None: "only describes",
}


class Metric(NamedTuple):
    """A metric and its presentation."""

    name: str  # in files and tables
    title: str  # in headings and charts
    better: Better | None = None  # which values are better; None if it only describes
    unit: str = ""  # unit of its values; empty without one
    digits: int = 2  # decimals of a value
    is_ratio: bool = False  # values are from 0 to 1, and their differences are shown in points
    in_overview: bool = False  # shown by `evaluate` in the terminal; files and report show all
    in_training: bool = False  # measured by `train-crf` too, which shows those in the overview
    noun: str = ""  # name inside a sentence; empty: the title
    follows: str = ""  # metric that determines it: a loss in it is not reported again

    @property
    def in_text(self) -> str:
        """The name inside a sentence."""
        return self.noun or self.title

    @property
    def advice(self) -> str:
        """A phrase that says which values are better."""
        return _ADVICE[self.better]

    @property
    def difference_unit(self) -> str:
        """Displayed unit of differences."""
        return "points" if self.is_ratio else self.unit

    @property
    def large_loss(self) -> float:
        """A loss that matters in a single case: a point of a ratio or a score, 1 mm, 1 ml."""
        return 1.0 if self.unit else 1.0 / POINTS

    @property
    def difference_factor(self) -> float:
        """Factor from differences of values to the displayed numbers."""
        return POINTS if self.is_ratio else 1.0

    def gain_of(self, difference: float) -> float:
        """Return a difference of values, or of magnitudes, such that higher is better."""
        return difference if self.better == "higher" else -difference

    def value_text(self, value: float) -> str:
        """Return a value as displayed, without its unit; empty if undefined."""
        return _number(value, self.digits)

    def difference_text(self, difference: float, sign: str = "+") -> str:
        """Return a difference of two values as displayed, without its unit; empty if undefined.

        `sign` is "+" if positive differences have a sign.
        """
        digits = 2 if self.is_ratio else self.digits
        return _number(self.difference_factor * difference, digits, sign)

    def interval_text(self, low: float, high: float, sign: str = "+") -> str:
        """Return an interval of differences as displayed; empty if undefined."""
        if math.isnan(low):
            return ""
        return f"{self.difference_text(low, sign)} to {self.difference_text(high, sign)}"


def _number(value: float, digits: int, sign: str = "") -> str:
    """Return a number as displayed; empty if it is not finite."""
    if not math.isfinite(value):
        return ""
    return f"{value:{sign}.{digits}f}"


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


_ratio = partial(Metric, better="higher", digits=4, is_ratio=True)
_distance = partial(Metric, better="lower", unit="mm")
_difference = partial(Metric, better="nearer_zero", unit="ml")
_score = partial(Metric, better="lower", digits=5)

# The metric that the verdict is about.
DICE = _ratio("dice", "Dice", in_overview=True, in_training=True)
# A proper score, which only the true probabilities minimize.
NLL = _score("nll", "Negative log likelihood", noun="negative log likelihood")
# The metrics of masks, in the order of reports, as those of probabilities and of lesions below.
MASK_METRICS = _by_name(
    DICE,
    _ratio("iou", "IoU", follows="dice"),
    _ratio("sensitivity", "Sensitivity", noun="sensitivity", in_training=True),
    _ratio("precision", "Precision", noun="precision", in_training=True),
    Metric("volume_ml", "Volume", unit="ml"),
    _difference("volume_difference_ml", "Volume difference", noun="volume error", in_training=True),
    _ratio("surface_dice", "Surface Dice", noun="surface Dice", in_overview=True, in_training=True),
    _distance("hd_mm", "Hausdorff distance"),
    _distance("hd95_mm", "HD95", in_overview=True, in_training=True),
    _distance("assd_mm", "ASSD", digits=3, in_overview=True, in_training=True),
    Metric("num_components", "Components", digits=1),
)
CALIBRATION_METRICS = _by_name(
    _score("ece", "Calibration error (ECE)", noun="calibration error (ECE)", in_overview=True),
    _score("brier", "Brier score"),
    NLL,
)
_count = partial(Metric, digits=1)
_volume_ml = partial(Metric, better="lower", unit="ml", digits=3)
LESION_METRICS = _by_name(
    _count("lesions", "Lesions", noun="lesions"),
    _count("lesions_found", "Lesions found", "higher", noun="lesions found"),
    _count("lesions_missed", "Lesions missed", "lower", noun="lesions missed"),
    _count("lesions_false", "False lesions", "lower", noun="false lesions"),
    _ratio("lesion_sensitivity", "Lesion sensitivity", noun="lesion sensitivity"),
    _ratio("lesion_precision", "Lesion precision", noun="lesion precision"),
    _ratio("lesion_f1", "Lesion F1", noun="lesion F1"),
    _ratio("lesion_dice", "Lesion-wise Dice", noun="lesion-wise Dice"),
    _distance("lesion_hd95_mm", "Lesion-wise HD95", noun="lesion-wise HD95"),
    _ratio("rq", "Recognition quality", noun="recognition quality"),
    _ratio("sq", "Segmentation quality", noun="segmentation quality"),
    _ratio("pq", "Panoptic quality", noun="panoptic quality"),
    _volume_ml("false_positive_ml", "False-positive volume"),
    _volume_ml("false_negative_ml", "False-negative volume"),
    _volume_ml("absolute_volume_difference_ml", "Absolute volume difference"),
    _count("lesion_count_difference", "Lesion count difference", "lower"),
)
# Changes of the lesions of the baseline, which has no value of this kind itself.
LESION_CHANGES = _by_name(
    _count("lesions_lost", "Lesions lost"),
    _count("lesions_gained", "Lesions gained"),
    _count("lesions_made", "False lesions made"),
    _count("lesions_removed", "False lesions removed"),
)
METRICS = MASK_METRICS | CALIBRATION_METRICS | LESION_METRICS | LESION_CHANGES


def metric_named(name: str) -> Metric:
    """Return a metric by its name.

    An unknown one, from a table made elsewhere, only describes; its name ends with its unit.
    """
    if name in METRICS:
        return METRICS[name]
    _, _, unit = name.rpartition("_")
    if unit not in ("mm", "ml"):
        unit = ""
    return Metric(name, name, unit=unit)
