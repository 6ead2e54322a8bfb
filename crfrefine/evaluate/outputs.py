"""The tables of a run, `metrics.csv` and `summary.json`, each written atomically."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import UTC, datetime
from typing import Any

import crfrefine
from crfrefine.base.plain import to_plain
from crfrefine.base.text import printable
from crfrefine.evaluate.options import METRICS_NAME, SUMMARY_NAME
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.io.paths import working_folder
from crfrefine.statistics.comparison import ResultTable, summary_dicts

SCHEMA = 1
COLUMNS = ("case", "label", "metric", "value", "method")
_FORMULA_STARTS = ("=", "+", "-", "@")


def write_tables(evaluation: Evaluation) -> None:
    """Write the measurements and the summary."""
    folder = evaluation.options.output
    write_small_file(folder / METRICS_NAME, metrics_csv(evaluation.full_table).encode())
    content = json.dumps(make_summary(evaluation), indent=2, allow_nan=False) + "\n"
    write_small_file(folder / SUMMARY_NAME, content.encode())


def metrics_csv(table: ResultTable) -> str:
    """Return the tidy table: one line per value, in full precision, with an empty field for undefined ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in table:
        value = "" if math.isnan(line.value) else repr(float(line.value))
        writer.writerow((_plain(line.case), _plain(line.region), line.metric, value, _plain(line.method)))
    return text.getvalue()


def _plain(name: str) -> str:
    """Return a name without control characters, and with an apostrophe before it where it begins like a formula."""
    shown = printable(name)
    return f"'{shown}" if shown.startswith(_FORMULA_STARTS) else shown


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
                "ceiling": options.ceiling,
                "tolerance_mm": options.tolerance_mm,
                "ignore_label": plan.ignore_label,
                "resample": options.resample,
                "processes": evaluation.num_processes,
                "command_line": options.command_line,
                "working_folder": working_folder(),
            },
            "regions": {name: list(labels) for name, labels in evaluation.regions.items()},
            "titles": evaluation.titles,
            "judged_regions": list(evaluation.judged_regions),
            "verdict": None if evaluation.verdict is None else evaluation.verdict.to_dict(),
            "recovered": evaluation.recovered,
            "power_note": evaluation.power_note,
            "empty_masks": to_plain(evaluation.empty_masks),
            "empty_predictions": {method: list(cases) for method, cases in evaluation.empty_predictions.items()},
            "cases_learned_on": {method: list(cases) for method, cases in evaluation.learned.items()},
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
            "notes": list(evaluation.notes),
            "summary": summary_dicts(evaluation.summary),
        }
    )
    return summary
