"""The verdict whether a method helps: one plain sentence and its numbers. `docs/reference/metrics.md` has the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.registry import DICE
from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow, format_p
from crfrefine.statistics.harm import Harm, find_harm
from crfrefine.statistics.paired import NUM_RESAMPLES, PairedComparison, compare_pairs, holm
from crfrefine.statistics.probabilities import Change, ProbabilityChange, judge_probabilities
from crfrefine.statistics.wilcoxon import smallest_p_value

_METRIC = DICE
ENDPOINT = _METRIC.name
"""The deciding metric: its mean over the regions of each case."""

_MAX_NAMED = 10
_DO_NOT_USE = "Advice: do not use it."


class Outcome(StrEnum):
    """The verdict, for programs."""

    HELPS = "helps"
    NOT_BETTER_THAN_SIMPLE = "not better than simple"
    NO_DIFFERENCE = "no difference"
    MIXED = "mixed"
    HURTS = "hurts"
    TOO_FEW = "too few cases"
    NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Rival:
    """Another method, often a simple one, that the judged one must beat to be worth using.

    Attributes:
        name: of the rival.
        comparison: the judged method minus the rival; without pairs if no case has both.
        gain: its mean Dice minus the baseline's; NaN without a case that both have.
        p_adjusted: its p value after Holm's correction over the rivals; NaN without pairs.
        is_beaten: whether the judged method is significantly better.
    """

    name: str
    comparison: PairedComparison
    gain: float
    p_adjusted: float
    is_beaten: bool


@dataclass(frozen=True)
class Verdict:
    """The verdict.

    Attributes:
        outcome: for programs.
        sentence: for users.
        method: the judged method.
        baseline: the method that it should improve.
        regions: the regions over which Dice was averaged.
        comparison: method minus baseline, mean Dice. This one question is tested by itself, so its p value is also that of the summary.
        alpha: the level that p values were compared with.
        rivals: the methods that it should beat as well.
        notes: further facts that the reader must know, one sentence each, such as cases left out.
        harm: what got worse besides; None if no other metric was looked at.
        probabilities: whether the probabilities got better or worse; None if they were not measured.
    """

    outcome: Outcome
    sentence: str
    method: str
    baseline: str
    regions: tuple[str, ...]
    comparison: PairedComparison
    alpha: float
    rivals: tuple[Rival, ...]
    notes: tuple[str, ...]
    harm: Harm | None = None
    probabilities: ProbabilityChange | None = None

    @property
    def num_rivals(self) -> int:
        """Size of the family of Holm's correction over the rivals: those that have a case in common with the method."""
        return sum(rival.comparison.num_pairs > 0 for rival in self.rivals)

    def to_dict(self) -> dict[str, Any]:
        """Return it for a JSON file: plain types, None for an undefined or infinite number."""
        plain: dict[str, Any] = without_nonfinite(asdict(self) | {"outcome": self.outcome.value, "p_adjusted": self.comparison.p_value})
        return plain


