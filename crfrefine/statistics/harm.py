"""Metrics that got worse, and the change of the probabilities, beside a verdict on Dice (rules: `docs/reference/metrics.md`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, DICE, NLL, metric_named
from crfrefine.statistics.comparison import MEAN, Family, SummaryRow, format_p
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
    significant: tuple[
        Decline, ...
    ]  # First metrics over the judged regions, then single regions in any metric.
    # Worse in more than half of the cases, but not significantly: metrics over the judged regions, and Dice in single regions.
    in_most_cases: tuple[Decline, ...]
    num_comparisons: int  # Number of comparisons that were made.

    @property
    def headline(self) -> str:
        """The names of what got significantly worse, for a sentence; empty if nothing did."""
        return _joined([decline.name for decline in _shown(self.significant)])


def find_harm(
    summary: Sequence[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None
) -> Harm:
    """Find the metrics in which a method is worse than its baseline, in the rows of `summarize`; tests are two-sided, of level ALPHA.

    The p values are those of the summary. Metrics that are a function of another one, and that of `judge_probabilities`, are left out.
    """
    significant: list[Decline] = []
    in_most_cases: list[Decline] = []
    tested = [
        row
        for family in (Family.OTHER_METRICS, Family.SINGLE_REGIONS)
        for row in summary
        if (row.method, row.family) == (method, family)
    ]
    for row in tested:
        comparison, is_overall, metric = (
            row.comparison,
            row.family == Family.OTHER_METRICS,
            metric_named(row.metric),
        )
        assert comparison is not None
        title = {MEAN: "the mean over regions", **(titles or {})}.get(row.region, row.region)
        # The sentence on the probabilities has the calibration over all labels, so that a calibration always names its region.
        name = (
            metric.in_text
            if is_overall and row.metric not in CALIBRATION_METRICS
            else f"{metric.in_text} of {title}"
        )
        decline = Decline(row.metric, row.region, name, is_overall, comparison, row.p_adjusted)
        # As a test of ranks is significant, so its direction is that of the ranks; smaller magnitudes are better.
        is_worse = (
            comparison.effect_size < 0 if metric.better == "higher" else comparison.effect_size > 0
        )
        if row.p_adjusted < ALPHA and is_worse:
            significant.append(decline)
        elif comparison.losses > comparison.num_pairs / 2 and (
            is_overall or row.metric == DICE.name
        ):
            in_most_cases.append(decline)
    sentence = (
        f"What got worse: {_figures(significant)}."
        if significant
        else "No other metric got significantly worse."
    )
    if not tested:
        sentence = "No other metric could be compared."
    if in_most_cases:
        sentence += f" Worse in most cases, but not significantly: {_figures(in_most_cases)}."
    return Harm(sentence, tuple(significant), tuple(in_most_cases), len(tested))


def _shown(declines: Sequence[Decline]) -> list[Decline]:
    """Leave out the single regions of a metric that is worse over the judged regions."""
    overall = {decline.metric for decline in declines if decline.is_overall}
    return [decline for decline in declines if decline.is_overall or decline.metric not in overall]


def _figures(declines: Sequence[Decline]) -> str:
    """Return the numbers of each decline that a sentence names."""
    texts = []
    for decline in _shown(declines):
        metric, comparison = metric_named(decline.metric), decline.comparison
        difference = f"{metric.difference_text(comparison.mean_difference)} {metric.difference_unit}".rstrip()
        p_value = f"p {format_p(decline.p_adjusted)}"
        texts.append(
            f"{decline.name} in {comparison.losses} of {comparison.num_pairs} cases ({difference} on average, {p_value})"
        )
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


@dataclass(frozen=True)
class ProbabilityChange:
    """The probabilities of a method, compared with those of its baseline."""

    change: Change  # For programs.
    sentence: str  # For users, with the numbers.
    region: str  # Whose probabilities they are: ALL_LABELS, MEAN or the only region.
    comparison: PairedComparison  # Method minus baseline, negative log likelihood.


def judge_probabilities(
    summary: Iterable[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None
) -> ProbabilityChange | None:
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
        if row.region == region and row.comparison is not None
    }
    deciding = compared[NLL.name]
    texts = {
        name: (
            metric.value_text(compared[name].mean_baseline),
            metric.value_text(compared[name].mean),
        )
        for name, metric in {NLL.name: NLL, **CALIBRATION_METRICS}.items()
        if name in compared
    }
    change = Change.NO_DIFFERENCE
    # Two programs round a softmax differently, and ranks do not know how little that is: the displayed means tell.
    if texts[NLL.name][0] != texts[NLL.name][1]:
        if smallest_p_value(deciding.num_pairs) > ALPHA:
            change = Change.TOO_FEW
        elif deciding.p_value < ALPHA:
            change = Change.BETTER if deciding.effect_size < 0 else Change.WORSE
    cases = f" (better in {deciding.wins} of {deciding.num_pairs} cases, p {format_p(deciding.p_value)})"
    figures = [
        f"{metric_named(name).in_text} {before} → {after}{cases if name == NLL.name else ''}"
        for name, (before, after) in texts.items()
    ]
    title = {ALL_LABELS: "all labels", MEAN: "the regions, on average", **(titles or {})}.get(
        region, region
    )
    words = {
        Change.NO_DIFFERENCE: "neither significantly better nor worse",
        Change.TOO_FEW: "too few cases to tell",
    }
    sentence = f"The probabilities of {title}: {words.get(change, change)}, {', '.join(figures)}."
    return ProbabilityChange(change, sentence, region, deciding)
