"""The metrics that got worse, and how probabilities changed (`docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crfrefine.base.text import counted
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, DICE, NLL, Metric, metric_named
from crfrefine.statistics.comparison import MEAN, Family, SummaryRow
from crfrefine.statistics.paired import ALPHA, PairedComparison, smallest_p_value
from crfrefine.statistics.texts import format_p

_MAX_NAMED = 6
# Differences of a softmax in float32, relative to a negative log likelihood.
_ROUNDING_OF_SOFTMAX = 1e-5


@dataclass(frozen=True)
class Decline:
    """A metric that got worse, over the judged regions or in one region."""

    metric: str
    region: str  # name of the region, or MEAN
    # Both in words, such as "sensitivity" for the mean over regions, or "Dice of 2 posterior".
    name: str
    is_overall: bool  # whether it is the mean over the judged regions, or the only judged region
    comparison: PairedComparison  # method minus baseline; `losses` cases are worse, `wins` better
    p_adjusted: float  # its p value in the summary, after Holm's correction over its family

    @property
    def is_significant(self) -> bool:
        """True if the test says that the metric is worse."""
        # A test of ranks is significant, so the ranks tell its direction.
        gain = metric_named(self.metric).gain_of(self.comparison.effect_size)
        return self.p_adjusted < ALPHA and gain < 0

    @property
    def is_better_on_average(self) -> bool:
        """True if the mean is better although cases are worse, by more than it is rounded."""
        metric = metric_named(self.metric)
        gain = metric.gain_of(self.comparison.mean_difference)
        return gain > 0 and metric.difference_text(gain) != metric.difference_text(0.0)

    @property
    def is_in_most_cases(self) -> bool:
        """True if more than half of the cases are worse."""
        return self.comparison.losses > self.comparison.num_pairs / 2


@dataclass(frozen=True)
class Harm:
    """The metrics that are worse than with the baseline, besides the Dice of the verdict."""

    sentence: str  # for users, with the numbers
    # First metrics over the judged regions, then single regions in any metric.
    significant: tuple[Decline, ...]
    # Worse in more than half of the cases, but not significantly: metrics over the judged regions,
    # and Dice in single regions.
    in_most_cases: tuple[Decline, ...]
    num_comparisons: int  # number of comparisons that were made

    @property
    def where(self) -> str:
        """Words for the cases of `in_most_cases`, such as "in the only case"."""
        return _where(self.in_most_cases)

    @property
    def headline(self) -> str:
        """The names of what got significantly worse, for a sentence; empty if nothing did."""
        return _joined([decline.name for decline in _shown(self.significant)])


def find_harm(
    summary: Sequence[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None
) -> Harm:
    """Find the metrics in which a method is worse than its baseline.

    Tests are two-sided, of level ALPHA. They leave out metrics that follow from another one, and
    the metric that `judge_probabilities` tests.

    Args:
        summary: rows of `summarize`, whose p values count.
        method: the method.
        titles: names of regions for people.
    """
    known_titles = {MEAN: "the mean over regions", **(titles or {})}
    significant = []
    in_most_cases = []
    num_comparisons = 0
    for family in (Family.OTHER_METRICS, Family.SINGLE_REGIONS):
        for row in summary:
            if (row.method, row.family) != (method, family):
                continue
            num_comparisons += 1
            assert row.comparison is not None
            is_overall = family == Family.OTHER_METRICS
            name = metric_named(row.metric).in_text
            # A calibration always names its region: another sentence has the one over all labels.
            if not is_overall or row.metric in CALIBRATION_METRICS:
                name = f"{name} of {known_titles.get(row.region, row.region)}"
            candidate = Decline(
                row.metric, row.region, name, is_overall, row.comparison, row.p_adjusted
            )
            if candidate.is_significant:
                significant.append(candidate)
            elif candidate.is_in_most_cases and (is_overall or row.metric == DICE.name):
                in_most_cases.append(candidate)

    sentence = "No other metric got significantly worse."
    if num_comparisons == 0:
        sentence = "No other metric could be compared."
    if significant:
        sentence = f"What got worse: {_figures(significant)}."
    if in_most_cases:
        sentence += f" Worse {_where(in_most_cases)}: {_figures(in_most_cases)}."
    return Harm(sentence, tuple(significant), tuple(in_most_cases), num_comparisons)


def _where(declines: Sequence[Decline]) -> str:
    """Return words for the cases in which metrics are worse, but not significantly."""
    num_cases = max((decline.comparison.num_pairs for decline in declines), default=0)
    if num_cases == 1:
        return "in the only case, which is no evidence for others"
    if smallest_p_value(num_cases) > ALPHA:
        return "in most cases, which are too few for a test"
    return "in most cases, but not significantly"


def _shown(declines: Sequence[Decline]) -> list[Decline]:
    """Leave out the single regions of a metric that is worse over the judged regions."""
    overall = {decline.metric for decline in declines if decline.is_overall}
    return [decline for decline in declines if decline.is_overall or decline.metric not in overall]


def _figures(declines: Sequence[Decline]) -> str:
    """Return the numbers of each decline that a sentence names."""
    texts = []
    for decline in _shown(declines):
        metric = metric_named(decline.metric)
        comparison = decline.comparison
        difference = metric.difference_text(comparison.mean_difference)
        if metric.difference_unit:
            difference += f" {metric.difference_unit}"
        if comparison.num_pairs == 1:
            texts.append(f"{decline.name} ({difference})")
            continue
        average = f"{difference} on average"
        if decline.is_better_on_average:
            average = f"but better on average, {difference}"
        texts.append(
            f"{decline.name} in {comparison.losses} of {comparison.num_pairs} cases "
            f"({average}, p {format_p(decline.p_adjusted)})"
        )
    return _joined(texts)


def _joined(names: Sequence[str]) -> str:
    """Join names; of many, only the first ones."""
    text = ", ".join(names[:_MAX_NAMED])
    if len(names) > _MAX_NAMED:
        text += f" and {len(names) - _MAX_NAMED} more"
    return text


class Change(StrEnum):
    """The change of the probabilities, for programs."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference"
    TOO_FEW = "too few cases"


