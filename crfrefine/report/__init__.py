"""One self-contained page that shows what a method did to each case: `report.html`. Numbers and volumes come from the caller.

`docs/reference/report.md` says what stands on the page and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.io.atomic import write_small_file
from crfrefine.report.cutting import upright_case
from crfrefine.report.model import CaseImages, ReportInput
from crfrefine.report.montage import cuts_of
from crfrefine.report.page import CaseView, render
from crfrefine.report.pairs import ShownCase, choose_cases
from crfrefine.report.viewer import read_viewer, viewer_case

__all__ = ["CaseImages", "ReportInput", "missing_viewer", "write_report"]

MOST_BYTES_OF_CASE = 3_000_000
"""That a case adds to the page for the viewer."""

MOST_BYTES_OF_VIEWER = 15_000_000
"""That all cases together add for it: a page of twenty megabytes still opens at once and passes as an attachment."""


def missing_viewer() -> str:
    """Return why reports have no slice viewer on this machine, and what to do about it; empty if they have one."""
    return _viewer()[1]


def write_report(path: Path, report: ReportInput, *, num_shown: int = 3, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write the report, whole or not at all.

    Without the package that ships the slice viewer, the page has the pictures alone and says why: see `missing_viewer`.

    Args:
        path: of the page.
        report: what it says.
        num_shown: how many of the worst, the median and the best cases are shown each.
        progress: called with the name of a case that is about to be drawn, how many are done, and how many there are.

    Raises:
        CrfRefineError: the page cannot be written. A case whose volumes cannot be read is named on the page instead.
    """
    chosen = choose_cases(report, num_shown)
    source, problem = _viewer()
    views = []
    for number, shown in enumerate(chosen):
        if progress is not None:
            progress(shown.case, number, len(chosen))
        most_bytes = min(MOST_BYTES_OF_CASE, MOST_BYTES_OF_VIEWER // len(chosen))
        views.append(_view(report, shown, f"case-{number}", most_bytes if source else 0))
    page = render(report, views, source, problem)
    write_small_file(path, page.encode("utf-8", "backslashreplace"))  # names of files need not be text


def _viewer() -> tuple[str, str]:
    """The source of the slice viewer, or why there is none; the other is empty."""
    try:
        return read_viewer(), ""
    except BackendUnavailableError as error:
        return "", str(error)


def _view(report: ReportInput, shown: ShownCase, name: str, most_bytes: int) -> CaseView:
    try:
        case = upright_case(report.load_case(shown.case))
    except CrfRefineError as error:
        return CaseView(shown, (), None, str(error))
    cuts = cuts_of(name, case, report.baseline or "", report.method)
    viewer = viewer_case(case, most_bytes) if most_bytes else None
    maps = [labels for labels in (case.reference, case.before, case.after) if labels is not None]
    labels = sorted({label for one in maps for label in foreground_labels(one)})
    return CaseView(shown, cuts, viewer, labels=tuple(labels))
