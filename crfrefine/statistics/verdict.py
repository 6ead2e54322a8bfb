"""The verdict whether a method helps, in sentences (rules: `docs/reference/metrics.md`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from crfrefine.base.plain import fields_to_plain
from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.registry import DICE
from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow
from crfrefine.statistics.harm import (
    Change,
    Harm,
    ProbabilityChange,
    find_harm,
    judge_probabilities,
)
from crfrefine.statistics.paired import (
    ALPHA,
    PairedComparison,
    cases_to_find,
    center,
    compare_pairs,
    holm,
    smallest_p_value,
)
from crfrefine.statistics.texts import points_text, power_text, wins_text

ENDPOINT = DICE.name  # The deciding metric: its mean over the regions of each case.
# With fewer cases, a true difference of two thirds of their scatter, which is large, is missed more
# often than once in five times. Where none was found, that says little.
MIN_TO_ADVISE = 20


class Outcome(StrEnum):
    """The verdict, for programs."""

    HELPS = "helps"
    NOT_BETTER_THAN_SIMPLE = "not better than simple"
    NO_DIFFERENCE = "no difference"
    MIXED = "mixed"
    HURTS = "hurts"
    TOO_FEW = "too few cases"
    NOT_TESTED = "not tested"


# Conclusions for users from the comparison with the baseline.
_CONCLUSIONS = {
    Outcome.HELPS: "{subject} helps.",
    Outcome.HURTS: "{subject} hurts. Advice: do not use it.",
    Outcome.NO_DIFFERENCE: "{subject} is not shown to help. Advice: do not use it.",
    Outcome.MIXED: (
        "no clear benefit, as ranks and mean disagree. "
        "Advice: look at the worst cases before using it ({worst})."
    ),
    Outcome.TOO_FEW: (
        "too few cases to tell whether {subject} helps. If the mean and the scatter of these "
        "cases are typical, {enough} would show the difference with probability 80 %."
    ),
}
# The same for a method that is no refinement of the baseline, such as another network.
_CONCLUSIONS_ON_OTHERS = {
    **_CONCLUSIONS,
    Outcome.HELPS: "{subject} is better than {baseline}.",
    Outcome.HURTS: "{subject} is worse than {baseline}. Advice: prefer {baseline}.",
    Outcome.NO_DIFFERENCE: (
        "{subject} is not shown to be better than {baseline}. "
        "Advice: prefer {baseline} if it is simpler."
    ),
    Outcome.TOO_FEW: _CONCLUSIONS[Outcome.TOO_FEW].replace("helps", "is better than {baseline}"),
}
_FEWER_THAN_NEEDED = "too few cases, at least {needed} are needed for p < {level:g}."
# The same for a method that helps, from the comparison with the strongest of its rivals.
_AGAINST_RIVALS = {
    Outcome.HELPS: "It gains more than every rival, the best of which is {name}: {figures}",
    Outcome.NOT_BETTER_THAN_SIMPLE: (
        "But not shown to gain more than {name}: {figures} Advice: prefer {name} if it is simpler."
    ),
    Outcome.TOO_FEW: (
        "Too few cases to tell whether it gains more than {name}: {figures} "
        "At least {needed} are needed for {rivals}."
    ),
}


@dataclass(frozen=True)
class Rival:
    """Another method, often a simple one, that the judged one must beat to be worth using."""

    name: str
    # The judged method minus the rival, over the regions and cases where both and the baseline have
    # a Dice; it may have no pairs.
    comparison: PairedComparison
    gain: float  # its mean Dice minus the baseline's over these; NaN without any
    gain_of_method: float  # likewise that of the judged method
    p_adjusted: float  # after Holm's correction over the rivals; NaN without pairs
    is_beaten: bool  # whether the judged method is significantly better


@dataclass(frozen=True)
class Verdict:
    """The verdict on a method against a baseline, with the numbers that it rests on."""

    outcome: Outcome  # for programs
    sentence: str  # for users, the numbers first
    method: str
    baseline: str  # the method that it should improve
    regions: tuple[str, ...]  # the regions over which Dice was averaged
    # Mean Dice. This one question is tested by itself, so its p value is also that of the summary.
    comparison: PairedComparison
    rivals: tuple[Rival, ...]  # the methods that it should beat as well
    # Further facts that the reader must know, one sentence each, such as cases left out.
    notes: tuple[str, ...]
    harm: Harm | None = None  # the metrics that got worse; None if no other metric was looked at
    probabilities: ProbabilityChange | None = None  # their change; None if they were not measured

    def to_dict(self) -> dict[str, Any]:
        """Return it for a JSON file: plain types, None for an undefined or infinite number."""
        values = {**fields_to_plain(self), "p_adjusted": self.comparison.p_value}
        return dict(without_nonfinite(values))


def verdict(
    table: ResultTable,
    method: str,
    baseline: str,
    *,
    rivals: Sequence[str] = (),
    regions: Sequence[str] | None = None,
    subject: str | None = None,
    is_refinement: bool = True,
    summary: Sequence[SummaryRow] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge whether a method improves on a baseline, and on simple rivals.

    The question about the baseline is tested by itself, and only if its answer is yes are the
    rivals looked at, with Holm's correction over these. Too few cases for either are no answer.

    Args:
        table: the measurements, with Dice.
        method: to be judged.
        baseline: the result without the method, such as the network.
        rivals: methods that the judged one should beat, such as the largest component; one without
            any case is not beaten.
        regions: whose mean Dice decides; default: all.
        subject: name of the method in the sentence; default: its name.
        is_refinement: whether the method refines the baseline's results; the sentence then says
            whether it helps, and else which is better.
        summary: rows of `summarize` with the same baseline and mean, which show what got worse;
            default: no other metric is looked at.
        titles: displayed name of each region; default: its name.

    Raises:
        InputError: a method or the baseline is not in the table, or two of them are the same.
    """
    if len({method, baseline, *rivals}) < 2 + len(rivals):
        raise InputError(
            f"the method {method!r}, the baseline {baseline!r} and the rivals {list(rivals)} "
            "must differ"
        )
    judged_regions = table.regions if regions is None else tuple(regions)
    primary = table.compare(method, baseline, MEAN, ENDPOINT, regions=judged_regions)
    judged_rivals = _judge_rivals(table, method, baseline, rivals, judged_regions)
    harm = None
    probabilities = None
    if summary is not None:
        harm = find_harm(summary, method, titles=titles)
        probabilities = judge_probabilities(summary, method, titles=titles)

    outcome = _outcome(primary, primary.p_value)
    conclusions = _CONCLUSIONS if is_refinement else _CONCLUSIONS_ON_OTHERS
    sentence = _sentence(conclusions[outcome], outcome, (subject or method, baseline), primary)
    if outcome == Outcome.HELPS:
        outcome, others = _against_rivals(subject or method, judged_rivals)
        sentence = " ".join([sentence, *others])
        worse = []
        if harm is not None and harm.headline:
            worse.append(harm.headline)
        if probabilities is not None and probabilities.change == Change.WORSE:
            worse.append("the probabilities")
        if worse:
            sentence += f" But significantly worse than with {baseline}: {', '.join(worse)}."
    return Verdict(
        outcome,
        sentence,
        method,
        baseline,
        judged_regions,
        primary,
        judged_rivals,
        _notes(table, method, baseline, judged_regions, primary, judged_rivals),
        harm,
        probabilities,
    )


