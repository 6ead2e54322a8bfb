"""The file of `infer --summary FILE.json`: saved while the run goes on, so that a killed run leaves its records, and at its end.

`summary_reading.py` reads it again, and `summary_lines.py` writes the summary as JSON lines.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.special_files import special_kind
from crfrefine.runs.infer.records import CaseRecord, RunSummary
from crfrefine.runs.infer.summary_lines import SummaryLines
from crfrefine.runs.infer.summary_reading import is_lines

SAVE_SECONDS = 1.0
"""Shortest time between two saves."""

_SHARE_OF_TIME = 0.05
"""Saving a summary of many thousand cases takes longer: it may take this share of the time."""


def summary_file(path: Path, summary: RunSummary, *, resume: bool) -> SummaryFile | SummaryLines:
    """Return the file for a summary, by its name."""
    if is_lines(path):
        return SummaryLines(path, summary, append=resume)
    return SummaryFile(path, summary)


class SummaryFile:
    """The file of a run's summary; until `save_last`, its content says that the run was interrupted, which is true if it is killed.

    A pipe or a device takes the last content alone.
    """

    def __init__(self, path: Path, summary: RunSummary) -> None:
        self._path = path
        self._summary = summary
        self._saves_early = special_kind(path) is None
        self._started = time.perf_counter()
        self._timer: threading.Timer | None = None
        self._due = time.monotonic()
        self._lock = threading.Lock()  # of the fields above
        self._writing = threading.Lock()

    def save_first(self) -> None:
        """Save the run without cases, so that a run that is killed in its first case leaves what it was about to do."""
        self._save()

    def case_ended(self, record: CaseRecord) -> None:
        """Save the record of a case, which the summary has, soon."""
        self.save_soon()

    def save_soon(self) -> None:
        """Save in the background: now, or when enough time has passed since the last time."""
        with self._lock:
            if not self._saves_early or self._timer is not None:
                return
            self._timer = threading.Timer(max(0.0, self._due - time.monotonic()), self._save)
            self._timer.daemon = True
            self._timer.start()

    def save_last(self) -> None:
        """Save the summary as it stands."""
        with self._lock:
            self._saves_early = False
            if self._timer is not None:
                self._timer.cancel()
        with self._writing:
            write_small_file(self._path, self._summary.to_json().encode())

    def _save(self) -> None:
        with self._lock:
            self._timer = None  # A case that ends from now on asks for the next save.
            self._due = time.monotonic() + SAVE_SECONDS
        with self._writing:
            if not self._saves_early:
                return
            started = time.monotonic()
            seconds = time.perf_counter() - self._started
            cases = sorted(self._summary.cases, key=lambda record: record.case_id)
            content = replace(self._summary, interrupted=True, seconds=seconds, cases=cases).to_json()
            with suppress(CrfRefineError):  # If the file still cannot be written at the end, `save_last` reports it.
                write_small_file(self._path, content.encode())
            with self._lock:
                self._due = max(self._due, time.monotonic() + (time.monotonic() - started) / _SHARE_OF_TIME)
