"""The verdict whether a method helps: numbers, and plain sentences about them. `docs/reference/metrics.md` has the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.registry import DICE
from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow, format_p
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
    center,
    compare_pairs,
    holm,
    smallest_p_value,
)

ENDPOINT = DICE.name  # The deciding metric: its mean over the regions of each case.


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
    """Another method, often a simple one, that the judged one must beat to be worth using."""

    name: str
    comparison: (
        PairedComparison  # The judged method minus the rival; without pairs if no case has both.
    )
    gain: float  # Its mean Dice minus the baseline's; NaN without a case that both have.
    p_adjusted: float  # After Holm's correction over the rivals; NaN without pairs.
    is_beaten: bool  # True if the judged method is significantly better.


@dataclass(frozen=True)
class Verdict:
    """The verdict on a method against a baseline, for programs and in a sentence, with the numbers that it rests on."""

    outcome: Outcome
    sentence: str  # For users, the numbers first.
    method: str
    baseline: str  # The method that it should improve.
    regions: tuple[str, ...]  # The regions over which Dice was averaged.
    comparison: PairedComparison  # Mean Dice. This one question is tested by itself, so its p value is also that of the summary.
    rivals: tuple[Rival, ...]  # The methods that it should beat as well.
    notes: tuple[
        str, ...
    ]  # Further facts that the reader must know, one sentence each, such as cases left out.
    harm: Harm | None = None  # The metrics that got worse; None if no other metric was looked at.
    probabilities: ProbabilityChange | None = None  # Their change; None if they were not measured.

    def to_dict(self) -> dict[str, Any]:
        """Return it for a JSON file: plain types, None for an undefined or infinite number."""
        return dict(
            without_nonfinite(
                asdict(self)
                | {"outcome": self.outcome.value, "p_adjusted": self.comparison.p_value}
            )
        )


def verdict(
    table: ResultTable,
    method: str,
    baseline: str,
    *,
    rivals: Sequence[str] = (),
    regions: Sequence[str] | None = None,
    subject: str | None = None,
    summary: Sequence[SummaryRow] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge whether a method improves on a baseline, and on simple rivals.

    The question about the baseline is tested by itself, and only if its answer is yes are the rivals looked at, with Holm's correction
    over these.

    Args:
        table: the measurements, with Dice.
        method: to be judged.
        baseline: the result without the method, such as the network.
        rivals: methods that the judged one should beat, such as the largest component; one without any case is not beaten.
        regions: whose mean Dice decides; default: all.
        subject: name of the method in the sentence; default: its name.
        summary: rows of `summarize` with the same baseline and mean, which show what got worse; default: no other metric is looked at.
        titles: displayed name of each region; default: its name.

    Raises:
        InputError: the method or the baseline is not in the table, or two of the methods are the same.
    """
    if len({method, baseline, *rivals}) < 2 + len(rivals):
        raise InputError(
            f"the method {method!r}, the baseline {baseline!r} and the rivals {list(rivals)} must differ"
        )
    subject, chosen = subject or method, table.regions if regions is None else tuple(regions)
    primary = table.compare(method, baseline, MEAN, ENDPOINT, regions=chosen)
    undefined = [math.nan] * len(table.cases)
    compared = [
        table.compare(method, rival, MEAN, ENDPOINT, regions=chosen)
        if rival in table.methods
        else compare_pairs(undefined, undefined)
        for rival in rivals
    ]
    judged = tuple(
        Rival(
            name,
            comparison,
            _gain(table, name, baseline, chosen),
            p_adjusted,
            _direction(comparison, p_adjusted) == 1,
        )
        for name, comparison, p_adjusted in zip(
            rivals, compared, holm([each.p_value for each in compared]), strict=True
        )
    )
    harm = None if summary is None else find_harm(summary, method, titles=titles)
    probabilities = None if summary is None else judge_probabilities(summary, method, titles=titles)
    outcome = _outcome(primary)
    sentence = _sentence(outcome, subject, baseline, primary)
    if outcome == Outcome.HELPS:
        if not all(rival.is_beaten for rival in judged):
            outcome = Outcome.NOT_BETTER_THAN_SIMPLE
        sentence += _against_rivals(subject, primary, judged)
        worse = [harm.headline] if harm is not None and harm.headline else []
        worse += (
            ["the probabilities"]
            if probabilities is not None and probabilities.change == Change.WORSE
            else []
        )
        sentence += (
            f" But significantly worse than with {baseline}: {', '.join(worse)}." if worse else ""
        )
    notes = _notes(table, method, baseline, chosen, primary, judged)
    return Verdict(
        outcome, sentence, method, baseline, chosen, primary, judged, notes, harm, probabilities
    )


def not_tested(method: str, baseline: str, regions: Sequence[str], reason: str) -> Verdict:
    """Return the verdict on a method that was not measured in every case; `reason` is the rest of a sentence."""
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


def power_text(comparison: PairedComparison) -> str:
    """Return which true difference would have been found with a power of 80 %; empty if none can be told."""
    if not 0.0 < comparison.detectable_difference < math.inf:
        return ""
    difference = _quantity(comparison.detectable_difference, "")
    return f"a true difference of {difference} would be found with probability 80 %, a smaller one less often"


def _direction(comparison: PairedComparison, p_adjusted: float) -> int | None:
    """Return 1 for better, -1 for worse, 0 for no significant difference, None if ranks, which are tested, and mean disagree."""
    if not p_adjusted < ALPHA:
        return 0
    sign = 1 if comparison.effect_size > 0 else -1
    return sign if min(sign * end for end in comparison.interval) > 0 else None