def _judge_rivals(
    table: ResultTable, method: str, baseline: str, names: Sequence[str], regions: Sequence[str]
) -> tuple[Rival, ...]:
    """Compare a method with each rival; one without any case has no pairs."""
    values_of = {}
    comparisons = []
    for name in names:
        values = np.full((3, len(table.cases)), math.nan)
        if name in table.methods:
            values = table.means(ENDPOINT, [method, name, baseline], regions)
        values_of[name] = values[:, ~np.isnan(values[0])]
        comparisons.append(compare_pairs(*values[:2], cases=table.cases))
    adjusted = holm([comparison.p_value for comparison in comparisons])
    rivals = []
    for name, comparison, p_adjusted in zip(names, comparisons, adjusted, strict=True):
        of_method, of_rival, of_baseline = values_of[name]
        gain, _ = center(of_rival - of_baseline)
        gain_of_method, _ = center(of_method - of_baseline)
        is_beaten = _outcome(comparison, p_adjusted) == Outcome.HELPS
        rivals.append(Rival(name, comparison, gain, gain_of_method, p_adjusted, is_beaten))
    return tuple(rivals)


def _cases_needed(num_tests: int = 1) -> int:
    """Return the fewest cases that can reach p < ALPHA after Holm's correction over some tests."""
    needed = 1
    while num_tests * smallest_p_value(needed) > ALPHA:
        needed += 1
    return needed


def not_tested(method: str, baseline: str, regions: Sequence[str], reason: str) -> Verdict:
    """Return the verdict on a method not measured in every case; `reason` completes a sentence."""
    return Verdict(
        Outcome.NOT_TESTED,
        f"Not tested: {reason}.",
        method,
        baseline,
        tuple(regions),
        compare_pairs([], []),
        (),
        (),
    )


def _outcome(comparison: PairedComparison, p_adjusted: float) -> Outcome:
    """Return the outcome of a comparison with another method; mixed if ranks and mean disagree."""
    if not p_adjusted < ALPHA:
        are_equal = comparison.ties == comparison.num_pairs >= _cases_needed()
        if are_equal or comparison.num_pairs >= MIN_TO_ADVISE:
            return Outcome.NO_DIFFERENCE
        return Outcome.TOO_FEW
    low, high = comparison.interval
    if comparison.effect_size > 0 and min(low, high) > 0:
        return Outcome.HELPS
    if comparison.effect_size <= 0 and max(low, high) < 0:
        return Outcome.HURTS
    return Outcome.MIXED


