"""What a run shows while it goes on (standard error) and when it has ended (standard output)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from crfrefine.cli.progress import NORMAL, QUIET, VERBOSE, RunReporter
from crfrefine.infer.run import InferenceObserver
from crfrefine.text import listed, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.infer.records import CaseRecord, RunSummary

_MOST_LISTED = 20


class Reporter(RunReporter, InferenceObserver):
    """Shows a run: a live bar with case, stage and remaining time on a terminal, else a plain line a case.

    Args:
        verbosity: QUIET: errors alone; NORMAL; VERBOSE: also filters and times.
    """

    def __init__(self, verbosity: int = NORMAL) -> None:
        super().__init__(verbosity)
        self._summary: RunSummary | None = None
        self._notes: set[str] = set()

    def _describe_rest(self) -> str:
        if self._summary is None:
            return ""
        done = self._summary.count("done") + self._summary.count("skipped")
        return f"{done} of {self._summary.num_cases} cases are written and whole, run again with --continue for the rest"

    def run_started(self, summary: RunSummary) -> None:
        """Say what is going to be done, and where."""
        self._summary = summary
        part = f", part {summary.part_id} of {summary.num_parts}" if summary.num_parts > 1 else ""
        count = f"{summary.num_cases} case{'' if summary.num_cases == 1 else 's'}"
        threads = f"{summary.threads} thread{'' if summary.threads == 1 else 's'}"
        device = summary.device + (" (auto)" if summary.requested_device == "auto" else "")
        self._line.say(f"{count}{part}; device {device}, {threads}")
        if summary.num_cases:
            self._line.start(summary.num_cases, counts=True, detail="reading")

    def case_started(self, case_id: str, number: int) -> None:
        """Name the case."""
        self._line.update(text=case_id, detail="")

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Name the stage, and count the steps of a case as parts of it, so that the time that is left shows in the first case too."""
        self._line.update(text=case_id or None, detail=f"{stage} {step}/{num_steps}" if num_steps > 1 else stage)
        if num_steps > 1:
            self._line.update(completed=self._ended + 0.9 * step / num_steps)

    def note(self, text: str, *, case_id: str = "") -> None:
        """Say what was assumed; what holds for many cases is said of the first one, or of each when verbose."""
        # A note begins with the name of a file, and what follows a colon may have its numbers.
        gist = text.partition(" ")[2].partition(":")[0] if case_id else text
        if self._verbosity >= VERBOSE or gist not in self._notes:
            self._line.say(f"{case_id}: {text}" if case_id else text)
        self._notes.add(gist)

    def case_ended(self, record: CaseRecord) -> None:
        """Say what became of a case."""
        self._ended += 1
        total = self._summary.num_cases if self._summary is not None else 0
        head = f"[{self._ended}/{total}] {record.case_id}"
        if record.status == "failed":
            self._line.say(f"crfrefine: error: {_with_case(record)}", at_least=QUIET)
            self._line.say_traceback(record.failures[0].traceback)
        elif record.status == "skipped":
            self._line.say(f"{head}: there already, skipped")
        elif not self._line.is_shown or self._verbosity >= VERBOSE:
            numbers = f"{describe_steps(record)}, {num_changed(record):,} voxels changed, {record.seconds:.2f} s"
            self._line.say(f"{head}: {numbers} -> {record.output}")
        if self._verbosity >= VERBOSE and record.status == "done":
            for line in record.report.filters if record.report else ():
                self._line.say(f"    {line}")
            self._line.say("    " + ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in record.times.items()))
        self._line.update(completed=self._ended)

    def run_ended(self, summary: RunSummary) -> None:
        """Take the bar away and list the failures of a long run again, together."""
        self._line.stop()
        counts = [f"{summary.count(status)} {status}" for status in ("done", "skipped", "failed") if summary.count(status)]
        if not summary.interrupted:
            left = summary.num_cases - len(summary.cases)
            if left:
                counts.append(f"{left} not looked at")
            self._line.say(f"{', '.join(counts) or 'no case in this part'} in {summary.seconds:.1f} s")
        failed = [record.case_id for record in summary.cases if record.status == "failed"]
        if failed and summary.num_cases > 1:
            self._line.say(f"failed: {listed(failed, most=_MOST_LISTED)}")


def print_results(summary: RunSummary) -> None:
    """Print a row a case on standard output: a table on a terminal, else values separated by tabs under a line of names."""
    names = ("case", "status", "steps", "changed", "seconds", "output")
    rows = [
        (
            record.case_id,
            record.status,
            "" if record.report is None else str(record.report.num_iterations),
            "" if record.changes is None else str(record.changes.voxels_changed),
            f"{record.seconds:.2f}" if record.times else "",
            "" if record.output is None else str(record.output),
        )
        for record in summary.cases
    ]
    if rows:
        print_table(names, rows, numbers=("steps", "changed", "seconds"))


def print_table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: tuple[str, ...] = ()) -> None:
    """Print a table on standard output, for people on a terminal, for programs elsewhere; the columns in `numbers` are right-aligned.

    Tabs, line breaks and what else does not print stand in cells as in Python's strings: a row stays a line, a cell a cell.
    """
    rows = [tuple(map(printable, row)) for row in rows]
    if not sys.stdout.isatty():
        for row in (names, *rows):
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def describe_steps(record: CaseRecord) -> str:
    """Return how many steps were taken, and whether that was enough."""
    count = record.report.num_iterations if record.report else 0
    return f"{count} step{'' if count == 1 else 's'}{' (converged)' if record.report and record.report.converged else ''}"


def num_changed(record: CaseRecord) -> int:
    """Return how many voxels changed their label."""
    return record.changes.voxels_changed if record.changes else 0


def _with_case(record: CaseRecord) -> str:
    """Return the error of a case with the case's name in front, unless the message names it already."""
    error = record.failures[0].message
    return error if repr(record.case_id) in error.partition("\n")[0] else f"case {record.case_id!r}: {error}"
