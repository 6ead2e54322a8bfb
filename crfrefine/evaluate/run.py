"""The run of `crfrefine evaluate`: pair the cases, measure them in processes, write the results."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.base.failures import Failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.text import printable
from crfrefine.errors import InputError
from crfrefine.evaluate.measuring import CaseResult, measure_pair
from crfrefine.evaluate.options import (
    METRICS_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    EvaluationOptions,
    check_options,
)
from crfrefine.evaluate.pairing import CasePair, pair_cases
from crfrefine.evaluate.processes import map_in_processes
from crfrefine.evaluate.report import write_report
from crfrefine.evaluate.results import Evaluation, EvaluationObserver
from crfrefine.evaluate.settings import make_settings
from crfrefine.io.atomic import check_replaceable, check_writable, write_small_file
from crfrefine.io.json import to_json
from crfrefine.io.paths import add_volumes, stem_of
from crfrefine.parameters.model import TRAINED_ON
from crfrefine.runs.cases.case_files import left_out_entries
from crfrefine.runs.cases.dataset_description import read_descriptions
from crfrefine.runs.cases.reading_options import RegionReading, find_regions
from crfrefine.runs.records import CaseRecord, RunSummary, read_records
from crfrefine.statistics.comparison import ResultTable, summary_dicts

SCHEMA = 1
COLUMNS = ("case", "label", "metric", "value", "method")


def metrics_csv(table: ResultTable) -> str:
    """Return the tidy table: one line per value, in full precision, with an empty field for undefined ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in table:
        value = "" if math.isnan(line.value) else repr(float(line.value))
        writer.writerow(
            (_plain(line.case), _plain(line.region), line.metric, value, _plain(line.method))
        )
    return text.getvalue()


def _plain(name: str) -> str:
    """Return a name without control characters, and with an apostrophe before it where a spreadsheet would see a formula."""
    return ("'" if name.startswith(("=", "+", "-", "@")) else "") + printable(name)


def make_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    options = evaluation.options
    return {
        "schema": SCHEMA,
        "version": crfrefine.__version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": evaluation.seconds,
        "settings": {
            "predictions": options.predictions,
            "labels": options.labels,
            "method": options.name,
            "baseline": options.baseline,
            "baselines": dict(options.baselines),
            "probabilities": dict(options.probabilities),
            "images": options.images,
            "ceiling": options.ceiling,
            "tolerance_mm": options.tolerance_mm,
            "ignore_label": evaluation.settings.ignore_label,
            "resample": options.resample,
            "add_background": options.add_background,
            "processes": evaluation.num_processes,
            "command_line": options.command_line,
            "working_folder": str(
                Path("/proc/self/cwd").readlink()
            ),  # readable even if the folder was removed
        },
        "regions": evaluation.regions,
        "titles": evaluation.titles,
        "judged_regions": evaluation.judged_regions,
        "verdict": None if evaluation.verdict is None else evaluation.verdict.to_dict(),
        "recovered": evaluation.recovered,
        "power_note": evaluation.power_note,
        "empty_masks": evaluation.empty_masks,
        "empty_predictions": evaluation.empty_predictions,
        "cases_learned_on": evaluation.learned,
        "num_cases": len(evaluation.pairs),
        "num_failed": evaluation.num_failed,
        "num_left_out": len(evaluation.left_out),
        "left_out": left_out_entries(evaluation.left_out),
        "cases": [
            {
                "case": result.case_id,
                "status": result.status,
                "methods": list(result.values),
                "seconds": result.seconds,
                "notes": [*result.warnings, *result.notes],
            }
            for result in evaluation.results
        ],
        "failures": [
            {
                "case": result.case_id,
                "method": failure.part,
                "error": failure.message,
                "error_kind": failure.kind,
                "error_traceback": failure.traceback,
            }
            for result in evaluation.results
            for failure in result.failures
        ],
        "notes": evaluation.notes,
        "summary": summary_dicts(evaluation.summary),
    }


