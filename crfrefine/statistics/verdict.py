"""The verdict whether a method helps: one plain sentence and its numbers. `docs/reference/metrics.md` has the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.registry import DICE
from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow, format_p
from crfrefine.statistics.harm import Harm, find_harm
from crfrefine.statistics.paired import NUM_RESAMPLES, PairedComparison, compare_pairs, detectable_difference, holm
from crfrefine.statistics.probabilities import ProbabilityChange, judge_probabilities
from crfrefine.statistics.wilcoxon import smallest_p_value

_METRIC = DICE
ENDPOINT = _METRIC.name
"""The deciding metric: its mean over the regions of each case."""

_MOST_NAMED = 10


class Outcome(StrEnum):
    """The verdict, for programs."""

    HELPS = "helps"
    NOT_BETTER_THAN_SIMPLE = "not better than simple"
    NO_DIFFERENCE = "no difference"
    MIXED = "mixed"
    HURTS = "hurts"
    TOO_FEW = "too few cases"


@dataclass(frozen=True)
class Rival:
    """Another method, often a simple one, that the judged one must beat to be worth using.

    Attributes:
        name: of the rival.
        comparison: the judged method minus the rival; without pairs if no case has both.
        p_holm: its p value after Holm's correction over all comparisons of the verdict; NaN without pairs.
        is_beaten: whether the judged method is significantly better.
    """

    name: str
    comparison: PairedComparison
    p_holm: float
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
        comparison: method minus baseline, mean Dice.
        p_holm: its p value after Holm's correction over the baseline and all rivals.
        alpha: the level that p_holm was compared with.
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
    p_holm: float
    alpha: float
    rivals: tuple[Rival, ...]
    notes: tuple[str, ...]
    harm: Harm | None = None
    probabilities: ProbabilityChange | None = None

    @property
    def num_comparisons(self) -> int:
        """Size of the family of Holm's correction: the baseline and the rivals that have a case in common with the method."""
        return _family(self.rivals)

    def to_dict(self) -> dict[str, Any]:
        """Return it for a JSON file: plain types, None for an undefined or infinite number."""
        content: dict[str, Any] = without_nonfinite(asdict(self))
        return content | {"outcome": self.outcome.value}


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

    Args:
        table: the measurements, with Dice.
        method: to be judged.
        baseline: the result without the method, such as the network alone.
        rivals: methods that the judged one should beat, such as a recalibration or the largest component.
        unmeasured: rivals without any case in the table; they count as not beaten.
        rivals_are_simple: whether to call the rivals simple methods, and prefer one that is not beaten.
        regions: whose mean Dice decides; default: all.
        subject: name of the method in the sentence; default: its name.
        summary: rows of `summarize` with the same baseline and the mean over the same regions: what got worse, and whether the
            probabilities got better, is looked up there. Default: no other metric is looked at.
        titles: displayed name of each region; default: its name.
        alpha: level of the two-sided test after Holm's correction over the baseline and all rivals.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        InputError: a name that is not in the table, or a rival that is the method itself or the baseline.
    """
    if method == baseline or {method, baseline} & set(rivals) or len(set(rivals)) < len(rivals):
        raise InputError(f"the method {method!r}, the baseline {baseline!r} and the rivals {', '.join(map(repr, rivals))} must differ")
    others = (baseline, *rivals)
    comparisons = [
        table.compare(method, other, MEAN, ENDPOINT, regions=regions, seed=seed, num_resamples=num_resamples) for other in others
    ]
    num_cases = len(table.cases)
    comparisons += [compare_pairs([math.nan] * num_cases, [math.nan] * num_cases, cases=table.cases) for _ in unmeasured]
    adjusted = holm([comparison.p_value for comparison in comparisons])
    judged = tuple(
        Rival(name, comparison, p_holm, _direction(comparison, p_holm, alpha) == 1)
        for name, comparison, p_holm in zip((*rivals, *unmeasured), comparisons[1:], adjusted[1:], strict=True)
    )
    outcome, sentence = _decide(subject or method, comparisons[0], adjusted[0], judged, alpha, rivals_are_simple=rivals_are_simple)
    chosen = table.regions if regions is None else tuple(regions)
    notes = _notes(table, method, baseline, chosen, comparisons[0]) + _notes_on_rivals(table, judged, comparisons[0].num_pairs)
    harm = None if summary is None else find_harm(summary, method, chosen, titles=titles, alpha=alpha)
    probabilities = None if summary is None else judge_probabilities(summary, method, alpha=alpha)
    sentence += _but(outcome, harm, baseline, has_rivals=bool(judged))
    return Verdict(outcome, sentence, method, baseline, chosen, comparisons[0], adjusted[0], alpha, judged, notes, harm, probabilities)


def _direction(comparison: PairedComparison, p_holm: float, alpha: float) -> int | None:
    """Return 1 for better, -1 for worse, 0 for no significant difference, None if test and mean disagree.

    The test uses ranks: with many small gains and a few large losses it can be significant although the mean is not.
    """
    if not p_holm < alpha:
        return 0
    low, high = comparison.interval
    if comparison.effect_size > 0 and low > 0:
        return 1
    if comparison.effect_size < 0 and high < 0:
        return -1
    return None


def _family(rivals: Sequence[Rival]) -> int:
    return 1 + sum(rival.comparison.num_pairs > 0 for rival in rivals)


def _decide(
    subject: str, primary: PairedComparison, p_holm: float, rivals: Sequence[Rival], alpha: float, *, rivals_are_simple: bool
) -> tuple[Outcome, str]:
    family = _family(rivals)
    count = primary.num_pairs
    figures = _figures(primary, p_holm, family)
    if count and primary.ties == count:
        return Outcome.NO_DIFFERENCE, f"no difference (the same mean {_METRIC.title} in {_all_cases(count)}): do not use it"
    if family * smallest_p_value(count) > alpha:
        return Outcome.TOO_FEW, _too_few(primary, family, alpha)
    direction = _direction(primary, p_holm, alpha)
    if direction is None:
        return Outcome.MIXED, _mixed(primary, figures)
    if direction == 0:
        # Holm's strictest level; how far Holm relaxes it depends on the other comparisons.
        seen = detectable_difference(primary.standard_deviation, count, alpha=alpha / family)
        power = f"; a mean difference below {_quantity(seen, '')} could hardly have been seen"
        return Outcome.NO_DIFFERENCE, f"no significant difference ({figures}{power}): do not use it"
    if direction < 0:
        return Outcome.HURTS, f"it hurts ({figures}): do not use it"
    helps = f"{subject} helps ({figures})"
    against = _against_rivals(rivals, family, rivals_are_simple=rivals_are_simple)
    return (Outcome.HELPS if all(rival.is_beaten for rival in rivals) else Outcome.NOT_BETTER_THAN_SIMPLE), helps + against


def _against_rivals(rivals: Sequence[Rival], family: int, *, rivals_are_simple: bool) -> str:
    """Return how a method that helps compares with its rivals; the text follows the comparison with the baseline."""

    def figures(rival: Rival) -> str:
        return _figures(rival.comparison, rival.p_holm, family)

    compared = [rival for rival in rivals if rival.comparison.num_pairs]
    missing = [rival.name for rival in rivals if not rival.comparison.num_pairs]
    strongest = min(
        [rival for rival in compared if not rival.is_beaten] or compared, key=lambda rival: rival.comparison.mean_difference, default=None
    )
    parts = []
    if strongest is not None and not strongest.is_beaten:
        if rivals_are_simple:
            return f", but not more than {strongest.name} does ({figures(strongest)}): prefer that, it is simpler"
        parts.append(f", but not significantly more than {strongest.name} does ({figures(strongest)})")
    elif strongest is not None:
        kind = "simple method" if rivals_are_simple else "other method"
        if missing:
            kind += " that could be compared"
        parts.append(f", and more than every {kind}: than the best of them, {strongest.name}, by {figures(strongest)}")
    if missing:
        parts.append(f"; no case allows a comparison with {' or '.join(missing)}")
    return "".join(parts)


def _but(outcome: Outcome, harm: Harm | None, baseline: str, *, has_rivals: bool) -> str:
    """Return the end of a sentence of praise if something got significantly worse; else nothing."""
    if harm is None or not harm.headline or outcome not in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE):
        return ""
    worse = f"{harm.headline} got significantly worse"
    # After a sentence on the rivals, "worse" needs its counterpart.
    return f"; {worse} than with {baseline}" if has_rivals else f", but {worse}"


def _mixed(primary: PairedComparison, figures: str) -> str:
    if primary.effect_size < 0:
        return f"no clear benefit: more cases lose than gain, though their mean may be zero or better ({figures}): do not use it"
    worst = ", ".join(f"{case} {_METRIC.difference_text(difference)}" for case, difference in primary.worst)
    advice = f"look at the worst cases before using it ({worst})" if worst else "do not rely on it"
    return f"no clear benefit: more cases gain than lose, but their mean may be zero or worse ({figures}); {advice}"


def _too_few(primary: PairedComparison, family: int, alpha: float) -> str:
    count = primary.num_pairs
    enough = next(number for number in range(1, 64) if family * smallest_p_value(number) <= alpha)
    seen = ""
    if count:
        correction = f" after Holm over {family} comparisons" if family > 1 else ""
        best = min(1.0, family * smallest_p_value(count))
        seen = (
            f" (mean {_METRIC.title} {_quantity(primary.mean_difference)}, {_better_cases(primary)}; "
            f"even if all cases agreed p would be {format_p(best)}{correction})"
        )
    return f"too few cases to tell: n = {count}{seen}, and at least {enough} are needed for p < {alpha:g}"


def _figures(comparison: PairedComparison, p_holm: float, family: int) -> str:
    parts = [f"mean {_METRIC.title} {_quantity(comparison.mean_difference)}"]
    interval = _METRIC.interval_text(*comparison.interval, sign="")
    if interval:
        parts.append(f"95 % CI {interval}")
    parts.append(f"p {format_p(p_holm)}" + (" after Holm" if family > 1 else ""))
    return ", ".join([*parts, _better_cases(comparison)])


def _better_cases(comparison: PairedComparison) -> str:
    """Say how many cases agree with the majority."""
    more_lost = comparison.losses > comparison.wins
    number, word = (comparison.losses, "worse") if more_lost else (comparison.wins, "better")
    return f"{number} of {comparison.num_pairs} cases {word}"


def _quantity(difference: float, sign: str = "+") -> str:
    return f"{_METRIC.difference_text(difference, sign)} {_METRIC.difference_unit}"


def _all_cases(count: int) -> str:
    return "the only case" if count == 1 else f"all {count} cases"


def _notes(table: ResultTable, method: str, baseline: str, regions: Sequence[str], primary: PairedComparison) -> tuple[str, ...]:
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
    return tuple(notes)


def _notes_on_rivals(table: ResultTable, rivals: Sequence[Rival], num_pairs: int) -> tuple[str, ...]:
    notes = []
    for rival in rivals:
        if rival.name not in table.methods:
            notes.append(f"{rival.name} could not be measured in any case.")
        elif rival.comparison.num_pairs != num_pairs:
            count = rival.comparison.num_pairs
            notes.append(f"The comparison with {rival.name} is over {count} case{'' if count == 1 else 's'}, not {num_pairs}.")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    """Join names; of a long list, only the first ones."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _false_alarms(table: ResultTable, method: str, other: str, regions: Sequence[str]) -> int:
    """Count where a method finds what neither the reference nor the other method has.

    The other method's Dice is undefined there, so the pair is left out: a false alarm must not go unreported.
    """
    seen = ~np.isin(table.cases, table.missing_cases(other))
    return sum(
        int((seen & (table.values(method, region, ENDPOINT) == 0) & np.isnan(table.values(other, region, ENDPOINT))).sum())
        for region in regions
    )
