"""Output of a training run: progress on standard error, the comparison and the verdict on standard output."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from crfrefine.base.text import for_terminal
from crfrefine.cli.progress import NORMAL, QUIET, VERBOSE, RunReporter
from crfrefine.cli.reporting import print_table
from crfrefine.train.observer import Step, TrainingObserver

if TYPE_CHECKING:
    from crfrefine.metrics.registry import Metric
    from crfrefine.train.comparison import TrainingResult
    from crfrefine.train.options import CommonOptions, UnlabeledOptions
    from crfrefine.train.unlabeled import Choice

_SECONDS_BETWEEN_LINES = 10.0
_MAX_SETS = 5


class TrainingReporter(RunReporter, TrainingObserver):
    """Shows a run: a live bar on a terminal, else an occasional plain line; VERBOSE: every step."""

    _shown = 0.0
    _left: float | None = None

    def __enter__(self) -> Self:
        self._start(1.0, counts=False)
        return self

    def run_started(self, text: str) -> None:
        """Print the amount of work."""
        self._say(text)

    def stage_started(self, stage: str) -> None:
        """Show the part of the run."""
        self._update(text=stage)
        if self._bar is None:
            self._say(stage)
        self._shown = time.monotonic()

    def stepped(self, step: Step) -> None:
        """Print the progress of the optimizer occasionally."""
        score = "" if step.score is None else f", Dice {step.score:.4f}"
        text = f"{step.optimizer_step}/{step.num_optimizer_steps}: loss {step.loss:.4f}{score}, {step.thetas}"
        self._update(text=f"{step.stage} {text}")
        if self._verbosity >= VERBOSE or (self._is_due and self._bar is None):
            self._say(f"  {step.stage} [{step.start}] {text}{self._time_left}")
            self._shown = time.monotonic()

    def progressed(self, fraction: float, seconds_left: float | None, done: str = "") -> None:
        """Move the bar; without one, print the progress occasionally."""
        self._left = seconds_left
        self._update(completed=fraction)
        if done and self._bar is None and self._is_due:
            self._say(f"  {done}{self._time_left}")
            self._shown = time.monotonic()

    def stage_ended(self, text: str) -> None:
        """Print the result of a part."""
        self._say(text)

    @property
    def _is_due(self) -> bool:
        """Whether the last line is some time ago."""
        return time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES

    @property
    def _time_left(self) -> str:
        """The end of a line: how long it will take; empty if that is unknown."""
        return "" if self._left is None else f"; about {describe_duration(self._left)} left"


def print_training(result: TrainingResult, verbosity: int = NORMAL) -> None:
    """Print the comparison of the methods, the written files, the probabilities, what got worse, and the verdict as the last line."""
    from crfrefine.statistics.comparison import describe_families

    judged = result.comparison.verdict
    if verbosity > QUIET:
        rows = _rows(result)
        first, *others = (f"{metric.title} {metric.unit}".rstrip() for metric in _metrics())
        change = f"change, {_metrics()[0].difference_unit}"
        names = ("region", "method", first, change, "95 % CI", "p (Holm)", "better/equal/worse", *others)
        if rows:
            print_table(names, rows, numbers=(first, change, *others))
            print(f"p (Holm): {describe_families(result.comparison.summary)}")
        _print_written(result.plan.options)
        for note in judged.notes:
            print(for_terminal(f"note: {note}"), file=sys.stderr)
        if judged.probabilities is not None:
            print(for_terminal(judged.probabilities.sentence))
        if judged.harm is not None:
            print(for_terminal(judged.harm.sentence))
    print(for_terminal(f"verdict: {judged.sentence}"))


def _print_written(options: CommonOptions) -> None:
    """Name the existing files: without matplotlib, a training has no picture."""
    for path in options.files[::-1]:
        if path.exists():
            print(for_terminal(f"written: {path}"), file=sys.stderr)


def print_choice(choice: Choice, options: UnlabeledOptions, verbosity: int = NORMAL) -> None:
    """Print the sets of parameters that gain most, the written files, and the verdict as the last line."""
    if verbosity > QUIET:
        order = sorted(enumerate(choice.gains), key=lambda pair: -pair[1])[:_MAX_SETS]
        gain = "points against default, synthetic cases"
        if order:
            print_table(("parameters", gain), [(choice.candidates[number].name, f"{100 * own:+.2f}") for number, own in order], (gain,))
        _print_written(options)
    print(for_terminal(f"verdict: {choice.describe()}"))


def describe_duration(seconds: float) -> str:
    """Return a duration in a readable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rows(result: TrainingResult) -> list[tuple[str, ...]]:
    """Return one row per region and method, the mean over regions last."""
    from crfrefine.statistics.comparison import comparison_texts
    from crfrefine.train.methods import METHODS

    first, *others = _metrics()
    found = {(row.metric, row.region, row.method): row for row in result.comparison.summary}
    regions = list(dict.fromkeys(row.region for row in result.comparison.summary))
    rows: list[tuple[str, ...]] = []
    for region in regions:
        for method in METHODS:
            row = found[first.name, region, method]
            means = (metric.value_text(found[metric.name, region, method].mean) for metric in others)
            rows.append((region, method, first.value_text(row.mean), *comparison_texts(row), *means))
    return rows


def _metrics() -> list[Metric]:
    """Return the displayed metrics: first the one of the verdict, compared with the network."""
    from crfrefine.metrics.registry import metric_named
    from crfrefine.train.methods import METRICS

    return [metric for metric in map(metric_named, METRICS) if metric.in_overview]
