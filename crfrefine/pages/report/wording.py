"""Format the numbers of a metric for the page (a true minus, a dash for undefined), for charts, tables and tooltips alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crfrefine.metrics.registry import Metric, metric_named
from crfrefine.statistics.comparison import format_p
from crfrefine.statistics.paired import PairedComparison

UNDEFINED = "–"
_MINUS = "\u2212"


@dataclass(frozen=True)
class Wording:
    """A metric in words."""

    metric: Metric  # The metric.

    @property
    def axis(self) -> str:
        """The title with its unit, for an axis of values."""
        return _with_unit(self.metric.title, self.metric.unit)

    @property
    def difference_axis(self) -> str:
        """The same for an axis of differences."""
        return _with_unit("Difference", self.metric.difference_unit)

    @property
    def units(self) -> str:
        """Units of the numbers in a row of the summary."""
        unit, other = self.metric.unit, self.metric.difference_unit
        return unit if unit == other else f"differences in {other}"

    def number(self, value: float) -> str:
        """Return a value as displayed, without its unit."""
        return _typeset(self.metric.value_text(value))

    def quantity(self, value: float) -> str:
        """Return a value as displayed, with its unit."""
        return _quantity(self.number(value), self.metric.unit)

    def change(self, difference: float) -> str:
        """Return a difference as displayed, without its unit."""
        return _typeset(self.metric.difference_text(difference))

    def change_quantity(self, difference: float) -> str:
        """Return a difference as displayed, with its unit."""
        return _quantity(self.change(difference), self.metric.difference_unit)


def wording_of(metric: str) -> Wording:
    """Return the wording of a metric."""
    return Wording(metric_named(metric))


def interval_text(comparison: PairedComparison, wording: Wording) -> str:
    """Return the confidence interval of the mean difference."""
    low, high = comparison.interval
    if math.isnan(low):
        return UNDEFINED
    return f"{wording.change(low)} to {wording.change(high)}"


def effect_text(comparison: PairedComparison) -> str:
    """Return the effect size."""
    return UNDEFINED if math.isnan(comparison.effect_size) else f"{comparison.effect_size:+.2f}".replace("-", _MINUS)


def p_text(p_value: float) -> str:
    """Return a p value."""
    return format_p(p_value) or UNDEFINED


def _typeset(text: str) -> str:
    if not text:
        return UNDEFINED
    if float(text) == 0:
        text = text.lstrip("+-")  # no signed zero
    return text.replace("-", _MINUS)


def _quantity(number: str, unit: str) -> str:
    return f"{number} {unit}" if unit and number != UNDEFINED else number


def _with_unit(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title
