"""Output of `evaluate`: progress on standard error.

The comparison, separate counts and the verdict on standard output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from crfrefine.base.text import counted, for_terminal, listed, printable
from crfrefine.cli.reporting import MAX_LISTED, QUIET, VERBOSE, RunReporter, print_table
from crfrefine.evaluate.options import METRICS_NAME, REPORT_NAME, SUMMARY_NAME
from crfrefine.evaluate.results import EvaluationObserver

if TYPE_CHECKING:
    from crfrefine.evaluate.measuring import CaseResult
    from crfrefine.evaluate.results import Evaluation
    from crfrefine.statistics.comparison import SummaryRow

_MAX_REGIONS = 20
"""Most regions that the tables have a row for."""

_NUMBERS = ("cases", "pairs", "baseline", "mean", "median", "difference", "change")
"""Columns that are aligned at the right."""


class EvaluationReporter(RunReporter, EvaluationObserver):
    """Shows a run: a live bar on a terminal, else one plain line per case.

    VERBOSE adds the assumptions about each case.
    """

    _num_cases = 0

    def run_started(self, evaluation: Evaluation) -> None:
        """Print the amount of work."""
        self._rest = "nothing is written"
        self._num_cases = len(evaluation.pairs)
        processes = evaluation.num_processes
        self._say(
            f"{counted(self._num_cases, 'case')}; {processes} process{'' if processes == 1 else 'es'}"
        )
        self._start(self._num_cases, counts=True)

    def case_ended(self, result: CaseResult) -> None:
        """Print the outcome of a case."""
        self._ended += 1
        for failure in result.failures:
            who = "" if failure.part is None else f"{failure.part}: "
            self._say_failure(
                result.case_id,
                f"case {result.case_id!r}: {who}{failure.message}",
                failure.traceback,
            )
        if self._bar is None and not result.failures:
            self._say(f"[{self._ended}/{self._num_cases}] {result.case_id}: {result.seconds:.2f} s")
        for warning in result.warnings:
            method = warning.partition(":")[0]
            if self.verbosity >= VERBOSE or method not in self._known:
                self._say(f"note: case {result.case_id!r}: {warning}")
            self._known.add(method)
        for note in result.notes:
            self._say(f"    {note}", at_least=VERBOSE)
        self._update(completed=self._ended, text=result.case_id)

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Show the stage after the cases, and the case being drawn."""
        self._update(text=f"{stage}: {case_id} {step}/{num_steps}" if case_id else stage)


def print_evaluation(evaluation: Evaluation, verbosity: int) -> None:
    """Print the comparison, the separate counts, the judgment of probabilities, the declines, and the verdict as the last line."""
    from crfrefine.statistics.comparison import describe_families

    output = evaluation.options.output
    judged = evaluation.verdict
    if verbosity > QUIET:
        _print_means(evaluation, verbosity)
        lines = []
        for region, by_method in evaluation.empty_masks.items():
            parts = [
                f"{method} of {counts['num_cases']} cases: {counts['both']} without it in both maps, "
                f"{counts['prediction'] - counts['both']} missed, {counts['reference'] - counts['both']} false alarms"
                for method, counts in by_method.items()
            ]
            if any(counts["reference"] or counts["prediction"] for counts in by_method.values()):
                lines.append(f"{evaluation.titles.get(region, region)}: {'; '.join(parts)}")
        shown = lines if verbosity >= VERBOSE else lines[:_MAX_REGIONS]
        if len(shown) < len(lines):
            shown = [
                *shown,
                f"{len(lines) - len(shown)} more regions in {output / SUMMARY_NAME}; -v prints them",
            ]
        texts = [f"empty masks: {line}" for line in shown]
        texts += [
            f"note: {note}"
            for note in (judged.notes if judged is not None else evaluation.empty_notes)
        ]
        texts += [evaluation.recovered_text] if evaluation.recovered_text else []
        texts += [f"power: {evaluation.power_note}"] if evaluation.power_note else []
        texts += (
            [f"p (Holm): {families}"] if (families := describe_families(evaluation.summary)) else []
        )
        for part in (judged.probabilities, judged.harm) if judged is not None else ():
            texts += [] if part is None else [part.sentence]
        for text in texts:
            print(for_terminal(text))
        for name in (METRICS_NAME, SUMMARY_NAME, *([REPORT_NAME] if evaluation.has_report else [])):
            print(for_terminal(f"written: {output / name}"), file=sys.stderr)
        if cases := list(dict.fromkeys(case for case, _ in evaluation.failures)):
            print(
                f"failed: {listed(cases, most=MAX_LISTED)} ({len(cases)} of {len(evaluation.pairs)} cases)",
                file=sys.stderr,
            )
    last = evaluation.no_verdict if judged is None else f"verdict: {judged.sentence}"
    if last:
        print(for_terminal(last))


def _print_means(evaluation: Evaluation, verbosity: int) -> None:
    """Print means and differences, and their units below.

    Of many regions, such as the structures of a body, only their mean.
    """
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.comparison import HARM_COLUMN

    rows = [row for row in evaluation.summary if metric_named(row.metric).in_overview]
    num_regions = len(evaluation.regions)
    if num_regions > _MAX_REGIONS and verbosity < VERBOSE:
        rows = [row for row in rows if row.region not in evaluation.regions]
        table = evaluation.options.output / METRICS_NAME
        print(
            for_terminal(
                f"{num_regions} regions: the table has their means; {table} has each, and -v prints them"
            ),
            file=sys.stderr,
        )
    columns: tuple[str, ...] = ("cases", "mean", "median")
    if any(row.comparison for row in rows):
        rows = [row for row in rows if row.comparison is not None]
        columns = (
            "pairs",
            "baseline",
            "mean",
            "difference",
            "95 % CI",
            "p (Holm)",
            "better/equal/worse",
            HARM_COLUMN,
        )
    cells = [
        (
            row.metric,
            printable(evaluation.titles.get(row.region, row.region)),
            printable(row.method),
            *_numbers(row),
        )
        for row in rows
    ]
    if not cells:
        return
    print_table(("metric", "region", "method", *columns), cells, numbers=_NUMBERS)
    # The names of the others end with their unit.
    in_points = {row.metric for row in rows if metric_named(row.metric).is_ratio}
    if "difference" in columns and in_points:
        print(f"units: differences of {', '.join(sorted(in_points))} in points (hundredths)")


def _numbers(row: SummaryRow) -> tuple[str, ...]:
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.comparison import comparison_texts

    metric = metric_named(row.metric)
    comparison = row.comparison
    if comparison is None:
        return str(row.num_values), metric.value_text(row.mean), metric.value_text(row.median)
    if (
        not comparison.num_pairs
    ):  # For example, the calibration of a method whose baseline has no probabilities.
        return "0", "", metric.value_text(row.mean), *[""] * 5
    means = metric.value_text(comparison.mean_baseline), metric.value_text(comparison.mean)
    return str(comparison.num_pairs), *means, *comparison_texts(row)
