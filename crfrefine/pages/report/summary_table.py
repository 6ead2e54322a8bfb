"""The page's table of means and differences: a row per metric and region."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from crfrefine.pages.report.model import ReportInput
from crfrefine.pages.report.pairs import region_choices, shown_values
from crfrefine.pages.report.wording import UNDEFINED, effect_text, interval_text, p_text, wording_of
from crfrefine.statistics.comparison import SummaryRow


@dataclass(frozen=True)
class SummaryLine:
    """A row of the summary table, as text."""

    metric: str
    region: str
    is_first: bool
    is_lead: bool
    method: str
    before: str
    after: str
    difference: str
    interval: str
    p_value: str
    effect: str
    counts: tuple[int, int, int] | None
    num_pairs: int
    num_left_out: int


def summary_lines(report: ReportInput, method: str) -> Iterator[SummaryLine]:
    """Yield the rows of a method, the region that represents its metric first."""
    previous = ""
    rows = [row for row in report.summary if row.method == method and (row.num_values or row.comparison is not None)]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    leads = lead_regions(report, rows)
    rows.sort(key=lambda row: (metrics.index(row.metric), row.region != leads[row.metric]))
    baselines = {(row.metric, row.region): row for row in report.summary if row.method == report.baseline}
    for row in rows:
        wording, comparison = wording_of(row.metric), row.comparison
        baseline = baselines.get((row.metric, row.region))
        before, after, difference = baseline.mean if baseline else math.nan, row.mean, math.nan
        num_pairs, num_left_out = row.num_values, row.num_undefined
        if comparison is not None:
            num_pairs, num_left_out = comparison.num_pairs, len(report.table.cases) - comparison.num_pairs
            if num_pairs:  # else, as for calibration that the baseline does not have, each has its own mean
                before, after, difference = comparison.mean_baseline, comparison.mean, comparison.mean_difference
        elif report.baseline is not None and method != report.baseline:  # a metric that only describes
            both = shown_values(report, [report.baseline, method], row.region, row.metric)
            both = both[:, ~np.isnan(both).any(axis=0)]
            num_pairs, num_left_out = both.shape[1], len(report.table.cases) - both.shape[1]
            if num_pairs:
                before, after = (float(values.mean()) for values in both)
                difference = after - before
        yield SummaryLine(
            metric=row.metric,
            region=report.region_title(row.region),
            is_first=row.metric != previous,
            is_lead=row.region == leads[row.metric],
            method=method,
            before=wording.number(before),
            after=wording.number(after),
            difference=wording.change(difference),
            interval=interval_text(comparison, wording) if comparison else UNDEFINED,
            p_value=p_text(row.p_adjusted) if comparison else UNDEFINED,
            effect=effect_text(comparison) if comparison else UNDEFINED,
            counts=(comparison.wins, comparison.ties, comparison.losses) if comparison and num_pairs else None,
            num_pairs=num_pairs,
            num_left_out=num_left_out,
        )
        previous = row.metric


def lead_regions(report: ReportInput, rows: Iterable[SummaryRow]) -> dict[str, str]:
    """Return the region that represents each metric of the rows while the regions are hidden."""
    return {metric: (region_choices(report, metric) or ("",))[0] for metric in dict.fromkeys(row.metric for row in rows)}
