"""What the page says of the verdict: its tone, the figures beside it, what got worse, and the rivals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crfrefine.pages.report.model import ReportInput
from crfrefine.pages.report.summary_table import lead_regions
from crfrefine.pages.report.wording import interval_text, p_text, wording_of
from crfrefine.statistics.harm import Decline
from crfrefine.statistics.verdict import ENDPOINT, Outcome


def tone(report: ReportInput) -> str:
    """Return the tone of the verdict: good, bad or neither, as for help with something that got significantly worse."""
    if report.verdict is None:
        return "open"
    if report.verdict.outcome == Outcome.HURTS:
        return "bad"
    has_harm = report.verdict.harm is not None and bool(report.verdict.harm.significant)
    return "good" if report.verdict.outcome == Outcome.HELPS and not has_harm else "open"


def figures(report: ReportInput) -> list[tuple[str, str, str]]:
    """Return the few numbers beside the verdict: name, number, remark."""
    dice = wording_of(ENDPOINT)
    title = dice.metric.title
    if report.verdict is None:
        rows = [row for row in report.summary if row.method == report.method and row.metric == ENDPOINT]
        leads = lead_regions(report, rows)
        row = next((row for row in rows if row.region == leads[ENDPOINT]), None)
        if row is None:
            return []
        return [(f"Mean {title}", dice.number(row.mean), f"n = {row.num_values}"), (f"Median {title}", dice.number(row.median), "")]
    comparison = report.verdict.comparison
    means = f"{dice.number(comparison.mean_baseline)} → {dice.number(comparison.mean)}"
    return [
        (f"Mean {title}", means, f"{report.baseline} → {report.method}"),
        (
            "Difference",
            dice.change(comparison.mean_difference),
            f"{dice.metric.difference_unit}, 95 % CI {interval_text(comparison, dice)}",
        ),
        ("p (Wilcoxon)", p_text(comparison.p_value), "two-sided, paired; this question alone"),
        ("Better / equal / worse", f"{comparison.wins} / {comparison.ties} / {comparison.losses}", f"of {comparison.num_pairs} cases"),
    ]


def declines(report: ReportInput) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a heading and rows of text for what got worse significantly, and for what got worse in most cases."""
    harm = report.verdict.harm if report.verdict is not None else None
    for heading, declines in () if harm is None else (("Significantly", harm.significant), ("In most cases", harm.in_most_cases)):
        if declines:
            yield heading, [_decline_cells(report, decline) for decline in declines]


def _decline_cells(report: ReportInput, decline: Decline) -> dict[str, Any]:
    wording, comparison = wording_of(decline.metric), decline.comparison
    return {
        "metric": wording.metric.title,
        "region": report.region_title(decline.region),
        "counts": (comparison.wins, comparison.ties, comparison.losses),
        "difference": wording.change_quantity(comparison.mean_difference),
        "interval": interval_text(comparison, wording),
        "p_value": p_text(decline.p_holm),
    }


def judged_rivals(report: ReportInput) -> list[dict[str, Any]]:
    """Return text on each rival of the verdict."""
    if report.verdict is None:
        return []
    dice = wording_of(ENDPOINT)
    return [
        {
            "name": rival.name,
            "theirs": dice.number(rival.comparison.mean_baseline),
            "ours": dice.number(rival.comparison.mean),
            "difference": dice.change(rival.comparison.mean_difference),
            "interval": interval_text(rival.comparison, dice),
            "p_value": p_text(rival.p_adjusted),
            "counts": f"{rival.comparison.wins} / {rival.comparison.ties} / {rival.comparison.losses}",
            "is_beaten": rival.is_beaten,
        }
        for rival in report.verdict.rivals
    ]
