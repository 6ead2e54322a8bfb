"""Metrics that got worse, and the change of the probabilities, beside a verdict on Dice (rules: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, DICE, NLL, metric_named
from crfrefine.statistics.comparison import CORRECTED, MEAN, Family, SummaryRow, format_p
from crfrefine.statistics.paired import ALPHA, PairedComparison, smallest_p_value

_MAX_NAMED = 6


@dataclass(frozen=True)
class Decline:
    """A metric that got worse, over the judged regions or in one region."""

    metric: str
    region: str  # Name of the region, or MEAN.
    name: str  # Both in words, such as "sensitivity" for the mean over regions or "Dice of 2 posterior".
    is_overall: bool  # True if it is the mean over the judged regions, or the only judged region.
    comparison: PairedComparison  # Method minus baseline; `losses` cases are worse, `wins` better.
    p_adjusted: float  # Its p value in the summary, after Holm's correction over its family.


@dataclass(frozen=True)
class Harm:
    """The metrics that are worse than with the baseline, besides the mean Dice that decides the verdict."""

    sentence: str  # For users, with the numbers.
    significant: tuple[Decline, ...]  # First metrics over the judged regions, then single regions in any metric.
    # Worse in more than half of the cases, but not significantly: metrics over the judged regions, and Dice in single regions.
    in_most_cases: tuple[Decline, ...]
    num_comparisons: int  # Number of comparisons that were made.

    @property
    def headline(self) -> str:
        """The names of what got significantly worse, for a sentence; empty if nothing did."""
        return _joined([decline.name for decline in _shown(self.significant)]).removesuffix(",")


def find_harm(summary: Sequence[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None) -> Harm:
    """Find the metrics in which a method is worse than its baseline, in the rows of `summarize`; tests are two-sided, of level ALPHA.

    The p values are those of the summary: a comparison is shown by one number. A metric that is a function of another one is not
    repeated, and neither is the metric of `judge_probabilities`.
    """
    significant: list[Decline] = []
    in_most_cases: list[Decline] = []
    tested = [row for family in CORRECTED for row in summary if (row.method, row.family) == (method, family)]
    for row in tested:
        comparison, is_overall = row.comparison, row.family == Family.OTHER_METRICS
        assert comparison is not None
        decline = Decline(row.metric, row.region, _name(row, titles or {}), is_overall, comparison, row.p_adjusted)
        # As a test of ranks is significant, so its direction is that of the ranks.
        if row.p_adjusted < ALPHA and _sign(row.metric) * comparison.effect_size < 0:
            significant.append(decline)
        elif comparison.losses > comparison.num_pairs / 2 and (is_overall or row.metric == DICE.name):
            in_most_cases.append(decline)
    nor_dice = f", nor {DICE.title} in any region" if any(row.family == Family.SINGLE_REGIONS for row in tested) else ""
    if not tested:
        sentence = "No other metric could be compared."
    elif significant:
        sentence = f"What got worse: {_figures(significant)}."
    else:
        sentence = f"No other metric got {'significantly worse' if in_most_cases else 'worse in most cases'}{nor_dice}."
    if in_most_cases:
        sentence += f" Worse in most cases, but not significantly: {_figures(in_most_cases)}."
    return Harm(sentence, tuple(significant), tuple(in_most_cases), len(tested))


def _sign(metric: str) -> int:
    """Return 1 if larger differences are better, else -1; differences of magnitudes are better if they are smaller."""
    return 1 if metric_named(metric).better == "higher" else -1


def _name(row: SummaryRow, titles: Mapping[str, str]) -> str:
    """Return metric and region in words."""
    noun = _noun(row.metric)
    # The sentence on the probabilities has the same metrics over all labels, with other values.
    if row.metric in CALIBRATION_METRICS and row.region == MEAN:
        return f"{noun}, mean over regions,"
    if row.metric not in CALIBRATION_METRICS and row.family == Family.OTHER_METRICS:
        return noun
    return f"{noun} of {'the mean over regions' if row.region == MEAN else titles.get(row.region, row.region)}"


def _noun(metric: str) -> str:
    return metric_named(metric).noun or metric_named(metric).title


def _shown(declines: Sequence[Decline]) -> list[Decline]:
    """Leave out the single regions of a metric that is worse over the judged regions."""
    overall = {decline.metric for decline in declines if decline.is_overall}
    return [decline for decline in declines if decline.is_overall or decline.metric not in overall]


def _figures(declines: Sequence[Decline]) -> str:
    """Return the numbers of each decline that a sentence names."""
    texts: list[str] = []
    for decline in _shown(declines):
        metric, comparison = metric_named(decline.metric), decline.comparison
        figures = f"{metric.difference_text(comparison.mean_difference)} {metric.difference_unit}".rstrip() + " on average"
        if _sign(decline.metric) * comparison.mean_difference > 0:  # Many small losses and a few large gains.
            figures += ", which is better"
        if not math.isnan(decline.p_adjusted):
            figures += f", p {format_p(decline.p_adjusted)}"
        unit = "" if texts else " cases"
        texts.append(f"{decline.name} in {comparison.losses} of {comparison.num_pairs}{unit} ({figures})")
    return _joined(texts)


def _joined(names: Sequence[str]) -> str:
    """Join names; of many, only the first ones."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


class Change(StrEnum):
    """The change of the probabilities, for programs."""

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
    compared = {row.metric: row.comparison for row in rows if row.region == region and row.comparison is not None}
    deciding = compared[NLL.name]
    before, after = NLL.value_text(deciding.mean_baseline), NLL.value_text(deciding.mean)
    title = {ALL_LABELS: "all labels", MEAN: "the regions, on average,", **(titles or {})}.get(region, region)
    # Two programs round a softmax differently, and ranks do not know how little that is: the displayed means tell.
    if before == after:
        sentence = f"The probabilities of {title} are as good as before: {NLL.noun} {after} with both."
        return ProbabilityChange(Change.NO_DIFFERENCE, sentence, region, deciding)
    if smallest_p_value(deciding.num_pairs) > ALPHA:
        change = Change.TOO_FEW
    elif deciding.p_value < ALPHA:
        change = Change.BETTER if deciding.effect_size < 0 else Change.WORSE
    else:
        change = Change.NO_DIFFERENCE
    cases = f"better in {deciding.wins} of {deciding.num_pairs} cases, p {format_p(deciding.p_value)}"
    figures = [f"{NLL.noun} {before} → {after} ({cases})"]
    for name, metric in CALIBRATION_METRICS.items():
        if name in compared and name != NLL.name:
            means = metric.value_text(compared[name].mean_baseline), metric.value_text(compared[name].mean)
            figures.append(f"{_noun(name)} {means[0]} → {means[1]}")
    return ProbabilityChange(change, f"{_WORDS[change].format(title)}: {', '.join(figures)}.", region, deciding)
