"""The files of a run: `metrics.csv`, `summary.json` and `report.html`, each written atomically."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.evaluate.options import METRICS_NAME, REPORT_NAME, SUMMARY_NAME
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.io.paths import working_folder
from crfrefine.runs.execution.records import error_fields
from crfrefine.statistics.comparison import ResultTable, summary_dicts

SCHEMA = 1
COLUMNS = ("case", "label", "metric", "value", "method")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_tables(evaluation: Evaluation) -> tuple[Path, ...]:
    """Write the measurements and the summary."""
    folder = evaluation.options.output
    write_small_file(folder / METRICS_NAME, metrics_csv(evaluation.table).encode(errors="surrogateescape"))
    content = json.dumps(make_summary(evaluation), indent=2, allow_nan=False) + "\n"
    write_small_file(folder / SUMMARY_NAME, content.encode())
    return folder / METRICS_NAME, folder / SUMMARY_NAME


def metrics_csv(table: ResultTable) -> str:
    """Return the tidy table: one line per value, in full precision, with an empty field for undefined ones."""
    lines = [_csv_line(COLUMNS)]
    for line in table:
        value = "" if math.isnan(line.value) else repr(float(line.value))
        lines.append(_csv_line((_plain(line.case), _plain(line.region), line.metric, value, _plain(line.method))))
    return "".join(lines)


def _csv_line(fields: Sequence[str]) -> str:
    text = io.StringIO()
    # Fields are put into quotes where they hold a part of the line's end, and readers take a carriage return for one.
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _plain(name: str) -> str:
    """Return a name that no spreadsheet takes for a formula: with an apostrophe before it where it begins like one."""
    return f"'{name}" if name.startswith(_FORMULA_STARTS) else name


def make_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of `summary.json`: plain values, null for undefined or infinite numbers."""
    options, plan = evaluation.options, evaluation.settings.plan
    summary: dict[str, Any] = without_nonfinite(
        {
            "schema": SCHEMA,
            "version": crfrefine.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": evaluation.seconds,
            "settings": {
                "predictions": str(options.predictions),
                "labels": str(options.labels),
                "method": options.name,
                "baseline": options.baseline,
                "baselines": {name: str(path) for name, path in options.baselines},
                "probabilities": {name: str(path) for name, path in options.probabilities},
                "images": None if options.images is None else str(options.images),
                "tolerance_mm": options.tolerance_mm,
                "ignore_label": plan.ignore_label,
                "resample": options.resample,
                "allow_mismatched_dicom": options.allow_mismatched_dicom,
                "processes": evaluation.num_processes,
                "command_line": options.command_line,
                "working_folder": working_folder(),
            },
            "regions": {name: list(labels) for name, labels in evaluation.regions.items()},
            "titles": evaluation.titles,
            "judged_regions": list(evaluation.judged_regions),
            "verdict": None if evaluation.verdict is None else evaluation.verdict.to_dict(),
            "power_note": evaluation.power_note,
            "empty_masks": {
                region: {method: asdict(counts) for method, counts in of_region.items()}
                for region, of_region in evaluation.empty_masks.items()
            },
            "num_cases": len(evaluation.pairs),
            "num_failed": evaluation.num_failed,
            "num_left_out": len(evaluation.left_out),
            "left_out": [case.to_dict() for case in evaluation.left_out],
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
                {"case": result.case_id, "method": failure.part, **error_fields(failure)}
                for result in evaluation.results
                for failure in result.failures
            ],
            "notes": list(evaluation.notes),
            "summary": summary_dicts(evaluation.summary),
        }
    )
    return summary


def write_html(evaluation: Evaluation, progress: Callable[[str, int, int], None], note: Callable[[str], None]) -> Path:
    """Write the report; `progress` as in `write_report`, and `note` is called with what cannot be shown."""
    from crfrefine.evaluate.report_input import make_report_input
    from crfrefine.pages.report import missing_viewer, write_report

    problem = missing_viewer()
    if problem:
        note(problem)
    path = evaluation.options.output / REPORT_NAME
    write_report(path, make_report_input(evaluation, note), progress=progress)
    return path
