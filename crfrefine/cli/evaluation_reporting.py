"""Output of `evaluate`: progress on standard error; the comparison, separate counts and the verdict on standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from crfrefine.base.text import for_terminal, listed, printable
from crfrefine.cli.progress import NORMAL, QUIET, VERBOSE, RunReporter
from crfrefine.cli.reporting import print_table
from crfrefine.evaluate.results import EvaluationObserver

if TYPE_CHECKING:
    from crfrefine.evaluate.measuring import CaseResult
    from crfrefine.evaluate.results import Evaluation
    from crfrefine.statistics.comparison import SummaryRow

_MAX_LISTED = 20
_MAX_REGIONS = 20
"""Most regions that the tables have a row for."""

_RIGHT = ("cases", "pairs", "baseline", "mean", "median", "difference", "change")
_NARROW = {"difference": ("", "change"), "p (Holm)": ("p", "(Holm)"), "better/equal/worse": ("better/", "equal/worse")}
"""Column heads in two lines, for narrow terminals."""


class EvaluationReporter(RunReporter, EvaluationObserver):
    """Shows a run: a live bar on a terminal, else one plain line per case; VERBOSE adds the assumptions about each case."""

    _num_cases = 0

    def _describe_rest(self) -> str:
        return "nothing is written" if self._num_cases else ""

    def run_started(self, evaluation: Evaluation) -> None:
        """Print the amount of work."""
        self._num_cases = num_cases = len(evaluation.pairs)
        num_processes = evaluation.num_processes
        self._say(f"{num_cases} case{'s' * (num_cases != 1)}; {num_processes} process{'es' * (num_processes != 1)}")
        self._start(num_cases, counts=True)

    def case_ended(self, result: CaseResult) -> None:
        """Print the outcome of a case."""
        self._ended += 1
        for failure in result.failures:
            who = "" if failure.part is None else f"{failure.part}: "
            self._say_failure(result.case_id, f"case {result.case_id!r}: {who}{failure.message}", failure.traceback)
        if self._bar is None and not result.failures:
            self._say(f"[{self._ended}/{self._num_cases}] {result.case_id}: {result.seconds:.2f} s")
        for warning in result.warnings:
            method = warning.partition(":")[0]
            if self._verbosity >= VERBOSE or method not in self._known:
                self._say(f"note: case {result.case_id!r}: {warning}")
            self._known.add(method)
        if self._verbosity >= VERBOSE:
            for note in result.notes:
                self._say(f"    {note}")
        self._update(completed=self._ended, text=result.case_id)

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Show the stage after the cases, and the case being drawn."""
        self._update(text=f"{stage}: {case_id} {step}/{num_steps}" if case_id else stage)


def print_evaluation(evaluation: Evaluation, verbosity: int = NORMAL) -> None:
    """Print the comparison, the separate counts, the judgment of probabilities, the declines, and the verdict as the last line."""
    from crfrefine.evaluate.options import SUMMARY_NAME
    from crfrefine.statistics.comparison import describe_families

    if verbosity > QUIET:
        _print_means(evaluation, verbosity)
        lines = _empty_lines(evaluation)
        shown = lines if verbosity >= VERBOSE else lines[:_MAX_REGIONS]
        for line in shown:
            print(for_terminal(f"empty masks: {line}"))
        if len(shown) < len(lines):
            more = f"{len(lines) - len(shown)} more regions in {evaluation.options.output / SUMMARY_NAME}"
            print(for_terminal(f"empty masks: {more}; -v prints them"))
        judged = evaluation.verdict
        for note in judged.notes if judged is not None else evaluation.empty_notes:
            print(for_terminal(f"note: {note}"))
        if evaluation.power_note:
            print(f"power: {evaluation.power_note}")
        families = describe_families(evaluation.summary)
        if families:
            print(f"p (Holm): {families}")
        _print_files(evaluation)
        if judged is not None and judged.probabilities is not None:
            print(for_terminal(judged.probabilities.sentence))
        if judged is not None and judged.harm is not None:
            print(for_terminal(judged.harm.sentence))
    if evaluation.verdict is not None:
        print(for_terminal(f"verdict: {evaluation.verdict.sentence}"))
    elif evaluation.no_verdict:
        print(for_terminal(evaluation.no_verdict))


def _print_files(evaluation: Evaluation) -> None:
    from crfrefine.evaluate.options import METRICS_NAME, REPORT_NAME, SUMMARY_NAME

    names = [METRICS_NAME, SUMMARY_NAME, *([REPORT_NAME] if evaluation.has_report else [])]
    for name in names:
        print(for_terminal(f"written: {evaluation.options.output / name}"), file=sys.stderr)
    failures = evaluation.failures
    if failures:
        cases = list(dict.fromkeys(case for case, _ in failures))
        print(f"failed: {listed(cases, most=_MAX_LISTED)} ({len(cases)} of {len(evaluation.pairs)} cases)", file=sys.stderr)


