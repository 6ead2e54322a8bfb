"""Fill the page template; the template escapes everything that comes from users."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files

import numpy as np

from crfrefine.metrics.registry import DICE, Metric, metric_named
from crfrefine.pages.report.model import ReportInput, ShownCase
from crfrefine.statistics.comparison import SummaryRow, describe_families, format_p
from crfrefine.statistics.verdict import ENDPOINT

# They reverse the following text of a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = {letter: f"\\u{letter:04x}" for letter in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def render(report: ReportInput, charts: Sequence[tuple[str, bytes]], problem: str, pictures: Sequence[tuple[ShownCase, bytes, str]]) -> str:
    """Return the page. `problem` is why it has no charts; each case has a PNG, or the reason for its absence."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(_DIRECTIONS) if type(value) is str else value,
        loader=jinja2.FunctionLoader(lambda name: (files("crfrefine.pages.report") / "assets" / name).read_text(encoding="utf-8")),
    )
    environment.filters["typeset"] = typeset
    methods = [report.method, *(method for method in report.table.methods if method not in report.compared)]
    return environment.get_template("page.html").render(
        report=report,
        families=describe_families(report.summary),
        unsigned=[metric_named(metric).title for metric in report.table.metrics if report.is_unsigned(metric)],
        lines={method: list(_summary_lines(report, method)) for method in methods},
        charts=charts,
        problem=problem,
        pictures=pictures,
        lead="".join(map(report.region_title, report.regions_of(ENDPOINT)[:1])),
        dice=DICE,
        metric_named=metric_named,
        format_p=format_p,
        url=lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
    )


def typeset(text: str) -> str:
    """Return a number with a true minus, and a dash for an undefined one."""
    return text.replace("-", "\u2212") or "–"


def _summary_lines(report: ReportInput, method: str) -> Iterator[tuple[SummaryRow, Metric, bool, float, float, int]]:
    """Yield row, metric, whether the region represents the metric, both means and the number of cases that both methods have."""
    rows = [row for row in report.summary if row.method == method and (row.num_values or row.comparison is not None)]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    leads = {metric: report.regions_of(metric)[:1] for metric in metrics}
    for row in sorted(rows, key=lambda row: (metrics.index(row.metric), (row.region,) != leads[row.metric])):
        values = report.values([*report.compared[:-1], method], row.region, row.metric)
        values = values[:, ~np.isnan(values).any(axis=0)]
        before, after = values.mean(axis=1)[[0, -1]].tolist() if values.size else (math.nan, row.mean)
        yield row, metric_named(row.metric), (row.region,) == leads[row.metric], before, after, values.shape[1]
