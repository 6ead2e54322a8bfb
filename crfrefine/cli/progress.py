"""Progress and messages on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET, NORMAL, VERBOSE = range(3)


class ProgressLine:
    """A line that is drawn over and over while something goes on, and messages above it.

    Args:
        verbosity: QUIET: no line, and no message that is not at least as important; NORMAL; VERBOSE.
    """

    def __init__(self, verbosity: int = NORMAL) -> None:
        self._verbosity = verbosity
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar, so that what it shows need not be said."""
        return self._bar is not None

    def start(self, total: float, *, counts: bool, text: str = "", detail: str = "") -> None:
        """Show the bar, on a terminal and unless QUIET.

        Args:
            total: what `completed` ends with.
            counts: whether it is a number of things; otherwise percents are shown.
            text: what is going on.
            detail: part of that.
        """
        if self._verbosity <= QUIET or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            MofNCompleteColumn() if counts else TaskProgressColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, text=text, detail=detail)
        self._bar.start()

    def update(self, *, completed: float | None = None, text: str | None = None, detail: str | None = None) -> None:
        """Change what the bar shows; None leaves it as it is."""
        if self._bar is None or self._task is None:
            return
        fields: dict[str, Any] = {name: value for name, value in (("text", text), ("detail", detail)) if value is not None}
        self._bar.update(self._task, completed=completed, **fields)

    def say(self, text: str, at_least: int = NORMAL) -> None:
        """Print a message, unless it takes more verbosity than there is."""
        if self._verbosity < at_least:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