def _sentence(
    conclusion: str, outcome: Outcome, names: tuple[str, str], primary: PairedComparison
) -> str:
    """Return the figures of the comparison with the baseline, and its conclusion.

    `names` are those of the method and of the baseline.
    """
    subject, baseline = names
    needed = _cases_needed()
    figures = [f"95 % CI {DICE.interval_text(*primary.interval, sign='')}"]
    number = ""
    if primary.num_pairs < needed:
        conclusion = _FEWER_THAN_NEEDED
        figures = []  # Intervals of few cases are too narrow.
    elif outcome == Outcome.TOO_FEW:
        enough = cases_to_find(primary.mean_difference, primary.standard_deviation)
        number = "more than 1000" if enough is None else f"about {enough}"
    worst = [f"{case} {DICE.difference_text(difference)}" for case, difference in primary.worst]
    conclusion = conclusion.format(
        subject=subject,
        baseline=baseline,
        worst=", ".join(worst),
        enough=number,
        needed=needed,
        level=ALPHA,
    )
    if not primary.num_pairs:
        return f"No case allows a comparison with {baseline}: {conclusion}"
    power = power_text(primary)
    if power and outcome == Outcome.NO_DIFFERENCE:
        conclusion += f" {power[0].upper()}{power[1:]}."
    figures.append(wins_text(primary, primary.p_value))
    difference = f"Mean {DICE.title} {points_text(primary.mean_difference)} against {baseline}"
    return f"{difference} ({', '.join(figures)}): {conclusion}"


def _against_rivals(subject: str, rivals: Sequence[Rival]) -> tuple[Outcome, list[str]]:
    """Return the verdict on a method that helps, beside its rivals, and sentences about them."""
    outcome = Outcome.HELPS
    sentences = []
    compared = [rival for rival in rivals if rival.comparison.num_pairs]
    missing = [rival.name for rival in rivals if not rival.comparison.num_pairs]
    if missing:
        outcome = Outcome.NOT_BETTER_THAN_SIMPLE
        sentences.append(f"No case allows a comparison with {' or '.join(missing)}.")
    if not compared:
        return outcome, sentences

    # Those that are not beaten come first, and then those that the method exceeds least.
    first = min(compared, key=lambda one: (one.is_beaten, one.comparison.mean_difference))
    # Holm's correction multiplies the smallest p value by the number of rivals.
    needed = _cases_needed(len(compared))
    answer = Outcome.HELPS
    if not first.is_beaten:
        answer = Outcome.NOT_BETTER_THAN_SIMPLE
        if max(rival.comparison.num_pairs for rival in compared) < needed:
            answer = Outcome.TOO_FEW
        outcome = answer
    correction = ""
    if len(compared) > 1:
        correction = f" after Holm over {len(compared)} rivals"
    gains = f"{subject} {DICE.difference_text(first.gain_of_method)}, "
    gains += f"{first.name} {points_text(first.gain)}"
    sentence = _AGAINST_RIVALS[answer].format(
        name=first.name,
        figures=f"{gains} ({wins_text(first.comparison, first.p_adjusted, correction)}).",
        needed=needed,
        rivals=counted(len(compared), "rival"),
    )
    return outcome, [sentence, *sentences]


def _notes(
    table: ResultTable,
    method: str,
    baseline: str,
    regions: Sequence[str],
    primary: PairedComparison,
    rivals: Sequence[Rival],
) -> tuple[str, ...]:
    """Return a sentence for each thing that is left out of the comparisons."""
    notes = []
    left_out = primary.num_only_method + primary.num_only_baseline + primary.num_neither
    if left_out:
        notes.append(
            f"{left_out} of {len(table.cases)} cases are left out: "
            f"no region has a {DICE.title} in both methods."
        )
    for name in (method, baseline):
        cases = table.missing_cases(name)
        if cases:
            notes.append(f"{name} has no measurements of {listed(cases)}.")
    by_method = _count_false_regions(table, method, baseline, regions)
    by_baseline = _count_false_regions(table, baseline, method, regions)
    if by_method or by_baseline:
        notes.append(
            "Regions that one of the two methods finds although the reference lacks them, "
            f"which the mean leaves out: {by_method} by {method}, {by_baseline} by {baseline}."
        )
    for rival in rivals:
        if rival.comparison.num_pairs != primary.num_pairs:
            cases_of_rival = counted(rival.comparison.num_pairs, "case")
            notes.append(
                f"The comparison with {rival.name} is over {cases_of_rival}, "
                f"not {primary.num_pairs}."
            )
        elif not math.isclose(rival.gain_of_method, primary.mean_difference, abs_tol=1e-9):
            notes.append(
                f"The comparison with {rival.name} leaves out regions in which it has no "
                f"{DICE.title}."
            )
    return tuple(notes)


def _count_false_regions(
    table: ResultTable, method: str, other: str, regions: Sequence[str]
) -> int:
    """Return how many regions of all cases a method finds, but neither the reference nor the other.

    The Dice of the method is 0 there, and that of the other, which was measured, is undefined.
    """
    has_other = ~np.isin(table.cases, table.missing_cases(other))
    count = 0
    for region in regions:
        has_no_overlap = table.values(method, region, ENDPOINT) == 0
        is_undefined = np.isnan(table.values(other, region, ENDPOINT))
        count += int(np.count_nonzero(has_no_overlap & is_undefined & has_other))
    return count