@keeping_inputs()
def run_evaluation(
    options: EvaluationOptions, observer: EvaluationObserver | None = None
) -> Evaluation:
    """Measure all cases, compare the methods, and write the results.

    Raise CrfRefineError if that is impossible.
    """
    started = time.perf_counter()
    observer = observer or EvaluationObserver()
    check_options(options)
    notes: list[str] = []
    settings = make_settings(options, notes)
    pairing = pair_cases(options)
    add_volumes(*options.inputs, *(path for pair in pairing.cases for path in pair.paths))
    for name in (METRICS_NAME, SUMMARY_NAME, *([REPORT_NAME] if options.report else [])):
        check_replaceable(options.output / name)
    notes += pairing.notes
    channels = {name: _channels(name, options) for name in options.methods}
    settings = replace(settings.with_structures(pairing.structures), channels=channels)
    num_processes = min(options.processes or available_threads(), len(pairing.cases))
    learned = cases_learned_on(pairing.cases, notes)
    evaluation = Evaluation(
        options,
        settings,
        pairing.cases,
        (),
        notes,
        num_processes,
        left_out=pairing.left_out,
        learned=learned,
    )
    if learned:
        notes.append(
            f"{evaluation.learned_text}; means and charts leave them out, if there are others"
        )
    _measure(evaluation, observer)
    observer.stage_changed("", "comparing")
    if evaluation.table.cases:
        _ = evaluation.summary, evaluation.verdict
    evaluation.seconds = time.perf_counter() - started
    write_small_file(options.output / METRICS_NAME, metrics_csv(evaluation.full_table).encode())
    write_small_file(
        options.output / SUMMARY_NAME, to_json(make_summary(evaluation), indent=2).encode()
    )
    path = options.output / REPORT_NAME
    if options.report and evaluation.table.cases:
        observer.stage_changed("", "writing the report")
        write_report(
            path,
            evaluation,
            observer.note,
            progress=lambda case_id, *step: observer.stage_changed(case_id, "report", *step),
        )
        evaluation.has_report = True
    elif path.exists():
        observer.note(f"{path} is from an earlier run")
    observer.run_ended(evaluation)
    return evaluation


def _channels(method: str, options: EvaluationOptions) -> RegionReading:
    """Return which channels of a method's files are regions: as the `dataset.json` beside them says, or that of the reference."""
    place = options.methods[method]
    places = (dict(options.probabilities).get(method, place), place, options.labels)
    return find_regions(None, read_descriptions(places))


def _measure(evaluation: Evaluation, observer: EvaluationObserver) -> None:
    """Fill in the results of the evaluation, in the order of the cases."""
    check_writable(evaluation.options.output)
    observer.run_started(evaluation)
    for note in filter(None, (evaluation.left_out_text, *evaluation.notes)):
        observer.note(note)
    results = {}
    with closing(
        map_in_processes(
            partial(measure_pair, evaluation.settings), evaluation.pairs, evaluation.num_processes
        )
    ) as outcomes:
        for pair, outcome in outcomes:
            result = results[pair.case_id] = (
                outcome if isinstance(outcome, CaseResult) else CaseResult(pair.case_id)
            )
            if isinstance(outcome, Failure):
                result.fail(outcome)
            observer.case_ended(result)
            if result.failures and evaluation.options.fail_fast:
                raise InputError(
                    f"stopped at case {result.case_id!r} (--fail-fast): {result.failures[0].message}"
                )
    evaluation.results = [results[pair.case_id] for pair in evaluation.pairs]


def cases_learned_on(pairs: Sequence[CasePair], notes: list[str]) -> dict[str, list[str]]:
    """Return the cases of each method that its parameters were learned on, by the records that `infer` leaves beside its label maps."""
    # A method without a record, or without such cases, is left out.
    records: dict[Path, dict[str, tuple[CaseRecord, RunSummary]]] = {}
    learned: dict[str, list[str]] = {}
    for pair in pairs:
        for method, files in pair.methods.items():
            if files.label_map is None:
                continue
            path = files.label_map.resolve()
            if path.parent not in records:
                recorded = read_records(path.parent)
                notes += [
                    f"{note}; its parameters may have been learned on more cases than are known"
                    for note in recorded.notes
                ]
                lines = ((record, run) for run in recorded.runs for record in run.cases)
                records[path.parent] = {
                    stem_of(record.output): (record, run) for record, run in lines if record.output
                }
            record, run = records[path.parent].get(
                path.name if path.is_dir() else stem_of(path), (None, None)
            )
            if (
                record is not None
                and run is not None
                and printable(record.case_id) in (run.settings.get(TRAINED_ON) or ())
            ):
                learned.setdefault(method, []).append(pair.case_id)
    return learned
