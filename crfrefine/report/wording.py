"""What metrics are called and how their numbers are written: the same in charts, tables and tooltips."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crfrefine.metrics.overlap import RATIOS, better_direction

UNDEFINED = "–"
_MINUS = "\u2212"


@dataclass(frozen=True)
class Wording:
    """A metric in words.

    Attributes:
        metric: its name in tables and files.
        title: what people call it.
        unit: of the numbers shown; empty where there is none.
        factor: from the values of tables to the numbers shown.
        decimals: digits after the point.
        advice: which values are better, in words.
    """

    metric: str
    title: str
    unit: str
    factor: float
    decimals: int
    advice: str

    @property
    def axis(self) -> str:
        """The title with its unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def number(self, value: float, *, signed: bool = False) -> str:
        """Return a value of the metric as it is shown, without its unit."""
        if not math.isfinite(value):
            return UNDEFINED
        text = f"{self.factor * value:{'+' if signed else ''}.{self.decimals}f}"
        if float(text) == 0:
            text = text.lstrip("+-")  # no signed zero
        return text.replace("-", _MINUS)

    def quantity(self, value: float, *, signed: bool = False) -> str:
        """Return a value of the metric as it is shown, with its unit."""
        text = self.number(value, signed=signed)
        return f"{text} {self.unit}" if self.unit and text != UNDEFINED else text


_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "Sensitivity",
    "precision": "Precision",
    "volume_ml": "Volume",
    "volume_difference_ml": "Volume difference",
    "surface_dice": "Surface Dice",
    "hd_mm": "Hausdorff distance",
    "hd95_mm": "HD95",
    "assd_mm": "ASSD",
    "num_components": "Pieces",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    "nll": "Negative log likelihood",
}
_ADVICE = {"higher": "higher is better", "lower": "lower is better", "nearer_zero": "nearer to zero is better", None: "only describes"}


def wording_of(metric: str) -> Wording:
    """Return a metric in words; one that is not known is called by its name."""
    advice = _ADVICE[better_direction(metric)]
    title = _TITLES.get(metric, metric)
    if metric in RATIOS:
        return Wording(metric, title, "points", 100.0, 2, advice)
    if metric == "num_components":
        return Wording(metric, title, "", 1.0, 1, advice)
    if metric in ("ece", "brier", "nll"):
        return Wording(metric, title, "", 1.0, 4, advice)
    unit = metric.rpartition("_")[2]
    return Wording(metric, title, unit if unit in ("mm", "ml") else "", 1.0, 2, advice)
