"""Whether probabilities got better or worse, beside a verdict that only looks at Dice. `docs/reference/metrics.md` has the rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, NLL, metric_named
from crfrefine.statistics.comparison import MEAN, Family, SummaryRow, format_p
from crfrefine.statistics.paired import ALPHA, PairedComparison, smallest_p_value

ENDPOINT = NLL.name
"""The deciding metric."""


class Change(StrEnum):
    """What happened to the probabilities, for programs."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference"
    TOO_FEW = "too few cases"


_WORDS = {
    Change.BETTER: "The probabilities of {} got better",
    Change.WORSE: "The probabilities of {} got worse",
    Change.NO_DIFFERENCE: "The probabilities of {} got neither significantly better nor worse",
    Change.TOO_FEW: "Too few cases to tell whether the probabilities of {} got better",
}


@dataclass(frozen=True)
class ProbabilityChange:
    """The probabilities of a method, compared with those of its baseline."""

    change: Change  # For programs.
    sentence: str  # For users, with the numbers.
    region: str  # Whose probabilities they are: ALL_LABELS, MEAN or the only region.
    comparison: PairedComparison  # Method minus baseline, negative log likelihood.


def judge_probabilities(summary: Iterable[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None) -> ProbabilityChange | None:
    """Judge whether the probabilities of a method are better than those of its baseline; None if no case has both.

    The test is on the negative log likelihood over all labels; of overlapping regions, on its mean over the regions: the row of the summary
    that is tested by itself. `titles` are names of regions for people.
    """
    rows = [row for row in summary if row.method == method]
    region = next((row.region for row in rows if row.family == Family.PROBABILITIES), None)
    if region is None:
        return None
    compared = {
        row.metric: row.comparison
        for row in rows
        if row.region == region and row.metric in CALIBRATION_METRICS and row.comparison is not None
    }
    deciding = compared[ENDPOINT]
    change = _change(deciding)
    title = {ALL_LABELS: "all labels", MEAN: "the regions, on average,", **(titles or {})}.get(region, region)
    if _is_same(deciding):
        same = f"{metric_named(ENDPOINT).noun} {metric_named(ENDPOINT).value_text(deciding.mean)} with both"
        return ProbabilityChange(change, f"The probabilities of {title} are as good as before: {same}.", region, deciding)
    others = [name for name in CALIBRATION_METRICS if name != ENDPOINT and name in compared]
    figures = [_figures(name, compared[name]) for name in (ENDPOINT, *others)]
    return ProbabilityChange(change, f"{_WORDS[change].format(title)}: {', '.join(figures)}.", region, deciding)


def _change(comparison: PairedComparison) -> Change:
    if _is_same(comparison):
        return Change.NO_DIFFERENCE
    if smallest_p_value(comparison.num_pairs) > ALPHA:
        return Change.TOO_FEW
    if not comparison.p_value < ALPHA:
        return Change.NO_DIFFERENCE
    return Change.BETTER if comparison.effect_size < 0 else Change.WORSE


def _is_same(comparison: PairedComparison) -> bool:
    """Return whether the means agree as displayed: two programs round a softmax differently, and ranks do not know how little that is."""
    metric = metric_named(ENDPOINT)
    return metric.value_text(comparison.mean) == metric.value_text(comparison.mean_baseline)


def _figures(name: str, comparison: PairedComparison) -> str:
    """Return the means of baseline and method; of the deciding metric with the cases and the p value."""
    metric = metric_named(name)
    means = f"{metric.noun or metric.title} {metric.value_text(comparison.mean_baseline)} → {metric.value_text(comparison.mean)}"
    if name != ENDPOINT:
        return means
    return f"{means} (better in {comparison.wins} of {comparison.num_pairs} cases, p {format_p(comparison.p_value)})"
