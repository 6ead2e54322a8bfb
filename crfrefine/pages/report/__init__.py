"""The report: one self-contained page, `report.html`, with the effect of a method on each case. The caller provides numbers and volumes.

`docs/reference/report.md` describes the page and its costs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.io.atomic import write_small_file
from crfrefine.pages.report.cutting import upright_case
from crfrefine.pages.report.model import CaseImages, ReportInput
from crfrefine.pages.report.montage import cuts_of
from crfrefine.pages.report.page import CaseView, render
from crfrefine.pages.report.pairs import ShownCase, choose_cases
from crfrefine.pages.report.viewer import read_viewer, viewer_case

__all__ = ["CaseImages", "ReportInput", "missing_viewer", "write_report"]

MOST_BYTES_OF_CASE = 3_000_000
"""Most bytes that a case adds to the page for the viewer."""

MOST_BYTES_OF_VIEWER = 15_000_000
"""Most bytes that all cases add for the viewer: a page of twenty megabytes still opens at once and can be sent as an attachment."""


def missing_viewer() -> str:
    """Return why reports on this machine have no slice viewer, and what to do about it; empty if they have one."""
    return _viewer()[1]


def write_report(path: Path, report: ReportInput, *, num_shown: int = 3, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write the report atomically; a case whose volumes cannot be read is named on the page.

    Without the package that ships the slice viewer, the page has only the pictures and says why: see `missing_viewer`. Of worst, median and
    best cases, `num_shown` each are shown; before each is drawn, `progress` is called with its name, the number of cases done, and of those
    to draw.
    """
    chosen = choose_cases(report, num_shown)
    source, problem = _viewer()
    views = []
    for number, shown in enumerate(chosen):
        if progress is not None:
            progress(shown.case, number, len(chosen))
        most_bytes = min(MOST_BYTES_OF_CASE, MOST_BYTES_OF_VIEWER // len(chosen))
        views.append(_view(report, shown, f"case-{number}", most_bytes if source else 0))
    page = secure(render(report, views, source, problem))
    write_small_file(path, page.encode("utf-8", "backslashreplace"))  # file names need not be valid text


def _viewer() -> tuple[str, str]:
    """The source of the slice viewer, or the reason why there is none; the other one is empty."""
    try:
        return read_viewer(), ""
    except BackendUnavailableError as error:
        return "", str(error)


def _view(report: ReportInput, shown: ShownCase, name: str, most_bytes: int) -> CaseView:
    try:
        case = upright_case(report.load_case(shown.case))
    except CrfRefineError as error:
        return CaseView(shown, (), None, str(error))
    cuts = cuts_of(name, case, report.baseline or "", report.method, report.label_titles)
    viewer = viewer_case(case, most_bytes) if most_bytes else None
    maps = [labels for labels in (case.reference, case.before, case.after) if labels is not None]
    labels = sorted({label for one in maps for label in foreground_labels(one)})
    return CaseView(shown, cuts, viewer, labels=tuple(labels))


# Keep names on the page harmless: only its own scripts run, it requests nothing, and direction marks are shown as escapes.

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_MARKUP = re.compile(r"(<script\b.*?</script>|<style\b.*?</style>|<[^>]*>)", re.DOTALL)
_START = '<meta charset="utf-8">\n'

# They reverse what follows them in a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = {letter: f"\\u{letter:04x}" for letter in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def secure(page: str) -> str:
    """Return a page with a Content-Security-Policy of its own scripts, and with direction marks in its text as escapes.

    Names in its attributes and data stay as they are, since its scripts compare them.
    """
    pieces = _MARKUP.split(page)
    pieces[::2] = [text.translate(_DIRECTIONS) for text in pieces[::2]]
    page = "".join(pieces)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in dict.fromkeys(_SCRIPT.findall(page)))
    rules = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    start, found, rest = page.partition(_START)
    assert found, "the policy must precede everything that it governs"
    return f'{start}{found}<meta http-equiv="Content-Security-Policy" content="{rules}">\n{rest}'


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8", "backslashreplace")).digest()).decode("ascii")
