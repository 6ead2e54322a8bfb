"""Output of a training run: progress on standard error, the comparison and the verdict on standard output."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from crfrefine.base.text import for_terminal
from crfrefine.cli.reporting import NORMAL, QUIET, VERBOSE, RunReporter, print_table
from crfrefine.train.observer import TrainingObserver

if TYPE_CHECKING:
    from crfrefine.train.comparison import TrainingResult
    from crfrefine.train.options import UnlabeledOptions
    from crfrefine.train.unlabeled import Choice

_SECONDS_BETWEEN_LINES = 10.0
_MAX_SETS = 5


class TrainingReporter(RunReporter, TrainingObserver):
    """Shows a run: a live bar on a terminal, else an occasional plain line; VERBOSE: every step."""

    _shown = 0.0
    _left: float | None = None  # seconds
    _began = 0.0

    def __enter__(self) -> Self:
        self._start(1.0, counts=False)
        return self

    def run_started(self, text: str) -> None:
        """Print the amount of work."""
        self._say(text)
        self._began = time.monotonic()

    def stage_started(self, stage: str) -> None:
        """Show the part of the run."""
        self._update(text=stage)
        if self._bar is None:
            self._say(stage)
        self._shown = time.monotonic()

    def stepped(self, stage: str, start: str, state: str) -> None:
        """Print the progress of the optimizer occasionally."""
        self._update(text=f"{stage} {state}")
        self._say_if_due(f"  {stage} [{start}] {state}", is_wanted=self.verbosity >= VERBOSE)

    def progressed(self, fraction: float, done: str = "") -> None:
        """Move the bar; without one, print the progress occasionally."""
        if fraction:
            self._left = (time.monotonic() - self._began) * (1.0 - fraction) / fraction
        else:
            self._left = None
        self._update(completed=fraction)
        if done:
            self._say_if_due(f"  {done}")

    def stage_ended(self, text: str) -> None:
        """Print the result of a part."""
        self._say(text)

    def _say_if_due(self, text: str, *, is_wanted: bool = False) -> None:
        """Print a line with the time that is left, without a bar now and then."""
        if is_wanted or (
            self._bar is None and time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES
        ):
            self._say(
                text
                + (
                    ""
                    if self._left is None
                    else f"; about {timedelta(seconds=round(self._left))} left"
                )
            )
            self._shown = time.monotonic()


def print_training(result: TrainingResult, verbosity: int = NORMAL) -> None:
    """Print the comparison of the methods, the written files, the probabilities, what got worse, and the verdict as the last line."""
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.comparison import HARM_COLUMN, comparison_texts, describe_families
    from crfrefine.train.comparison import METHODS, METRICS

    judged = result.comparison.verdict
    summary = result.comparison.summary
    if verbosity > QUIET:
        # The first metric is that of the verdict, compared with the network.
        first, *others = (metric for metric in map(metric_named, METRICS) if metric.in_overview)
        found = {(row.metric, row.region, row.method): row for row in summary}
        rows = []
        for region, method in [
            (region, method)
            for region in dict.fromkeys(row.region for row in summary)
            for method in METHODS
        ]:
            if (
                first.name,
                region,
                method,
            ) not in found:  # Rivals for the output of a coarser network, or those for any other.
                continue
            row = found[first.name, region, method]
            means = [
                metric.value_text(found[metric.name, region, method].mean) for metric in others
            ]
            rows.append(
                (region, method, first.value_text(row.mean), *comparison_texts(row), *means)
            )
        head, *tail = (f"{metric.title} {metric.unit}".rstrip() for metric in (first, *others))
        change = f"change, {first.difference_unit}"
        if rows:
            names = (
                "region",
                "method",
                head,
                change,
                "95 % CI",
                "p (Holm)",
                "better/equal/worse",
                HARM_COLUMN,
                *tail,
            )
            print_table(names, rows, numbers=(head, change, *tail))
            print(f"p (Holm): {describe_families(summary)}")
        for path in result.plan.options.files[::-1]:
            print(for_terminal(f"written: {path}"), file=sys.stderr)
        for note in judged.notes:
            print(for_terminal(f"note: {note}"), file=sys.stderr)
        for part in (judged.probabilities, judged.harm):
            if part is not None:
                print(for_terminal(part.sentence))
    print(for_terminal(f"verdict: {judged.sentence}"))


def print_choice(choice: Choice, options: UnlabeledOptions, verbosity: int = NORMAL) -> None:
    """Print the sets of parameters that gain most, the written files, and the verdict as the last line."""
    if verbosity > QUIET:
        order = sorted(enumerate(choice.gains), key=lambda pair: -pair[1])[:_MAX_SETS]
        gain = "points against default, synthetic cases"
        if order:
            print_table(
                ("parameters", gain),
                [(choice.candidates[number].name, f"{100 * own:+.2f}") for number, own in order],
                (gain,),
            )
        for path in options.files[::-1]:
            print(for_terminal(f"written: {path}"), file=sys.stderr)
    print(for_terminal(f"verdict: {choice.describe()}"))
