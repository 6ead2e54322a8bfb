"""Metrics that got worse, beside a verdict that only looks at Dice. `docs/reference/metrics.md` has the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crfrefine.metrics.registry import CALIBRATION_METRICS, DICE, metric_named
from crfrefine.statistics.comparison import CORRECTED, MEAN, Family, SummaryRow, format_p
from crfrefine.statistics.paired import ALPHA, PairedComparison

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
        names = [decline.name for decline in _told(self.significant)]
        return _joined(names, last=" and ")


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
    return _joined([_figures(decline, " cases" if decline is told[0] else "") for decline in told], last=", ")


def _figures(decline: Decline, unit: str) -> str:
    metric, comparison = metric_named(decline.metric), decline.comparison
    change = f"{metric.difference_text(comparison.mean_difference)} {metric.difference_unit}".rstrip()
    # Many small losses and a few large gains.
    odd = ", which is better" if _sign(decline.metric) * comparison.mean_difference > 0 else ""
    p_value = "" if math.isnan(decline.p_adjusted) else f", p {format_p(decline.p_adjusted)}"
    return f"{decline.name} in {comparison.losses} of {comparison.num_pairs}{unit} ({change} on average{odd}{p_value})"


def _joined(names: Sequence[str], *, last: str) -> str:
    """Join names; of many, only the first ones."""
    if len(names) > _MAX_NAMED:
        return ", ".join(names[:_MAX_NAMED]) + f" and {len(names) - _MAX_NAMED} more"
    return ", ".join(names) if last == ", " or len(names) < 2 else ", ".join(names[:-1]) + last + names[-1]