def verdict(
    table: ResultTable,
    method: str,
    baseline: str,
    *,
    rivals: Sequence[str] = (),
    unmeasured: Sequence[str] = (),
    rivals_are_simple: bool = True,
    regions: Sequence[str] | None = None,
    subject: str | None = None,
    summary: Sequence[SummaryRow] | None = None,
    titles: Mapping[str, str] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Verdict:
    """Judge whether a method improves on a baseline, and on simple rivals.

    The question about the baseline is tested by itself, and only if its answer is yes are the rivals looked at, with Holm's correction
    over these.

    Args:
        table: the measurements, with Dice.
        method: to be judged.
        baseline: the result without the method, such as the network.
        rivals: methods that the judged one should beat, such as a recalibration or the largest component.
        unmeasured: rivals without any case in the table; they count as not beaten.
        rivals_are_simple: whether to call the rivals simple methods, and prefer a rival that is not beaten.
        regions: whose mean Dice decides; default: all.
        subject: name of the method in the sentence; default: its name.
        summary: rows of `summarize` with the same baseline and the mean over the same regions: what got worse, and whether the
            probabilities got better, is looked up there. Default: no other metric is looked at.
        titles: displayed name of each region; default: its name.
        alpha: level of the two-sided tests.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        InputError: a name that is not in the table, or a rival that is the method itself or the baseline.
    """
    if method == baseline or {method, baseline} & set(rivals) or len(set(rivals)) < len(rivals):
        raise InputError(f"the method {method!r}, the baseline {baseline!r} and the rivals {', '.join(map(repr, rivals))} must differ")
    options: dict[str, Any] = {"regions": regions, "seed": seed, "num_resamples": num_resamples}
    primary = table.compare(method, baseline, MEAN, ENDPOINT, **options)
    nothing = [math.nan] * len(table.cases)
    found = [table.compare(method, rival, MEAN, ENDPOINT, **options) for rival in rivals]
    found += [compare_pairs(nothing, nothing, cases=table.cases) for _ in unmeasured]
    judged = tuple(
        Rival(name, comparison, _gain(table, name, baseline, regions), p_adjusted, _direction(comparison, p_adjusted, alpha) == 1)
        for name, comparison, p_adjusted in zip(
            (*rivals, *unmeasured), found, holm([comparison.p_value for comparison in found]), strict=True
        )
    )
    chosen = table.regions if regions is None else tuple(regions)
    notes = _notes(table, method, baseline, chosen, primary, judged)
    harm = None if summary is None else find_harm(summary, method, titles=titles, alpha=alpha)
    probabilities = None if summary is None else judge_probabilities(summary, method, titles=titles, alpha=alpha)
    outcome, sentence = _decide(subject or method, baseline, primary, alpha)
    if outcome == Outcome.HELPS:
        if not all(rival.is_beaten for rival in judged):
            outcome = Outcome.NOT_BETTER_THAN_SIMPLE
        sentence += _against_rivals(subject or method, primary, judged, alpha, are_simple=rivals_are_simple)
        sentence += _but(harm, probabilities, baseline)
    return Verdict(outcome, sentence, method, baseline, chosen, primary, alpha, judged, notes, harm, probabilities)


def not_tested(method: str, baseline: str, regions: Sequence[str], reason: str, *, alpha: float = 0.05) -> Verdict:
    """Return the verdict on a method that was not measured in every case; `reason` is the rest of a sentence."""
    return Verdict(Outcome.NOT_TESTED, f"Not tested: {reason}.", method, baseline, tuple(regions), compare_pairs([], []), alpha, (), ())


def power_text(difference: str) -> str:
    """Return the meaning of a power of 80 % for the detectable difference, a quantity in words."""
    return f"a true difference of {difference} would be found with probability 80 %, a smaller one less often"


def _direction(comparison: PairedComparison, p_adjusted: float, alpha: float) -> int | None:
    """Return 1 for better, -1 for worse, 0 for no significant difference, None if test and mean disagree.

    The test uses ranks: with many small gains and a few large losses it can be significant although the mean is not.
    """
    if not p_adjusted < alpha:
        return 0
    low, high = comparison.interval
    if comparison.effect_size > 0 and low > 0:
        return 1
    if comparison.effect_size < 0 and high < 0:
        return -1
    return None


def _gain(table: ResultTable, rival: str, baseline: str, regions: Sequence[str] | None) -> float:
    """Return the mean difference between a rival and the baseline, over the cases that both have."""
    if rival not in table.methods:
        return math.nan
    values, others = table.means(ENDPOINT, [rival, baseline], regions)
    gains = (values - others)[~np.isnan(values - others)]
    return float(gains.mean()) if gains.size else math.nan


def _decide(subject: str, baseline: str, primary: PairedComparison, alpha: float) -> tuple[Outcome, str]:
    """Return the answer, and sentences; the first is the answer in words."""
    count = primary.num_pairs
    if count and primary.ties == count:
        everywhere = "the only case" if count == 1 else f"all {count} cases"
        return Outcome.NO_DIFFERENCE, f"No difference. The mean {_METRIC.title} is the same in {everywhere}. {_DO_NOT_USE}"
    if smallest_p_value(count) > alpha:
        return Outcome.TOO_FEW, _too_few(primary, alpha)
    direction = _direction(primary, primary.p_value, alpha)
    change = f"Mean {_METRIC.title} {_quantity(primary.mean_difference)} against {baseline} ({_figures(primary)})"
    if direction is None:
        return Outcome.MIXED, _mixed(primary, change)
    named = subject[0].upper() + subject[1:] if subject.startswith("the ") else subject
    if direction == 0:
        power = power_text(_quantity(primary.detectable_difference, ""))
        parts = [f"{named} is not shown to help. {change}, no significant difference."]
        if primary.interval[0] > 0 or primary.interval[1] < 0:
            parts.append("The interval of the mean excludes 0, but the test of ranks decides.")
        return Outcome.NO_DIFFERENCE, " ".join([*parts, f"{power[0].upper()}{power[1:]}.", _DO_NOT_USE])
    if direction < 0:
        return Outcome.HURTS, f"{named} hurts. {change}. {_DO_NOT_USE}"
    return Outcome.HELPS, f"{named} helps. {change}."


def _against_rivals(subject: str, primary: PairedComparison, rivals: Sequence[Rival], alpha: float, *, are_simple: bool) -> str:
    """Return how a method that helps compares with its rivals, as further sentences."""
    compared = [rival for rival in rivals if rival.comparison.num_pairs]
    missing = [rival.name for rival in rivals if not rival.comparison.num_pairs]
    kind = ("simple method" if are_simple else "other method") + (" that could be compared" if missing else "")
    # Of those that are not beaten, if there are any, the strongest.
    strongest = min(compared, key=lambda rival: (rival.is_beaten, rival.comparison.mean_difference), default=None)
    parts = []
    if strongest is not None:
        direction = _direction(strongest.comparison, strongest.p_adjusted, alpha)
        corrected = f" after Holm over {len(compared)} rivals" if len(compared) > 1 else ""
        gains = f"{subject} {_METRIC.difference_text(primary.mean_difference)}, {strongest.name} {_quantity(strongest.gain)}"
        p_text = f"(p {format_p(strongest.p_adjusted)}{corrected}, {_better_cases(strongest.comparison)})"
        advice = f" Advice: prefer {strongest.name}, it is simpler." if are_simple else ""
        if direction == 1:
            parts.append(f"It gains more than every {kind}, the best of which is {strongest.name}: {gains} {p_text}.")
        elif direction == -1:
            parts.append(f"But {strongest.name} gains more: {gains} {p_text}.{advice}")
        elif len(compared) * smallest_p_value(strongest.comparison.num_pairs) > alpha:
            needed = _fewest_cases(alpha / len(compared))
            parts.append(f"Too few cases to tell whether it gains more than {strongest.name}: {gains} {p_text}; {needed} are needed.")
        else:
            what = "the difference is not significant" if direction == 0 else "the mean and the ranks of the difference disagree"
            parts.append(f"But not shown to gain more than {strongest.name}: {gains}; {what} {p_text}.{advice}")
    if missing:
        parts.append(f"No case allows a comparison with {' or '.join(missing)}.")
    return "".join(f" {part}" for part in parts)


def _but(harm: Harm | None, probabilities: ProbabilityChange | None, baseline: str) -> str:
    """Return the end of praise if something got significantly worse; else nothing."""
    worse = [harm.headline] if harm is not None and harm.headline else []
    worse += ["the probabilities"] if probabilities is not None and probabilities.change == Change.WORSE else []
    return f" But significantly worse than with {baseline}: {', '.join(worse)}." if worse else ""


def _mixed(primary: PairedComparison, change: str) -> str:
    start = "No clear benefit. The test of ranks and the interval of the mean disagree:"
    if primary.effect_size < 0:
        return f"{start} more cases lose than gain, though their mean may be zero or better. {change}. {_DO_NOT_USE}"
    worst = ", ".join(f"{case} {_METRIC.difference_text(difference)}" for case, difference in primary.worst)
    advice = f"look at the worst cases before using it ({worst})" if worst else "do not rely on it"
    return f"{start} more cases gain than lose, but their mean may be zero or worse. {change}. Advice: {advice}."


def _too_few(primary: PairedComparison, alpha: float) -> str:
    count = primary.num_pairs
    seen = ""
    if count:
        best = format_p(smallest_p_value(count))
        seen = (
            f" (mean {_METRIC.title} {_quantity(primary.mean_difference)}, {_better_cases(primary)}; "
            f"even if all cases agreed p would be {best})"
        )
    return f"Too few cases. n = {count}{seen}, and at least {_fewest_cases(alpha)} are needed for p < {alpha:g}."


def _fewest_cases(level: float) -> int:
    """Return the number of cases from which a test can reach a level."""
    return next(number for number in range(1, 64) if smallest_p_value(number) <= level)


def _figures(comparison: PairedComparison) -> str:
    interval = _METRIC.interval_text(*comparison.interval, sign="")
    parts = [f"95 % CI {interval}"] if interval else []
    return ", ".join([*parts, f"p {format_p(comparison.p_value)}", _better_cases(comparison)])


def _better_cases(comparison: PairedComparison) -> str:
    """Say how many cases agree with the majority."""
    more_lost = comparison.losses > comparison.wins
    number, word = (comparison.losses, "worse") if more_lost else (comparison.wins, "better")
    return f"{number} of {comparison.num_pairs} cases {word}"


def _quantity(difference: float, sign: str = "+") -> str:
    return f"{_METRIC.difference_text(difference, sign)} {_METRIC.difference_unit}"


def _notes(
    table: ResultTable, method: str, baseline: str, regions: Sequence[str], primary: PairedComparison, rivals: Sequence[Rival]
) -> tuple[str, ...]:
    notes = []
    left_out = primary.num_only_method + primary.num_only_baseline + primary.num_neither
    if left_out:
        notes.append(f"{left_out} of {len(table.cases)} cases are left out: no region has a {_METRIC.title} in both methods.")
    for name in (method, baseline):
        missing = table.missing_cases(name)
        if missing:
            notes.append(f"{name} has no measurements of {_some(missing)}.")
    alarms = {name: _false_alarms(table, name, other, regions) for name, other in ((method, baseline), (baseline, method))}
    if any(alarms.values()):
        notes.append(
            "Regions that one of the two methods finds although the reference lacks them, which the mean leaves out: "
            f"{alarms[method]} by {method}, {alarms[baseline]} by {baseline}."
        )
    for rival in rivals:
        if rival.name not in table.methods:
            notes.append(f"{rival.name} could not be measured in any case.")
        elif (count := rival.comparison.num_pairs) != primary.num_pairs:
            notes.append(f"The comparison with {rival.name} is over {counted(count, 'case')}, not {primary.num_pairs}.")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    """Join names; of a long list, only the first ones."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _false_alarms(table: ResultTable, method: str, other: str, regions: Sequence[str]) -> int:
    """Count where a method finds what neither the reference nor the other method has.

    The other method's Dice is undefined there, so the pair is left out: a false alarm must not go unreported.
    """
    seen = ~np.isin(table.cases, table.missing_cases(other))
    return sum(
        int((seen & (table.values(method, region, ENDPOINT) == 0) & np.isnan(table.values(other, region, ENDPOINT))).sum())
        for region in regions
    )
