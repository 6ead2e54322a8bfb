"""What a training run shows: progress on standard error, the comparison and the verdict on standard output."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from crfrefine.cli.progress import NORMAL, QUIET, VERBOSE, ProgressLine
from crfrefine.cli.reporting import print_table
from crfrefine.text import for_terminal
from crfrefine.train.observer import Step, TrainingObserver

if TYPE_CHECKING:
    from crfrefine.statistics.comparison import SummaryRow
    from crfrefine.train.results import TrainingResult

_SECONDS_BETWEEN_LINES = 10.0


class TrainingReporter(TrainingObserver):
    """Shows a run: a live bar on a terminal, else a plain line now and then.

    Args:
        verbosity: QUIET: errors alone; NORMAL; VERBOSE: every step.
    """

    def __init__(self, verbosity: int = NORMAL) -> None:
        self._verbosity = verbosity
        self._line = ProgressLine(verbosity)
        self._shown = 0.0
        self._left: float | None = None

    def __enter__(self) -> Self:
        self._line.start(1.0, counts=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._line.stop()

    def run_started(self, text: str) -> None:
        """Say what is going to be done."""
        self._line.say(text)

    def note(self, text: str) -> None:
        """Say what was assumed."""
        self._line.say(f"note: {text}")

    def stage_started(self, stage: str) -> None:
        """Name the part of the run."""
        self._line.update(text=stage)
        if not self._line.is_shown:
            self._line.say(stage)
        self._shown = time.monotonic()

    def stepped(self, step: Step) -> None:
        """Say where the optimizer is, now and then."""
        score = "" if step.score is None else f", Dice {step.score:.4f}"
        text = f"{step.optimizer_step}/{step.num_optimizer_steps}: loss {step.loss:.4f}{score}, {step.thetas}"
        self._line.update(text=f"{step.stage} {text}")
        is_due = time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES
        if self._verbosity >= VERBOSE or (is_due and not self._line.is_shown):
            left = "" if self._left is None else f"; about {describe_duration(self._left)} left"
            self._line.say(f"  {step.stage} [{step.start}] {text}{left}")
            self._shown = time.monotonic()

    def progressed(self, fraction: float, seconds_left: float | None) -> None:
        """Move the bar."""
        self._left = seconds_left
        self._line.update(completed=fraction)

    def stage_ended(self, text: str) -> None:
        """Say what came of a part."""
        self._line.say(text)


def print_training(result: TrainingResult, verbosity: int = NORMAL) -> None:
    """Print the comparison of the methods, what was written where, and the verdict as the last line."""
    if verbosity > QUIET:
        names = ("region", "method", "Dice", "change", "95 % CI", "p (Holm)", "better/equal/worse", "HD95 mm", "ASSD mm")
        print_table(names, _rows(result), numbers=("Dice", "change", "HD95 mm", "ASSD mm"))
        for path in (result.options.output, result.options.report, result.options.curves):
            print(for_terminal(f"written: {path}"), file=sys.stderr)
    for note in result.comparison.verdict.notes:
        if verbosity > QUIET:
            print(for_terminal(f"note: {note}"), file=sys.stderr)
    print(for_terminal(f"verdict: {result.comparison.verdict.sentence}"))


def describe_duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rows(result: TrainingResult) -> list[tuple[str, ...]]:
    """Return a row a region and method, the mean over regions last."""
    from crfrefine.statistics.comparison import format_p
    from crfrefine.train.methods import METHODS

    found = {(row.metric, row.region, row.method): row for row in result.comparison.summary}
    regions = list(dict.fromkeys(row.region for row in result.comparison.summary))
    rows: list[tuple[str, ...]] = []
    for region in regions:
        for method in METHODS:
            row = found["dice", region, method]
            rows.append(
                (
                    region,
                    method,
                    f"{row.mean:.4f}",
                    *_changes(row),
                    "" if row.comparison is None else format_p(row.p_holm),
                    "" if row.comparison is None else f"{row.comparison.wins}/{row.comparison.ties}/{row.comparison.losses}",
                    f"{found['hd95_mm', region, method].mean:.2f}",
                    f"{found['assd_mm', region, method].mean:.3f}",
                )
            )
    return rows


def _changes(row: SummaryRow) -> tuple[str, str]:
    """Return mean difference and its interval in Dice points; the first of the methods is what the others are compared with."""
    if row.comparison is None:
        return "", ""
    low, high = row.comparison.interval
    interval = "" if low != low else f"{100 * low:+.2f} to {100 * high:+.2f}"
    return f"{100 * row.comparison.mean_difference:+.2f}", interval
