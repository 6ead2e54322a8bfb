"""Output of `evaluate`: progress on standard error.

The comparison, separate counts and the verdict on standard output.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from crfrefine.base.text import counted, for_terminal, listed, printable
from crfrefine.cli.reporting import MAX_LISTED, QUIET, VERBOSE, RunReporter, sentences_of
from crfrefine.cli.tables import print_table, print_written
from crfrefine.evaluate.options import METRICS_NAME, SUMMARY_NAME

if TYPE_CHECKING:
    from crfrefine.evaluate.evaluation import Evaluation
    from crfrefine.evaluate.measuring import CaseResult

_MAX_REGIONS = 20  # that the tables have a row for
# Columns that are aligned at the right.
_NUMBERS = ("cases", "pairs", "baseline", "mean", "median", "difference", "change")


class EvaluationReporter(RunReporter["Evaluation", "CaseResult"]):
    """Shows a run: a live bar on a terminal, else one plain line per case.

    VERBOSE adds the assumptions about each case.
    """

    def run_started(self, evaluation: Evaluation) -> None:
        """Print the amount of work."""
        self._rest = "nothing is written"
        processes = f"{evaluation.num_processes} processes"
        if evaluation.num_processes == 1:
            processes = "1 process"
        num_cases = len(evaluation.pairs)
        self._begin(f"{counted(num_cases, 'case')}; {processes}", num_cases)

    def case_ended(self, result: CaseResult) -> None:
        """Print the outcome of a case."""
        failures = [replace(one, case_id=result.case_id) for one in result.failures]
        outcome = ""
        if self._bar is None:
            outcome = f"{result.case_id}: {result.seconds:.2f} s"
        self._end_case(result.case_id, failures, outcome)
        for warning in result.warnings:
            self.note(warning, case_id=result.case_id)
        for note in result.notes:
            self._say(f"    {note}", at_least=VERBOSE)


def print_evaluation(evaluation: Evaluation, verbosity: int) -> None:
    """Print the results; the verdict is the last line.

    Before it come the comparison, the separate counts, the judgment of probabilities, and the
    declines.
    """
    from crfrefine.evaluate.sentences import (
        empty_notes,
        no_verdict,
        power_note,
        recovered_text,
    )
    from crfrefine.statistics.texts import describe_families

    verdict = evaluation.verdict
    if verbosity > QUIET:
        _print_means(evaluation, verbosity)
        if evaluation.options.lesions is not None:
            _print_lesions(evaluation, verbosity)
        texts = _lines_on_empty_masks(evaluation, verbosity)
        notes = empty_notes(evaluation) if verdict is None else verdict.notes
        texts += [f"note: {note}" for note in notes]
        recovered = recovered_text(evaluation)
        if recovered:
            texts.append(recovered)
        power = power_note(evaluation)
        if power:
            texts.append(f"power: {power}")
        families = describe_families(evaluation.summary)
        if families:
            texts.append(f"p (Holm): {families}")
        if verdict is not None:
            texts += sentences_of(verdict)
        for text in texts:
            print(for_terminal(text))
        print_written(*evaluation.written)
        failed = list(dict.fromkeys(failure.case_id for failure in evaluation.failures))
        if failed:
            count = f"{len(failed)} of {len(evaluation.pairs)} cases"
            print(f"failed: {listed(failed, most=MAX_LISTED)} ({count})", file=sys.stderr)
    last = no_verdict(evaluation)
    if verdict is not None:
        last = f"verdict: {verdict.sentence}"
    if last:
        print(for_terminal(last))


def _lines_on_empty_masks(evaluation: Evaluation, verbosity: int) -> list[str]:
    """Return a line about each region that a map lacks in some case; unless VERBOSE, of a few."""
    lines = []
    for region, by_method in evaluation.empty_masks.items():
        if any(counts["reference"] or counts["prediction"] for counts in by_method.values()):
            title = evaluation.titles.get(region, region)
            methods = []
            for method, counts in by_method.items():
                both = counts["both"]
                methods.append(
                    f"{method} of {counts['num_cases']} cases: {both} without it in both maps, "
                    f"{counts['prediction'] - both} missed, "
                    f"{counts['reference'] - both} false alarms"
                )
            lines.append(f"empty masks: {title}: {'; '.join(methods)}")

    num_more = len(lines) - _MAX_REGIONS
    if verbosity >= VERBOSE or num_more <= 0:
        return lines
    table = evaluation.options.output / SUMMARY_NAME
    more = f"empty masks: {num_more} more regions in {table}; -v prints them"
    return [*lines[:_MAX_REGIONS], more]


def _print_means(evaluation: Evaluation, verbosity: int) -> None:
    """Print means and differences, and their units below.

    Of many regions, such as the structures of a body, only their mean.
    """
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.texts import COMPARISON_COLUMNS, comparison_texts

    rows = [row for row in evaluation.summary if metric_named(row.metric).in_overview]
    num_regions = len(evaluation.regions)
    if num_regions > _MAX_REGIONS and verbosity < VERBOSE:
        table = evaluation.options.output / METRICS_NAME
        places = f"the table has their means; {table} has each, and -v prints them"
        print(for_terminal(f"{num_regions} regions: {places}"), file=sys.stderr)
        rows = [row for row in rows if row.region not in evaluation.regions]
    columns: tuple[str, ...] = ("cases", "mean", "median")
    compared = [row for row in rows if row.comparison is not None]
    if compared:
        rows = compared
        columns = ("pairs", "baseline", "mean", "difference", *COMPARISON_COLUMNS)
    cells = []
    for row in rows:
        region = printable(evaluation.titles.get(row.region, row.region))
        metric = metric_named(row.metric)
        comparison = row.comparison
        mean = metric.value_text(row.mean)
        if comparison is None:
            numbers = [str(row.num_values), mean, metric.value_text(row.median)]
        elif not comparison.num_pairs:
            # For example, the calibration of a method whose baseline has no probabilities.
            numbers = ["0", "", mean, *[""] * len(comparison_texts(row))]
        else:
            means = map(metric.value_text, (comparison.mean_baseline, comparison.mean))
            numbers = [str(comparison.num_pairs), *means, *comparison_texts(row)]
        cells.append((row.metric, region, printable(row.method), *numbers))
    if cells:
        print_table(("metric", "region", "method", *columns), cells, numbers=_NUMBERS)
        in_points = {row.metric for row in compared if metric_named(row.metric).is_ratio}
        if in_points:  # The names of the other metrics have their unit.
            print(f"units: differences of {', '.join(sorted(in_points))} in points (hundredths)")


def _print_lesions(evaluation: Evaluation, verbosity: int) -> None:
    """Print the lesions of all cases by region and method; of many regions only if VERBOSE."""
    from crfrefine.evaluate.lesion_totals import lesion_totals
    from crfrefine.metrics.registry import metric_named

    if len(evaluation.regions) > _MAX_REGIONS and verbosity < VERBOSE:
        return
    names: list[str] = []
    rows = []
    for method, by_region in lesion_totals(evaluation).items():
        for region, totals in by_region.items():
            names = names or [*totals]  # The judged method comes first, and has all.
            cells = []
            for name in names:
                value = totals.get(name, "")
                if isinstance(value, float):
                    value = metric_named(name).value_text(value)
                cells.append(str(value))
            rows.append((evaluation.titles.get(region, region), method, *cells))
    columns = [name.removeprefix("lesions_").removeprefix("lesion_") for name in names]
    if rows:
        print_table(
            ("region", "method", *columns),
            rows,
            numbers=tuple(name for name in columns if name != "worst_case"),
        )
