"""The sentences of an evaluation beside that of its verdict (`statistics/verdict.py`)."""

from __future__ import annotations

from dataclasses import replace

from crfrefine.base.text import counted, listed
from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.evaluate.lesion_totals import total_lesions
from crfrefine.evaluate.options import DEFAULT_NAME
from crfrefine.metrics.registry import metric_named
from crfrefine.statistics.texts import power_text
from crfrefine.statistics.verdict import Verdict, not_tested, verdict


def judge(evaluation: Evaluation) -> Verdict | None:
    """Return the verdict on the judged method; None if it or the baseline has no case.

    It leaves out the cases that the parameters of a method were learned on.
    """
    options = evaluation.options
    table = evaluation.table
    if options.baseline is None or not {options.name, options.baseline} <= set(table.methods):
        return None
    learned = learned_text(evaluation)
    if evaluation.learned_cases.issuperset(table.cases):
        reason = f"{learned}; the verdict of train-crf is on cases held out"
        judged = not_tested(options.name, options.baseline, evaluation.judged_regions, reason)
        sentence = judged.sentence
    else:
        rivals = [name for name, _ in options.baselines[1:] if name != options.ceiling]
        judged = verdict(
            table,
            options.name,
            options.baseline,
            rivals=rivals,
            regions=evaluation.judged_regions,
            subject=_subject(evaluation, options.name),
            is_refinement=options.name in evaluation.refined,
            summary=evaluation.summary,
            titles=evaluation.titles,
        )
        sentence = judged.sentence
        if learned:
            sentence = f"{learned}. Without these: {sentence}"
        if options.lesions is not None:
            sentence = f"{sentence} {_lesion_sentence(evaluation, options.baseline)}"
    notes = (*judged.notes, *empty_notes(evaluation))
    return replace(judged, sentence=sentence, notes=notes)


def _lesion_sentence(evaluation: Evaluation, baseline: str) -> str:
    """Return the changes of the baseline's lesions, in judged regions and cases that both have."""
    method = evaluation.options.name
    regions = evaluation.judged_regions
    before = total_lesions(evaluation, baseline, regions, method)
    after = total_lesions(evaluation, method, regions, baseline)
    lost = f"of {counted(before['lesions_found'], 'lesion')} that {baseline} finds, "
    lost += f"{_subject(evaluation, method)} loses {after['lesions_lost'] or 'none'}"
    if after["lesions_lost"]:
        lost += f" (worst case: {after['worst_case']})"
    made = f"of {counted(before['lesions_false'], 'false one')}, "
    made += f"it removes {after['lesions_removed']}, and makes {after['lesions_made']}"
    text = metric_named("lesion_f1").value_text
    f1 = [text(totals["lesion_f1"]) or "undefined" for totals in (before, after)]
    return f"Lesions: {lost}, and gains {after['lesions_gained']}; {made}; F1 {f1[0]} → {f1[1]}."


def learned_text(evaluation: Evaluation) -> str:
    """Return the methods with learned parameters, and the number of cases; empty without any."""
    if not evaluation.learned:
        return ""
    num_cases = counted(len(evaluation.pairs), "case")
    methods = listed([_subject(evaluation, method) for method in evaluation.learned])
    return (
        f"{len(evaluation.learned_cases)} of {num_cases} used to learn the parameters of "
        f"{methods}: no evidence for new cases"
    )


def recovered_text(evaluation: Evaluation) -> str:
    """Return one line on the shares that are recovered; empty without a ceiling.

    With several regions, the shares are those of the mean over regions.
    """
    options = evaluation.options
    if options.ceiling is None:
        return ""
    shares = []
    for metric, share_by_region in evaluation.recovered.items():
        share = share_by_region.get(evaluation.leading_region)
        if share is not None:
            shares.append(f"{100 * share:.0f} % of {metric_named(metric).title}")
    recovered = listed(shares) or "nothing, as there is no lead"
    return (
        f"{_subject(evaluation, options.name)} recovers, of what {options.baseline} loses "
        f"against {options.ceiling}: {recovered}"
    )


def no_verdict(evaluation: Evaluation) -> str | None:
    """Return one sentence why there is no verdict; None if there is one, or no baseline."""
    options = evaluation.options
    if options.baseline is None or evaluation.verdict is not None:
        return None
    names = (options.name, options.baseline)
    missing = " and ".join(name for name in names if name not in evaluation.table.methods)
    return f"no verdict: no case has a region that could be measured for {missing}"


def power_note(evaluation: Evaluation) -> str | None:
    """Return the smallest difference that so many cases can detect; None if it is unknown."""
    if evaluation.verdict is None:
        return None
    comparison = evaluation.verdict.comparison
    power = power_text(comparison)
    if not power:
        return None
    return f"with {counted(comparison.num_pairs, 'case')}, {power}"


def empty_notes(evaluation: Evaluation) -> tuple[str, ...]:
    """Return a sentence for each method with empty predictions."""
    total = counted(len(evaluation.full_table.cases), "case")
    notes = []
    for method, cases in evaluation.empty_predictions.items():
        notes.append(
            f"{method} has no foreground in {len(cases)} of {total} "
            f"though the reference has some: {listed(cases)}."
        )
    return tuple(notes)


def _subject(evaluation: Evaluation, method: str) -> str:
    """Return the name of a method in sentences."""
    if method != DEFAULT_NAME:
        return method
    if method in evaluation.refined:
        return "the refinement"
    return f"the {DEFAULT_NAME}"
