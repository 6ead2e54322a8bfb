"""Progress of a run on standard error: a live bar on a terminal, else plain lines."""

from __future__ import annotations

import re
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from crfrefine.base.failures import Causes, Failure
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.observer import CaseT, Observer, RunT
from crfrefine.base.text import counted, for_terminal, listed, printable
from crfrefine.cli.failures import indented
from crfrefine.engines import unexpected_device
from crfrefine.records.records import CaseRecord, RunSummary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.progress import Progress

    from crfrefine.convert.folder import Conversion
    from crfrefine.statistics.verdict import Verdict


# Levels of verbosity.
QUIET = 0
NORMAL = 1
VERBOSE = 2

# Notes that every case has: on its losses. From the second case on, without advice.
LOSSES = {
    NoteKind.VANISHED: NoteKind.VANISHED,
    NoteKind.VANISHED_BY_CRF: NoteKind.VANISHED,
    NoteKind.REMOVED_BY_RULES: NoteKind.REMOVED_BY_RULES,
}
MAX_LISTED = 20


class RunReporter(Observer[RunT, CaseT], AbstractContextManager[Any]):
    """Shows the events of a run: messages, and on a terminal a line that is redrawn.

    Without that line, a stage is shown where nothing was printed for some time.
    """

    silent_seconds = 30.0  # after which a stage is shown
    tells_all_from = VERBOSE + 1  # the verbosity from which on every stage is shown
    before_note = "note: "
    before_note_on_case = "note: case {!r}: "

    def __init__(self, verbosity: int = NORMAL) -> None:
        """Take QUIET: no line, and only errors; or VERBOSE: further details of the command."""
        self.verbosity = verbosity
        self._bar: Progress | None = None  # Its content need not be printed.
        self._total = 0  # cases of the run
        self._ended = 0  # cases that have ended
        self._began = 0.0
        self._said = 0.0  # when the last line was printed
        self._name = ""  # the case or training that was last in a stage
        self._name_began = 0.0
        # seconds that the run takes from now on, if that is known
        self._left: float | None = None
        self._known: set[Any] = set()  # notes about one case that probably apply to all
        self._causes: Causes | None = None  # of the failures so far, if there are any
        self._rest = ""  # after an interrupt: how much is done, and how to do the rest

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if isinstance(error, KeyboardInterrupt) and self._rest:
            error.add_note(self._rest)

    def note(self, note: Note, *, case_id: str = "") -> None:
        """Print an assumption, or a note on ignored files.

        One about a case is printed for the first of many cases, or for each if VERBOSE.
        """
        before = self.before_note_on_case.format(case_id) if case_id else self.before_note
        what = str(note.values.get("what", ""))
        if case_id:
            what = re.sub(rf"(?<![^\W_]){re.escape(case_id)}(?![^\W_])", "", what)
        gist = (note.kind, note.part, what)  # alike for many cases
        if self.verbosity >= VERBOSE or not case_id or gist not in self._known:
            self._say(f"{before}{note}")
        elif note.kind in LOSSES:
            self._say(f"{before}{replace(note, kind=LOSSES[note.kind])}")
        self._known.add(gist)

    def cases_found(self, text: str) -> None:
        """Print how many cases a pattern has."""
        if text:
            self._say(text)

    def roles_found(self, summary: str, reasons: Sequence[tuple[str, str]]) -> None:
        """Print the roles of the inputs: in a line, or if VERBOSE a line per file and why."""
        if self.verbosity < VERBOSE:
            self._say(summary)
            return
        for role, reason in reasons:
            self._say(f"{role}: {reason}")

    def stage_changed(self, name: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Show the stage.

        Steps are parts of a case, so that even the first one has a remaining time.
        """
        completed = None
        if num_steps > 1:
            completed = min(self._total, self._ended + 0.9 * step / num_steps)
            stage += f" {step}/{num_steps}"
        if not name:
            self._show(completed, text=stage, detail=" ")
            return
        if name != self._name:
            self._name = name
            self._name_began = time.monotonic()
        self._show(completed, f"{name}: {stage}", text=name, detail=stage)

    def progressed(self, fraction: float, done: str = "") -> None:
        """Move the bar."""
        self._left = None
        if fraction:
            self._left = (time.monotonic() - self._began) * (1.0 - fraction) / fraction
        self._show(fraction, done)

    def _show(self, completed: float | None, line: str = "", **fields: str) -> None:
        """Show the work in progress: in the bar, whose fields change, or in a line with a time.

        There is a line if it has a text, and nothing has shown for long that the run goes on.
        """
        if self._bar is not None:
            texts: dict[str, Any] = {name: printable(text) for name, text in fields.items()}
            self._bar.update(self._bar.task_ids[0], completed=completed, **texts)
        is_silent = time.monotonic() - self._said >= self.silent_seconds
        is_due = self._bar is None and is_silent
        if line and (is_due or self.verbosity >= self.tells_all_from):
            clock = f"{time.monotonic() - self._name_began:.0f} s so far"
            if self._left is not None:
                clock = f"about {timedelta(seconds=round(self._left))} left"
            self._say(f"{line}, {clock}", is_timed=True)

    def stage_ended(self, text: str) -> None:
        """Print the outcome of a part of the run."""
        self._say(text)

    def _begin(
        self, amount: str, total: float = 0, *, counts: bool = True, detail: str = ""
    ) -> None:
        """Print the amount of work, and on a terminal, unless QUIET, show a bar up to a total.

        It counts cases, or else shows percentages of the total.
        """
        self._began = time.monotonic()
        self._name_began = self._began
        if counts:
            self._total = int(total)
        if amount:
            self._say(amount)
        if not total or self.verbosity <= QUIET or not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        column: progress.ProgressColumn = progress.TaskProgressColumn()
        if counts:
            column = progress.MofNCompleteColumn()
        self._bar = progress.Progress(
            column,
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[text]}", markup=False),
            progress.TextColumn("{task.fields[detail]}", style="dim", markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left", style="dim"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._bar.add_task("", total=total, text="", detail=detail)
        self._bar.start()

    def _end_case(self, name: str, failures: Sequence[Failure], outcome: str) -> None:
        """Count a case that has ended, and print its failures, or else its outcome, if any.

        Of several failures with one cause only the first is printed, unless VERBOSE, which also
        shows tracebacks.
        """
        self._ended += 1
        self._show(self._ended, text=name)
        for failure in failures:
            self._causes = self._causes or Causes()
            if self._causes.is_new(name, failure) or self.verbosity >= VERBOSE:
                self._say(f"crfrefine: error: {failure}", at_least=QUIET, is_timed=True)
            if failure.traceback is not None:
                self._say(indented(failure.traceback), at_least=VERBOSE)
        if outcome and not failures:
            self._say(f"[{self._ended}/{self._total}] {outcome}", is_timed=True)

    def _say(self, text: str, at_least: int = NORMAL, *, is_timed: bool = False) -> None:
        """Print a message if the verbosity is high enough.

        In a log, unlike on a terminal, the time of day comes before one that `is_timed`.
        """
        if self.verbosity < at_least:
            return
        self._said = time.monotonic()
        if is_timed and not sys.stderr.isatty():
            text = f"{time.strftime('%H:%M:%S')} {text}"
        text = for_terminal(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """Remove the bar, and print a line for each cause of several failures.

        Once, at the end of a run.
        """
        if self._bar is not None:
            self._bar.stop()
        if self._causes is not None and self.verbosity < VERBOSE:
            for line in self._causes.others():
                self._say(f"crfrefine: error: {line}", at_least=QUIET)
        self._causes = None

    def _counts_of(self, counts: Mapping[str, int]) -> str:
        """Return how many cases of the run ended in which way, and how many were not started."""
        texts = [f"{number} {way}" for way, number in counts.items() if number]
        if sum(counts.values()) < self._total:
            texts.append(f"{self._total - sum(counts.values())} not started")
        return ", ".join(texts)

    def _say_names(self, title: str, names: Sequence[str], at_least: int = NORMAL) -> None:
        """Print the names of cases or files, if there are any."""
        if names:
            self._say(f"{title}: {listed(names, most=MAX_LISTED)}", at_least)


class Reporter(RunReporter["RunSummary", "CaseRecord"]):
    """Shows a run of `infer`.

    On a terminal, a live bar has case, stage and remaining time; else there is one plain line per
    case. VERBOSE adds filters and times.
    """

    before_note = ""
    before_note_on_case = "{}: "
    note_on_parameters: Note | None = None  # which ones are taken, if that needs saying
    summary: RunSummary | None = None  # of the run that is shown

    def run_started(self, summary: RunSummary) -> None:
        """Print the amount of work, and the device unless it goes without saying."""
        self.summary = summary
        if self.verbosity <= QUIET:
            return
        cases = counted(summary.num_cases, "case")
        if summary.num_parts > 1:
            others = counted(len(summary.all_cases) - summary.num_cases, "case")
            cases = (
                f"part {summary.part_id} of parts 0–{summary.num_parts - 1}: {cases}; "
                f"the other parts ({others}) are not run here"
            )
        means = [counted(summary.threads, "thread")]
        device = unexpected_device(summary.requested_device, summary.device)
        if device is None and self.verbosity >= VERBOSE:
            device = f"device {summary.device}"
            if summary.requested_device == "auto":
                device += " (auto)"
        if device is not None:
            means.insert(0, device)
        self._begin(f"{cases}; {', '.join(means)}", summary.num_cases, detail="reading")
        if self.note_on_parameters is not None:
            self.note(self.note_on_parameters)

    def case_ended(self, record: CaseRecord) -> None:
        """Print the outcome of a case."""
        failures = [replace(one, case_id=record.case_id) for one in record.failures[:1]]
        outcome = ""
        told_from = NORMAL if self._bar is None else VERBOSE
        if record.status == "skipped":
            outcome = f"{record.case_id}: exists, skipped"
        elif self.verbosity >= told_from:
            steps = counted(record.num_iterations or 0, "step")
            if record.converged:
                steps += " (converged)"
            num_changed = record.voxels_changed or 0
            voxels = "voxel" if num_changed == 1 else "voxels"
            done = f"{steps}, {num_changed:,} {voxels} changed, {record.seconds:.2f} s"
            outcome = f"{record.case_id}: {done} -> {record.output}"
        self._end_case(record.case_id, failures, outcome)
        if record.status == "done" and self.verbosity >= VERBOSE:
            times = [f"{stage} {seconds:.3f} s" for stage, seconds in record.times.items()]
            for line in (*record.filters, ", ".join(times)):
                self._say(f"    {line}")

    def run_ended(self, summary: RunSummary) -> None:
        """Remove the bar and list all failures of a long run again."""
        self._stop()
        if summary.interrupted:
            done = summary.count("done") + summary.count("skipped")
            self._rest = (
                f"{done} of {summary.num_cases} cases are written; "
                "run again with --continue for the rest"
            )
        else:
            counts = {status: summary.count(status) for status in ("done", "skipped", "failed")}
            what = self._counts_of(counts) or "no case in this part"
            self._say(f"{what} in {summary.seconds:.1f} s", is_timed=True)
        if summary.component_changes:
            self._say(summary.component_changes)
        if summary.num_cases == 1:
            return
        vanished = [record.case_id for record in summary.cases if record.vanished_labels]
        self._say_names(f"labels that vanished in {counted(len(vanished), 'case')}", vanished)
        failed = [record.case_id for record in summary.cases if record.status == "failed"]
        self._say_names("failed", failed)


class FolderReporter(RunReporter["Sequence[Conversion]", "Conversion"]):
    """Shows the conversion of a folder: a bar or a line per file, and all failures at the end."""

    def run_started(self, files: Sequence[Conversion]) -> None:
        """Print the amount of work."""
        # In several folders, files may have the same name.
        self._has_folders = len({file.source.parent for file in files}) > 1
        self._begin(counted(len(files), "file"), len(files), detail="converting")

    def case_ended(self, conversion: Conversion) -> None:
        """Print the outcome of a file."""
        name = self._name_of(conversion)
        failures = [conversion.failure] if conversion.failure is not None else []
        self._end_case(name, failures, conversion.sentence.replace("\n", "\n  "))

    def _name_of(self, conversion: Conversion) -> str:
        if self._has_folders:
            return str(conversion.source)
        return conversion.source.name

    def run_ended(self, conversions: Sequence[Conversion]) -> None:
        """Remove the bar, and list all failures again."""
        self._stop()
        failed = [self._name_of(file) for file in conversions if file.failure is not None]
        counts = {"done": len(conversions) - len(failed), "failed": len(failed)}
        self._say(self._counts_of(counts))
        self._say_names("failed", failed, at_least=QUIET)


def sentences_of(verdict: Verdict) -> list[str]:
    """Return a verdict's words on the probabilities and on harm, if any."""
    parts = (verdict.probabilities, verdict.harm)
    return [part.sentence for part in parts if part is not None]
