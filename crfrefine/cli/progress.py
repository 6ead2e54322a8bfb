"""Progress and messages on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from crfrefine.base.failures import Causes
from crfrefine.base.text import for_terminal, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from crfrefine.base.failures import Failure

QUIET, NORMAL, VERBOSE = range(3)


def print_failure(failure: Failure, *, verbose: bool) -> None:
    """Print a failure on standard error, with the traceback if it was unexpected and the traceback is wanted."""
    print(for_terminal(f"crfrefine: error: {failure.message}"), file=sys.stderr)
    if verbose and failure.traceback is not None:
        print(for_terminal(indented(failure.traceback)), file=sys.stderr)


def indented(text: str) -> str:
    """Return a traceback as a part of a message: `for_terminal` keeps indented lines."""
    return "\n".join(f"  {line}" for line in text.splitlines())


class RunReporter:
    """Display of the three commands that run cases: on a terminal a line that is redrawn, with messages above it, else only the messages.

    Args:
        verbosity: QUIET: no line, and only errors; NORMAL; VERBOSE: further details of the command.
    """

    def __init__(self, verbosity: int = NORMAL) -> None:
        self._verbosity = verbosity
        self._bar: Progress | None = None  # Its content need not be printed.
        self._task: TaskID | None = None
        self._ended = 0
        self._known: set[str] = set()  # Messages about one case that probably apply to all.
        self._causes = Causes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if isinstance(error, KeyboardInterrupt) and (left := self._describe_rest()):
            error.add_note(left)

    def note(self, text: str, *, case_id: str = "") -> None:
        """Print an assumption, or a note on ignored files."""
        self._say(f"note: {text}")

    def _describe_rest(self) -> str:
        """Return how much is done after an interrupt, and how to do the rest; empty if there is nothing to say."""
        return ""

    def _start(self, total: float, *, counts: bool, detail: str = "") -> None:
        """Show the bar, on a terminal and unless QUIET; it counts things up to a total, or shows percentages of it."""
        if self._verbosity <= QUIET or not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.MofNCompleteColumn() if counts else progress.TaskProgressColumn(),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[text]}", markup=False),
            progress.TextColumn("{task.fields[detail]}", style="dim", markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left", style="dim"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, text="", detail=detail)
        self._bar.start()

    def _update(self, *, completed: float | None = None, text: str | None = None, detail: str | None = None) -> None:
        """Change the content of the bar; None leaves a value unchanged."""
        if self._bar is None or self._task is None:
            return
        fields: dict[str, Any] = {name: printable(value) for name, value in (("text", text), ("detail", detail)) if value is not None}
        self._bar.update(self._task, completed=completed, **fields)

    def _say(self, text: str, at_least: int = NORMAL) -> None:
        """Print a message if the verbosity is high enough."""
        if self._verbosity < at_least:
            return
        text = for_terminal(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _say_failure(self, case_id: str, text: str, traceback: str | None) -> None:
        """Print the failure of a case; of several with one cause only the first, unless VERBOSE, which also shows tracebacks."""
        if self._causes.is_new(case_id, text) or self._verbosity >= VERBOSE:
            self._say(f"crfrefine: error: {text}", at_least=QUIET)
        if traceback is not None:
            self._say(indented(traceback), at_least=VERBOSE)

    def _stop(self) -> None:
        """Remove the bar, and print a line for each cause of several failures; once, at the end of a run."""
        if self._bar is not None:
            self._bar.stop()
        for line in self._causes.others() if self._verbosity < VERBOSE else ():
            self._say(f"crfrefine: error: {line}", at_least=QUIET)
        self._causes = Causes()