@dataclass(frozen=True)
class ProbabilityChange:
    """The probabilities of a method, compared with those of its baseline."""

    change: Change  # for programs
    sentence: str  # for users, with the numbers
    region: str  # whose probabilities they are: ALL_LABELS, MEAN or the only region
    comparison: PairedComparison  # method minus baseline, negative log likelihood


def judge_probabilities(
    summary: Iterable[SummaryRow], method: str, *, titles: Mapping[str, str] | None = None
) -> ProbabilityChange | None:
    """Judge whether the probabilities of a method are better than those of its baseline.

    The test is on the negative log likelihood over all labels, or on its mean over overlapping
    regions; this row of the summary is tested by itself. Returns None if no case has
    probabilities of both methods.
    `titles` are names of regions for people.
    """
    region = None
    compared = {}
    for row in summary:
        if row.method == method and row.comparison is not None:
            compared[row.metric, row.region] = row.comparison
            if row.family == Family.PROBABILITIES:
                region = row.region
    if region is None:
        return None
    deciding = compared[NLL.name, region]
    change = Change.WORSE
    # Programs round a softmax differently, and ranks ignore how small such differences are. Equal
    # displayed means therefore count as no difference.
    if NLL.value_text(deciding.mean) == NLL.value_text(deciding.mean_baseline):
        change = Change.NO_DIFFERENCE
    elif smallest_p_value(deciding.num_pairs) > ALPHA:
        change = Change.TOO_FEW
    elif deciding.p_value >= ALPHA:
        change = Change.NO_DIFFERENCE
    elif deciding.effect_size < 0:
        change = Change.BETTER

    conclusion = _CONCLUSIONS.get(change, change)
    figures = [_means_text(NLL, deciding)]
    spread = deciding.standard_deviation if deciding.num_pairs > 1 else 0.0
    largest = math.hypot(deciding.mean_difference, spread)
    if largest <= _ROUNDING_OF_SOFTMAX * deciding.mean_baseline:
        conclusion = f"unchanged up to rounding in {counted(deciding.num_pairs, 'case')}"
    else:
        cases = f"better in {deciding.wins} of {counted(deciding.num_pairs, 'case')}"
        figures[0] += f" ({cases}, p {format_p(deciding.p_value)})"
    for metric in CALIBRATION_METRICS.values():
        if metric is not NLL and (metric.name, region) in compared:
            figures.append(_means_text(metric, compared[metric.name, region]))
    known_titles = {ALL_LABELS: "all labels", MEAN: "the regions, on average", **(titles or {})}
    title = known_titles.get(region, region)
    sentence = f"The probabilities of {title}: {conclusion}, {', '.join(figures)}."
    return ProbabilityChange(change, sentence, region, deciding)


_CONCLUSIONS = {
    Change.NO_DIFFERENCE: "neither significantly better nor worse",
    Change.TOO_FEW: "too few cases to tell",
}


def _means_text(metric: Metric, comparison: PairedComparison) -> str:
    """Return the means of the baseline and the method, with the name of the metric."""
    before = metric.value_text(comparison.mean_baseline)
    after = metric.value_text(comparison.mean)
    return f"{metric.in_text} {before} → {after}"
