"""The tables of a study, from the files that the chain wrote and nothing else: what changed, and beside which rivals."""

from __future__ import annotations

from collections.abc import Sequence

from report import markdown_table
from study_findings import Findings, compare_means, points
from study_rivals import RIVALS
from study_section import study_section

from crfrefine.statistics.comparison import format_p
from crfrefine.statistics.paired import PairedComparison
from crfrefine.train.methods import DEFAULT, TRAINED


def make_document(studies: Sequence[Findings]) -> dict[str, str]:
    """Return the text of each pair of markers."""
    of_logits = [findings for findings in studies if not findings.is_of_label_maps]
    return {
        "summary": summary_table(of_logits),
        "study": "\n".join(map(study_section, of_logits)),
        "label-maps": label_maps_table(studies),
    }


def summary_table(studies: Sequence[Findings]) -> str:
    """Return a row for each data set and its logits: what the trained CRF changed, the best of the simple rivals, and the verdict."""
    rows = []
    for findings in studies:
        comparisons, adjusted = compare_means(findings)
        best = max(RIVALS, key=lambda rival: comparisons[rival].mean_difference)
        rows.append(
            [
                *_columns(findings, comparisons, adjusted),
                f"{best}, {points(comparisons[best].mean_difference)}",
                findings.summary["verdict"]["outcome"],
            ]
        )
    header = ["", "cases", "network's Dice", "`default`, untrained", "**trained CRF**, points (95 % interval)", "p (Holm)"]
    return markdown_table([*header, "better / equal / worse", "best rival", "verdict"], rows)


def _columns(findings: Findings, comparisons: dict[str, PairedComparison], adjusted: dict[str, float]) -> list[str]:
    """Return name, cases, the network's Dice, and what `default` and the trained CRF changed."""
    trained = comparisons[TRAINED]
    return [
        findings.name,
        str(findings.num_cases),
        f"{trained.mean_baseline:.4f}",
        points(comparisons[DEFAULT].mean_difference),
        _change(trained),
        format_p(adjusted[TRAINED]),
        f"{trained.wins} / {trained.ties} / {trained.losses}",
    ]


def label_maps_table(studies: Sequence[Findings]) -> str:
    """Return a row for each study of label maps: what the CRF changed with them and, beside it, with the logits."""
    of_logits = {findings.name: findings for findings in studies if not findings.is_of_label_maps}
    rows = []
    for findings in studies:
        if not findings.is_of_label_maps:
            continue
        comparisons, adjusted = compare_means(findings)
        other = of_logits.get(findings.name)
        rows.append(
            [
                *_columns(findings, comparisons, adjusted),
                findings.summary["verdict"]["outcome"],
                "–" if other is None else points(compare_means(other)[0][TRAINED].mean_difference),
            ]
        )
    header = ["label maps of", "cases", "network's Dice", "`default`, untrained", "**trained CRF**, points (95 % interval)", "p (Holm)"]
    return markdown_table([*header, "better / equal / worse", "verdict", "trained on the logits"], rows) if rows else "None was studied.\n"


def _change(trained: PairedComparison) -> str:
    return f"{points(trained.mean_difference)} ({points(trained.interval[0])} to {points(trained.interval[1])})"
