"""The content of the files of an evaluation: metrics.csv and summary.json."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from crfrefine.base.text import csv_text, for_spreadsheet
from crfrefine.cases.incomplete import left_out_entries
from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.evaluate.lesion_totals import lesion_totals
from crfrefine.evaluate.sentences import power_note
from crfrefine.io.json import without_nonfinite
from crfrefine.statistics.comparison import ResultTable, summary_dicts
from crfrefine.version import __version__

SCHEMA = 1
COLUMNS = ("case", "label", "metric", "value", "method")
LESION_COLUMNS = (
    *("case", "method", "label", "lesion", "outcome", "change", "volume_ml"),
    *("x_mm", "y_mm", "z_mm", "matched_to", "dice", "hd95_mm"),
)


def metrics_csv(table: ResultTable) -> str:
    """Return the tidy table: one line per value, in full precision; an undefined value is empty."""
    rows: list[tuple[object, ...]] = [COLUMNS]
    for line in table:
        value = "" if math.isnan(line.value) else repr(float(line.value))
        rows.append(
            (
                for_spreadsheet(line.case),
                for_spreadsheet(line.region),
                line.metric,
                value,
                for_spreadsheet(line.method),
            )
        )
    return csv_text(rows)


def lesions_csv(evaluation: Evaluation) -> str:
    """Return the table of lesions: one line for each of the reference, and for each false one."""
    rows: list[tuple[object, ...]] = [LESION_COLUMNS]
    for result in evaluation.results:
        for method, lesions in result.lesions.items():
            names = [for_spreadsheet(result.case_id), for_spreadsheet(method)]
            changes = result.changes.get(method, {})
            for lesion in lesions:
                region, outcome, number, volume_ml, center_mm, matched_to, *scores = lesion
                what = (for_spreadsheet(region), number, outcome, changes.get(lesion, ""))
                matches = " ".join(map(str, matched_to))
                rows.append((*names, *what, volume_ml, *center_mm, matches, *scores))
    return csv_text(rows)


def make_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    verdict = evaluation.verdict
    settings = evaluation.options.to_dict()
    settings["ignore_label"] = evaluation.measured.ignore_label
    settings["processes"] = evaluation.num_processes
    failures = []
    for failure in evaluation.failures:
        entry = {
            "case": failure.case_id,
            "method": failure.part,
            "error": failure.message,
            "error_kind": failure.kind,
            "error_traceback": failure.traceback,
        }
        failures.append(entry)
    summary = {
        "schema": SCHEMA,
        "version": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": evaluation.seconds,
        "settings": settings,
        "regions": evaluation.regions,
        "titles": evaluation.titles,
        "judged_regions": evaluation.judged_regions,
        "verdict": None if verdict is None else verdict.to_dict(),
        "recovered": evaluation.recovered,
        "power_note": power_note(evaluation),
        "empty_masks": evaluation.empty_masks,
        "empty_predictions": evaluation.empty_predictions,
        "cases_learned_on": evaluation.learned,
        "num_cases": len(evaluation.pairs),
        "num_failed": evaluation.num_failed,
        "num_left_out": len(evaluation.left_out),
        "left_out": left_out_entries(evaluation.left_out),
        "cases": [result.to_dict() for result in evaluation.results],
        "failures": failures,
        "found": evaluation.found,
        "notes": [note.to_dict() for note in evaluation.notes],
        "summary": summary_dicts(evaluation.summary),
    }
    if evaluation.options.lesions is not None:
        summary["lesions"] = without_nonfinite(lesion_totals(evaluation))
    return summary