def _print_means(evaluation: Evaluation, verbosity: int) -> list[SummaryRow]:
    """Print means and differences, and their units below; of many regions, such as the structures of a body, only their mean.

    Returns:
        The rows that are printed.
    """
    from crfrefine.evaluate.options import METRICS_NAME
    from crfrefine.metrics.registry import metric_named

    rows = [row for row in evaluation.summary if metric_named(row.metric).in_overview]
    num_regions = len(evaluation.regions)
    if num_regions > _MAX_REGIONS and verbosity < VERBOSE:
        rows = [row for row in rows if row.region not in evaluation.regions]
        told = f"{num_regions} regions: the table has their means; {evaluation.options.output / METRICS_NAME} has each, and -v prints them"
        print(for_terminal(told), file=sys.stderr)
    if any(row.comparison for row in rows):
        rows = [row for row in rows if row.comparison is not None]
        columns: tuple[str, ...] = ("pairs", "baseline", "mean", "difference", "95 % CI", "p (Holm)", "better/equal/worse")
    else:
        columns = ("cases", "mean", "median")
    names = ("metric", "region", "method", *columns)
    cells = [(row.metric, printable(evaluation.titles.get(row.region, row.region)), printable(row.method), *_numbers(row)) for row in rows]
    if cells:
        _print_cells(names, cells)
        in_points = {row.metric for row in rows if metric_named(row.metric).is_ratio}  # The names of the others end with their unit.
        if "difference" in names and in_points:
            print(f"units: differences of {', '.join(sorted(in_points))} in points (hundredths)")
    return rows


def _print_cells(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table whose first columns are metric, region and method; narrow terminals get metric and method on separate lines."""
    from rich.console import Console

    width = Console().width
    if not sys.stdout.isatty() or sum(_widths([names, *rows])) + 3 * len(names) <= width:
        print_table(names, rows, numbers=_RIGHT)
        return
    titles = [_NARROW.get(name, ("", name)) for name in names]
    shown = [(row[1], *row[3:]) for row in rows]
    head = [(line[1], *line[3:]) for line in zip(*titles, strict=True)]
    widths = _widths([*head, *shown])
    gap = "  " if sum(widths) + 2 * len(widths) <= width else " "
    for line in head:
        print(_aligned(line, head[-1], widths, gap))
    last = None
    for row, line in zip(rows, shown, strict=True):
        if (row[0], row[2]) != last:
            print(f"{row[0]}, {row[2]}")
        last = (row[0], row[2])
        print(_aligned(line, head[-1], widths, gap))
    print()


def _aligned(cells: tuple[str, ...], names: tuple[str, ...], widths: list[int], gap: str) -> str:
    from rich.cells import cell_len

    padded = []
    for cell, name, width in zip(cells, names, widths, strict=True):
        space = " " * (width - cell_len(cell))
        padded.append(space + cell if name in _RIGHT else cell + space)
    return (gap + gap.join(padded)).rstrip()


def _widths(rows: list[tuple[str, ...]]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, column)) for column in zip(*rows, strict=True)]


def _numbers(row: SummaryRow) -> tuple[str, ...]:
    from crfrefine.metrics.registry import metric_named
    from crfrefine.statistics.comparison import comparison_texts

    metric, comparison = metric_named(row.metric), row.comparison
    if comparison is None:
        return str(row.num_values), metric.value_text(row.mean), metric.value_text(row.median)
    if not comparison.num_pairs:  # For example, the calibration of a method whose baseline has no probabilities.
        return "0", "", metric.value_text(row.mean), "", "", "", ""
    means = metric.value_text(comparison.mean_baseline), metric.value_text(comparison.mean)
    return str(comparison.num_pairs), *means, *comparison_texts(row)


def _empty_lines(evaluation: Evaluation) -> list[str]:
    """Return one line per region that is empty in any case, in the reference or in a prediction."""
    lines = []
    for region, by_method in evaluation.empty_masks.items():
        if not any(counts.reference or counts.prediction for counts in by_method.values()):
            continue
        parts = [
            f"{method} of {counts.num_cases} cases: {counts.both} without it in both maps, "
            f"{counts.prediction - counts.both} missed, {counts.reference - counts.both} false alarms"
            for method, counts in by_method.items()
        ]
        lines.append(f"{evaluation.titles.get(region, region)}: " + "; ".join(parts))
    return lines
