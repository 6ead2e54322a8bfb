"""Metrics that got worse, and what became of the probabilities, beside a verdict on Dice (rules: `docs/reference/metrics.md`)."""

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
    is_overall: bool  # Whether it is the mean over the judged regions, or the only judged region.
    comparison: PairedComparison  # Method minus baseline; `losses` cases are worse, `wins` better.
    p_adjusted: float  # Its p value in the summary, after Holm's correction over its family.


@dataclass(frozen=True)
class Harm:
    """What got worse in comparison with the baseline, besides the mean Dice that decides the verdict."""

    sentence: str  # For users, with the numbers.
    # What got significantly worse: first the other metrics over the judged regions, then single regions in any metric.
    significant: tuple[Decline, ...]
    # What got worse in more than half of the cases, but not significantly: other metrics over the judged regions, and Dice in single
    # regions.
    in_most_cases: tuple[Decline, ...]
    num_comparisons: int  # Number of comparisons that were made.

    @property
    def headline(self) -> str:
        """The names of what got significantly worse, for a sentence; empty if nothing did."""
        return _joined([decline.name for decline in _told(self.significant)])


def find_harm(
    summary: Sequence[SummaryRow],
    method: str,
    *,
    titles: Mapping[str, str] | None = None,
) -> Harm:
    """Find the metrics in which a method is worse than its baseline, in the rows of `summarize`; tests are two-sided, of level ALPHA.

    The p values are those of the summary: a comparison is shown by one number. A metric that is a function of another one is not
    repeated, and neither is the metric of `judge_probabilities`.
    """
    significant: list[Decline] = []
    in_most_cases: list[Decline] = []
    sizes = dict.fromkeys(CORRECTED, 0)
    tested = [row for family in CORRECTED for row in summary if row.method == method and row.family == family]
    for row in tested:
        comparison, is_overall = row.comparison, row.family == Family.OTHER_METRICS
        assert comparison is not None
        assert row.family is not None
        sizes[row.family] += 1
        name = _name(row, is_overall=is_overall, titles=titles or {})
        decline = Decline(row.metric, row.region, name, is_overall, comparison, row.p_adjusted)
        # As a test of ranks is significant, so its direction is that of the ranks.
        if row.p_adjusted < ALPHA and _sign(row.metric) * comparison.effect_size < 0:
            significant.append(decline)
        elif comparison.losses > comparison.num_pairs / 2 and (is_overall or row.metric == DICE.name):
            in_most_cases.append(decline)
    sentence = _sentence(significant, in_most_cases, sizes)
    return Harm(sentence, tuple(significant), tuple(in_most_cases), sum(sizes.values()))


def _sign(metric: str) -> int:
    """Return 1 if larger differences are better, else -1; differences of magnitudes are better if they are smaller."""
    return 1 if metric_named(metric).better == "higher" else -1


def _name(row: SummaryRow, *, is_overall: bool, titles: Mapping[str, str]) -> str:
    metric = metric_named(row.metric)
    noun = metric.noun or metric.title
    # The sentence on the probabilities has the same metrics over all labels, with other values.
    if row.region == MEAN and row.metric in CALIBRATION_METRICS:
        return f"{noun}, mean over regions,"
    if is_overall and row.metric not in CALIBRATION_METRICS:
        return noun
    region = "the mean over regions" if row.region == MEAN else titles.get(row.region, row.region)
    return f"{noun} of {region}"


def _told(declines: Sequence[Decline]) -> list[Decline]:
    """Return the rows that a sentence names: for a metric that is worse over the judged regions, not the single regions too."""
    overall = {decline.metric for decline in declines if decline.is_overall}
    return [decline for decline in declines if decline.is_overall or decline.metric not in overall]


def _sentence(significant: Sequence[Decline], in_most_cases: Sequence[Decline], sizes: Mapping[Family, int]) -> str:
    if not any(sizes.values()):
        return "No other metric could be compared."
    nor_dice = f", nor {DICE.title} in any region" if sizes[Family.SINGLE_REGIONS] else ""
    if not significant and not in_most_cases:
        return f"No other metric got worse in most cases{nor_dice}."
    parts = [f"What got worse: {_listed(significant)}." if significant else f"No other metric got significantly worse{nor_dice}."]
    if in_most_cases:
        parts.append(f"Worse in most cases, but not significantly: {_listed(in_most_cases)}.")
    return " ".join(parts)


def _listed(declines: Sequence[Decline]) -> str:
    told = _told(declines)
    return _joined([_figures(decline, " cases" if decline is told[0] else "") for decline in told])


def _figures(decline: Decline, unit: str) -> str:
    metric, comparison = metric_named(decline.metric), decline.comparison
    change = f"{metric.difference_text(comparison.mean_difference)} {metric.difference_unit}".rstrip()
    # Many small losses and a few large gains.
    odd = ", which is better" if _sign(decline.metric) * comparison.mean_difference > 0 else ""
    p_value = "" if math.isnan(decline.p_adjusted) else f", p {format_p(decline.p_adjusted)}"
    return f"{decline.name} in {comparison.losses} of {comparison.num_pairs}{unit} ({change} on average{odd}{p_value})"


def _joined(names: Sequence[str]) -> str:
    """Join names; of many, only the first ones."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


# The probabilities: whether they got better or worse.


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
    deciding = compared[NLL.name]
    change = _change(deciding)
    title = {ALL_LABELS: "all labels", MEAN: "the regions, on average,", **(titles or {})}.get(region, region)
    if _is_same(deciding):
        sentence = f"The probabilities of {title} are as good as before: {NLL.noun} {NLL.value_text(deciding.mean)} with both."
        return ProbabilityChange(change, sentence, region, deciding)
    names = sorted((name for name in CALIBRATION_METRICS if name in compared), key=lambda name: name != NLL.name)
    figures = ", ".join(_means(name, compared[name]) for name in names)
    return ProbabilityChange(change, f"{_WORDS[change].format(title)}: {figures}.", region, deciding)


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
    return NLL.value_text(comparison.mean) == NLL.value_text(comparison.mean_baseline)


def _means(name: str, comparison: PairedComparison) -> str:
    """Return the means of baseline and method; of the deciding metric with the cases and the p value."""
    metric = metric_named(name)
    means = f"{metric.noun or metric.title} {metric.value_text(comparison.mean_baseline)} → {metric.value_text(comparison.mean)}"
    if name != NLL.name:
        return means
    return f"{means} (better in {comparison.wins} of {comparison.num_pairs} cases, p {format_p(comparison.p_value)})"
