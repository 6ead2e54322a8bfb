"""The numbers of comparisons as people read them, in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from crfrefine.base.text import counted
from crfrefine.metrics.registry import DICE, metric_named
from crfrefine.statistics.comparison import Family, SummaryRow
from crfrefine.statistics.paired import PairedComparison

HARM_COLUMN = "over 1 point worse (worst)"  # Title of the column with `harm_text`.
# Titles of those with `comparison_texts`, after that of the difference.
COMPARISON_COLUMNS = ("95 % CI", "p (Holm)", "better/equal/worse", HARM_COLUMN)


def describe_families(rows: Iterable[SummaryRow]) -> str:
    """Say in one sentence over how many tests p values are corrected; empty without any."""
    sizes: dict[Family | None, int] = {}
    for row in rows:
        sizes[row.family] = max(row.family_size, sizes.get(row.family, 0))
    texts = [f"{family} ({counted(sizes[family], 'test')})" for family in Family if family in sizes]
    if not texts:
        return ""
    return (
        "Wilcoxon's signed-rank test, after Holm's correction within each method and family: "
        f"{', '.join(texts)}"
    )


def comparison_texts(row: SummaryRow) -> tuple[str, ...]:
    """Return the texts of a comparison for a table; five empty ones without a comparison.

    These are the difference, its interval, p after Holm, better/equal/worse and `harm_text`.
    """
    comparison = row.comparison
    if comparison is None:
        return ("",) * 5
    metric = metric_named(row.metric)
    return (
        metric.difference_text(comparison.mean_difference),
        metric.interval_text(*comparison.interval),
        format_p(row.p_adjusted),
        f"{comparison.wins}/{comparison.ties}/{comparison.losses}",
        harm_text(comparison, row.metric),
    )


def harm_text(
    comparison: PairedComparison,
    metric: str = DICE.name,
    *,
    with_name: bool = False,
    minus: str = "-",
) -> str:
    """Return the share of cases that lose more than a point, and the worst case.

    For a ratio it is such as "2.5% (-1.52)"; for other metrics, only the worst difference.
    """
    if comparison.num_pairs == 0:
        return ""
    if not comparison.worst:
        return "none"
    case, difference = comparison.worst[0]
    worst = metric_named(metric).difference_text(difference).replace("-", minus)
    if with_name:
        worst = f"{case} {worst}"
    if not metric_named(metric).is_ratio:
        return worst
    share = f"{100 * comparison.large_losses / comparison.num_pairs:.1f}".removesuffix(".0")
    return f"{share}% ({worst})"


def format_p(p_value: float) -> str:
    """Return a p value as people write it; empty if undefined.

    It has two digits from 0.001 on, and one below, such as "3e-12".
    """
    if math.isnan(p_value):
        return ""
    if p_value >= 0.001:
        return f"{p_value:.2g}"
    mantissa, exponent = f"{p_value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def points_text(difference: float, sign: str = "+") -> str:
    """Return a difference of Dice with its unit."""
    return f"{DICE.difference_text(difference, sign)} {DICE.difference_unit}"


def power_text(comparison: PairedComparison) -> str:
    """Return which true difference would have been found with a power of 80 %; empty if unknown."""
    if not 0.0 < comparison.detectable_difference < math.inf:
        return ""
    difference = points_text(comparison.detectable_difference, "")
    return (
        f"a true difference of {difference} would be found with probability 80 %, "
        "a smaller one less often"
    )


def wins_text(comparison: PairedComparison, p_value: float, correction: str = "") -> str:
    """Return p, and in how many cases the method is better; or worse, if these are more."""
    text = f"p {format_p(p_value)}{correction}, "
    num_cases = counted(comparison.num_pairs, "case")
    if comparison.wins >= comparison.losses:
        return f"{text}{comparison.wins} of {num_cases} better"
    return f"{text}{comparison.losses} of {num_cases} worse"
