"""Output of a training run.

Progress goes to standard error, the comparison and the verdict to standard output.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from crfrefine.base.text import for_terminal
from crfrefine.cli.reporting import NORMAL, QUIET, VERBOSE, RunReporter, sentences_of
from crfrefine.cli.tables import print_table, print_written

if TYPE_CHECKING:
    from crfrefine.train.comparison import TrainingResult
    from crfrefine.train.options import TrainingOptions
    from crfrefine.train.unlabeled_choice import Choice

_MAX_SETS = 5


class TrainingReporter(RunReporter[str, Any]):
    """Shows a training, or a choice of parameters: a bar, or lines; VERBOSE shows every step."""

    silent_seconds = 10.0
    tells_all_from = VERBOSE

    def __enter__(self) -> Self:
        self._begin("", 1.0, counts=False)
        return self

    def run_started(self, text: str) -> None:
        """Print the amount of work."""
        self._begin(text)

    def stage_changed(self, name: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Show the stage; without a bar, print those of the whole run."""
        super().stage_changed(name, stage, step, num_steps)
        if not name and self._bar is None:
            self._say(stage)


def print_training(result: TrainingResult, verbosity: int = NORMAL) -> None:
    """Print the results; the verdict is the last line.

    Before it come the comparison of the methods, a row for each region and method, the written
    files, the probabilities, and what got worse.
    """
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.texts import COMPARISON_COLUMNS, comparison_texts, describe_families
    from crfrefine.train.choice import LESION_F1
    from crfrefine.train.comparison import METHODS, METRICS

    verdict = result.verdict
    if verbosity <= QUIET:
        print(for_terminal(f"verdict: {verdict.sentence}"))
        return
    metrics = [metric for metric in map(metric_named, METRICS) if metric.in_overview]
    if result.plan.options.lesions is not None:
        metrics.append(metric_named(LESION_F1))
    first = metrics[0]  # that of the verdict, compared with the network
    row_of = {(row.metric, row.region, row.method): row for row in result.summary}
    regions = dict.fromkeys(row.region for row in result.summary)
    cells = []
    for region, method in product(regions, METHODS):
        # There are rivals for the output of a coarser network, and others for any other network.
        if (first.name, region, method) in row_of:
            row = row_of[first.name, region, method]
            texts = [first.value_text(row.mean), *comparison_texts(row)]
            for metric in metrics[1:]:
                texts.append(metric.value_text(row_of[metric.name, region, method].mean))
            cells.append((region, method, *texts))
    if cells:
        titles = [f"{metric.title} {metric.unit}".rstrip() for metric in metrics]
        change = f"change, {first.difference_unit}"
        names = ("region", "method", titles[0], change, *COMPARISON_COLUMNS, *titles[1:])
        print_table(names, cells, numbers=(change, *titles))
        print(f"p (Holm): {describe_families(result.summary)}")
    print_written(*reversed(result.plan.options.files))
    for note in verdict.notes:
        print(for_terminal(f"note: {note}"), file=sys.stderr)
    for sentence in (*sentences_of(verdict), f"verdict: {verdict.sentence}"):
        print(for_terminal(sentence))


def print_choice(choice: Choice, options: TrainingOptions, verbosity: int = NORMAL) -> None:
    """Print the sets of parameters that gain most, and the written files.

    The verdict is the last line.
    """
    if verbosity > QUIET:
        column = "points against default, synthetic cases"
        # There are no gains if nothing was measured.
        candidates = zip(choice.candidates, choice.gains, strict=False)
        best = sorted(candidates, key=lambda candidate: -candidate[1])[:_MAX_SETS]
        rows = [(candidate.name, f"{100 * gain:+.2f}") for candidate, gain in best]
        if rows:
            print_table(("parameters", column), rows, numbers=(column,))
        print_written(*reversed(options.files))
    print(for_terminal(f"verdict: {choice.describe()}"))