def _gain(table: ResultTable, rival: str, baseline: str, regions: Sequence[str]) -> float:
    """Return the mean difference between a rival and the baseline, over the cases that both have."""
    if rival not in table.methods:
        return math.nan
    values, others = table.means(ENDPOINT, [rival, baseline], regions)
    return center((values - others)[~np.isnan(values - others)])[0]


def _outcome(primary: PairedComparison) -> Outcome:
    """Return the outcome of the comparison with the baseline, without rivals."""
    if primary.num_pairs and primary.ties == primary.num_pairs:
        return Outcome.NO_DIFFERENCE
    if smallest_p_value(primary.num_pairs) > ALPHA:
        return Outcome.TOO_FEW
    outcomes = {1: Outcome.HELPS, 0: Outcome.NO_DIFFERENCE, -1: Outcome.HURTS, None: Outcome.MIXED}
    return outcomes[_direction(primary, primary.p_value)]


def _sentence(outcome: Outcome, subject: str, baseline: str, primary: PairedComparison) -> str:
    """Return the numbers, and the conclusion."""
    needed = next(number for number in range(1, 64) if smallest_p_value(number) <= ALPHA)
    worst = ", ".join(
        f"{case} {DICE.difference_text(difference)}" for case, difference in primary.worst
    )
    follows = {
        Outcome.HELPS: f"{subject} helps.",
        Outcome.HURTS: f"{subject} hurts. Advice: do not use it.",
        Outcome.NO_DIFFERENCE: f"{subject} is not shown to help. Advice: do not use it.",
        Outcome.MIXED: f"no clear benefit, as ranks and mean disagree. Advice: look at the worst cases before using it ({worst}).",
        Outcome.TOO_FEW: f"too few cases, at least {needed} are needed for p < {ALPHA:g}.",
    }
    if not primary.num_pairs:
        return f"No case allows a comparison with {baseline}: {follows[outcome]}"
    # Intervals of few cases are too narrow.
    interval = "" if outcome == Outcome.TOO_FEW else DICE.interval_text(*primary.interval, sign="")
    figures = [
        *([f"95 % CI {interval}"] if interval else []),
        f"p {format_p(primary.p_value)}",
        _better_cases(primary),
    ]
    sentence = f"Mean {DICE.title} {_quantity(primary.mean_difference)} against {baseline} ({', '.join(figures)}): {follows[outcome]}"
    power = power_text(primary) if outcome == Outcome.NO_DIFFERENCE else ""
    return sentence + (f" {power[0].upper()}{power[1:]}." if power else "")


def _against_rivals(subject: str, primary: PairedComparison, rivals: Sequence[Rival]) -> str:
    """Return how a method that helps compares with its rivals, as further sentences."""
    compared = [rival for rival in rivals if rival.comparison.num_pairs]
    missing = [rival.name for rival in rivals if not rival.comparison.num_pairs]
    sentences = f" No case allows a comparison with {' or '.join(missing)}." if missing else ""
    if compared:
        # The strongest of those that are not beaten, if there are any.
        strongest = min(
            compared, key=lambda rival: (rival.is_beaten, rival.comparison.mean_difference)
        )
        name, corrected = (
            strongest.name,
            f" after Holm over {len(compared)} rivals" if len(compared) > 1 else "",
        )
        gains = f"{subject} {DICE.difference_text(primary.mean_difference)}, {name} {_quantity(strongest.gain)}"
        figures = f"{gains} (p {format_p(strongest.p_adjusted)}{corrected}, {_better_cases(strongest.comparison)})."
        if strongest.is_beaten:
            return f" It gains more than every rival, the best of which is {name}: {figures}{sentences}"
        return f" But not shown to gain more than {name}: {figures} Advice: prefer {name} if it is simpler.{sentences}"
    return sentences


def _better_cases(comparison: PairedComparison) -> str:
    """Say how many cases agree with the majority."""
    number, word = max(
        (comparison.wins, "better"), (comparison.losses, "worse"), key=lambda side: side[0]
    )
    return f"{number} of {comparison.num_pairs} cases {word}"


def _quantity(difference: float, sign: str = "+") -> str:
    return f"{DICE.difference_text(difference, sign)} {DICE.difference_unit}"


def _notes(
    table: ResultTable,
    method: str,
    baseline: str,
    regions: Sequence[str],
    primary: PairedComparison,
    rivals: Sequence[Rival],
) -> tuple[str, ...]:
    notes = []
    left_out = primary.num_only_method + primary.num_only_baseline + primary.num_neither
    if left_out:
        notes.append(
            f"{left_out} of {len(table.cases)} cases are left out: no region has a {DICE.title} in both methods."
        )
    missing = {name: table.missing_cases(name) for name in (method, baseline)}
    notes += [
        f"{name} has no measurements of {listed(cases)}."
        for name, cases in missing.items()
        if cases
    ]
    # Dice is undefined where neither the reference nor the other method has what a method finds.
    dice = np.array([[table.values(name, own, ENDPOINT) for own in regions] for name in missing])
    seen = np.array([[~np.isin(table.cases, cases)] for cases in missing.values()])
    alarms = ((dice == 0) & np.isnan(dice[::-1]) & seen[::-1]).sum(axis=(1, 2))
    if any(alarms):
        notes.append(
            "Regions that one of the two methods finds although the reference lacks them, which the mean leaves out: "
            f"{alarms[0]} by {method}, {alarms[1]} by {baseline}."
        )
    notes += [
        f"The comparison with {rival.name} is over {counted(rival.comparison.num_pairs, 'case')}, not {primary.num_pairs}."
        for rival in rivals
        if rival.comparison.num_pairs != primary.num_pairs
    ]
    return tuple(notes)
