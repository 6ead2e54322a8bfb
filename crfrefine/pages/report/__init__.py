"""The report: one self-contained page, `report.html`, with the effect of a method on each case (`docs/reference/report.md`)."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from crfrefine.base.geometry import spacing_of
from crfrefine.base.text import printable
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.registry import DICE, Metric, metric_named
from crfrefine.pages.pictures.preview import draw_preview
from crfrefine.pages.report.charts import draw_charts
from crfrefine.pages.report.model import CaseImages, ReportInput, ShownCase
from crfrefine.statistics.comparison import SummaryRow, describe_families, format_p
from crfrefine.statistics.verdict import ENDPOINT

__all__ = ["CaseImages", "ReportInput", "write_report"]
Progress = Callable[[str, int, int], None]


def write_report(path: Path, report: ReportInput, *, num_shown: int = 3, progress: Progress = lambda *_: None) -> str:
    """Write the report atomically; return why it has no charts, as without matplotlib, or an empty text.

    A case whose volumes cannot be read is named on the page. At most `num_shown` cases each are shown with the lowest, median and highest
    difference; before each is drawn, `progress` is called with its name, the number of cases done, and of those to draw.
    """
    charts, problem = [], ""
    try:
        charts = draw_charts(report)
    except BackendUnavailableError as error:
        problem = str(error)
    pictures, chosen = [], report.shown_cases(num_shown)
    for number, shown in enumerate(chosen):
        progress(shown.case, number, len(chosen))
        try:
            pictures.append((shown, _preview(report, shown, report.load_case(shown.case)), ""))
        except CrfRefineError as error:
            pictures.append((shown, b"", str(error)))
    write_small_file(path, _render(report, charts, problem, pictures).encode("utf-8", "backslashreplace"))
    return problem


def _preview(report: ReportInput, shown: ShownCase, images: CaseImages) -> bytes:
    """Draw a case; without a baseline, its errors."""
    text = " to ".join(map(DICE.value_text, shown.values.tolist()))
    if images.before is not None:
        text += f" ({DICE.difference_text(shown.values[1] - shown.values[0])} {DICE.difference_unit})"
    return draw_preview(
        images.image,
        images.reference if images.before is None else images.before,
        images.after,
        spacing_of(images.affine),
        affine=images.affine,
        title=printable(shown.case),
        subtitle=f"{DICE.title} {_typeset(text)}",
        label_names=report.label_titles,
        modality_names=images.modality_names,
        before_name=report.baseline or "reference",
        after_name=report.method,
        reference=None if images.before is None else images.reference,
        shows_errors=images.before is None,
    )


# Fill the page template, which escapes everything that comes from users.

# Letters that reverse the following text of a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = {letter: f"\\u{letter:04x}" for letter in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def _render(
    report: ReportInput, charts: Sequence[tuple[str, bytes]], problem: str, pictures: Sequence[tuple[ShownCase, bytes, str]]
) -> str:
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
    environment.filters["typeset"] = _typeset
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


def _typeset(text: str) -> str:
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
