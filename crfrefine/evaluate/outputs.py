"""The files of a run: `metrics.csv`, `summary.json` and `report.html`, each written atomically."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

import crfrefine
from crfrefine.base.plain import to_plain
from crfrefine.base.text import printable
from crfrefine.cases.dataset_description import Names, read_names
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.options import METRICS_NAME, REPORT_NAME, SUMMARY_NAME
from crfrefine.evaluate.reading import read_image, read_masks, read_reference
from crfrefine.evaluate.report import CaseImages, ReportInput, write_report
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.io.paths import working_folder
from crfrefine.statistics.comparison import ResultTable, summary_dicts

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32
    from crfrefine.evaluate.pairing import CasePair

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


def write_html(evaluation: Evaluation, progress: Callable[[str, int, int], None], note: Callable[[str], None]) -> None:
    """Write the report; `progress` as in `write_report`, and `note` is called with what cannot be shown."""
    path = evaluation.options.output / REPORT_NAME
    problem = write_report(path, make_report_input(evaluation, note), progress=progress)
    if problem:
        note(problem)


# The contents of the report: the results of the run, and the volumes of the cases that it shows, read when they are asked for.


def make_report_input(evaluation: Evaluation, note: Callable[[str], None]) -> ReportInput:
    """Return the contents of the report; `note` is called with what cannot be shown."""
    options = evaluation.options
    pairs = {pair.case_id: pair for pair in evaluation.pairs}
    names = read_names([options.images, options.labels]) if options.images is not None else Names()
    for text in names.notes:
        if text not in evaluation.notes:
            note(text)
    baseline = options.baseline if evaluation.verdict is not None else None
    return ReportInput(
        title=options.name if baseline is None else f"{options.name} against {baseline}",
        table=evaluation.table,
        method=options.name,
        baseline=baseline,
        summary=evaluation.summary,
        verdict=evaluation.verdict,
        region_labels=evaluation.regions,
        region_titles=evaluation.titles,
        failures=evaluation.failures,
        left_out=evaluation.left_out_text,
        settings=_settings(evaluation),
        load_case=lambda case_id: _load(pairs[case_id], evaluation, baseline, names.modalities, note),
        mean_regions=evaluation.judged_regions,
    )


def _settings(evaluation: Evaluation) -> dict[str, str]:
    options, plan = evaluation.options, evaluation.settings.plan
    shown = {
        "reference": str(options.labels),
        **{f"method {name}": str(path) for name, path in options.methods.items()},
        **{f"probabilities of {name}": str(path) for name, path in options.probabilities},
        "images": "none" if options.images is None else str(options.images),
        "mean over regions": ", ".join(evaluation.titles.get(name, name) for name in evaluation.judged_regions),
        "tolerance of the surface Dice": f"{options.tolerance_mm:g} mm",
        "ignored label": "none" if plan.ignore_label is None else str(plan.ignore_label),
        "power": evaluation.power_note or "",
        "notes": " ".join(evaluation.notes),
        "command": options.command_line,
        "version": f"crfrefine {crfrefine.__version__}",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return {name: text for name, text in shown.items() if text}


def _load(pair: CasePair, evaluation: Evaluation, baseline: str | None, names: Sequence[str], note: Callable[[str], None]) -> CaseImages:
    reference = read_reference(pair, evaluation.settings, [])
    method, regions = evaluation.options.name, evaluation.settings.channels
    channels: list[Float32] = []
    titles: list[str] = []
    for number, path in enumerate(pair.images):
        try:
            found = read_image(path, reference)
        except (CrfRefineError, OSError) as error:
            note(f"case {pair.case_id!r}: shown without {'its image' if len(pair.images) == 1 else path.name}: {error}")
            continue
        first = len(channels) if len(pair.images) == 1 else number
        titles += [names[place] if place < len(names) else f"modality {place + 1}" for place in range(first, first + len(found))]
        channels += [_solid(channel) for channel in found]
    return CaseImages(
        image=np.stack(channels) if channels else None,
        reference=_solid(reference.volume.data),
        before=None if baseline is None else _solid(read_masks(pair.methods[baseline], reference, regions[baseline], [])[0]),
        after=_solid(read_masks(pair.methods[method], reference, regions[method], [])[0]),
        affine=reference.volume.affine,
        modality_names=tuple(titles),
    )


def _solid(values: Array) -> Array:
    """Return a slice as a volume with one slice: (x, y, 1)."""
    return values if values.ndim >= 3 else values.reshape(values.shape + (1,) * (3 - values.ndim))
