"""The files that a run writes about itself while it goes on, so that a killed run leaves the records of its cases.

The record in the output folder, and `infer --summary FILE.jsonl`, get a line as each case ends; `--summary FILE.json` is one JSON value.
`summary_reading.py` reads them again.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import cannot_write, write_small_file
from crfrefine.io.lines import append_lines, open_lines
from crfrefine.runs.infer.records import CaseRecord, RunSummary, is_lines, to_line

SAVE_SECONDS = 1.0
"""Shortest time between two saves of a JSON value."""

_SHARE_OF_TIME = 0.05
"""Part of the time that saving, or waiting for the disk, may take; with many thousand cases, saves are rarer.

A kill loses nothing that was written; a power cut loses the part that the disk has not written yet.
"""


def summary_file(path: Path, summary: RunSummary, *, resume: bool) -> SummaryFile | SummaryLines:
    """Return the file for a summary, by its name."""
    if is_lines(path):
        return SummaryLines(path, summary, append=resume)
    return SummaryFile(path, summary)


class SummaryLines:
    """The file of a run's summary, as JSON lines: a line of the run, one per case, and a last one when the run ends."""

    def __init__(self, path: Path, summary: RunSummary, *, append: bool) -> None:
        self._path = path
        self._summary = summary
        self._append = append
        self._file: int | None = None
        self._waiting = b""  # Bytes that the disk has not taken.
        self._synced, self._sync_seconds = -float("inf"), 0.0
        self._lock = threading.Lock()

    def save_first(self) -> None:
        """Write the line of the run."""
        head = {name: value for name, value in self._summary.head().items() if name not in ("seconds", "interrupted")}
        line = to_line({"run": "started", **head})
        if not self._append:
            write_small_file(self._path, line)
        self._file = open_lines(self._path)
        if self._append:
            self._waiting = line
            try:
                self._write()
            except OSError as error:
                raise cannot_write(self._path, error) from error

    def case_ended(self, record: CaseRecord) -> None:
        """Write the record of a case; if the disk does not take it, it is written with the next one."""
        with self._lock:
            self._waiting += to_line(record.to_dict())
            if self._file is not None:
                with suppress(OSError):  # If the file still cannot be written at the end, `save_last` reports it.
                    self._write()

    def save_last(self) -> None:
        """Write the last line."""
        ended = {"run": "ended", "seconds": self._summary.seconds, "interrupted": self._summary.interrupted, **self._summary.counts()}
        with self._lock:
            self._waiting += to_line(ended)
            if self._file is None:
                write_small_file(self._path, self._waiting)
                return
            try:
                self._write(sync=True)
            except OSError as error:
                raise cannot_write(self._path, error) from error
            finally:
                os.close(self._file)
                self._file = None

    def _write(self, *, sync: bool = False) -> None:
        """Write the lines that are waiting; lines that a full disk does not take keep waiting."""
        assert self._file is not None
        started = time.monotonic()
        syncs = sync or started - self._synced >= self._sync_seconds / _SHARE_OF_TIME
        append_lines(self._file, self._waiting, sync=syncs)
        self._waiting = b""
        if syncs:
            self._synced = time.monotonic()
            self._sync_seconds = self._synced - started


class SummaryFile:
    """The file of a run's summary; until `save_last`, its content says that the run was interrupted, which is true if it is killed."""

    def __init__(self, path: Path, summary: RunSummary) -> None:
        self._path = path
        self._summary = summary
        self._saves_early = True
        self._started = time.perf_counter()
        self._timer: threading.Timer | None = None
        self._due = time.monotonic()
        self._lock = threading.Lock()  # of the fields above
        self._writing = threading.Lock()

    def save_first(self) -> None:
        """Save the run without cases, so that a run that is killed in its first case leaves its plan."""
        self._save()

    def case_ended(self, record: CaseRecord) -> None:
        """Save the record of a case, which the summary has, in the background: now, or when enough time has passed since the last time."""
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
