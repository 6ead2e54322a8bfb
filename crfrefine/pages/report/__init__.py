"""The report: one self-contained page, `report.html`, with the effect of a method on each case (`docs/reference/report.md`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crfrefine.base.geometry import spacing_of
from crfrefine.base.text import printable
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.registry import DICE
from crfrefine.pages.pictures.preview import draw_preview
from crfrefine.pages.report.charts import draw_charts
from crfrefine.pages.report.model import CaseImages, ReportInput, ShownCase
from crfrefine.pages.report.page import render, typeset

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
    write_small_file(path, render(report, charts, problem, pictures).encode("utf-8", "backslashreplace"))
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
        subtitle=f"{DICE.title} {typeset(text)}",
        label_names=report.label_titles,
        modality_names=images.modality_names,
        before_name=report.baseline or "reference",
        after_name=report.method,
        reference=None if images.before is None else images.reference,
        shows_errors=images.before is None,
    )
