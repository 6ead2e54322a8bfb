"""The report of a run as JSON: all that was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import crfrefine
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.curves import draw_curves
from crfrefine.train.fit_result import FitResult
from crfrefine.train.origin import describe_origin
from crfrefine.train.results import TrainingResult
from crfrefine.train.tuned import Tuned

SCHEMA = 1


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    options, cases, comparison = result.options, result.cases, result.comparison
    report: dict[str, Any] = without_nonfinite(
        {
            "schema": SCHEMA,
            "version": crfrefine.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": result.seconds,
            "device": result.device,
            "threads": result.threads,
            "options": {
                "images": str(options.data.images),
                "labels": str(options.data.labels),
                "logits": str(options.data.logits),
                "masks": None if options.data.masks is None else str(options.data.masks),
                "input_type": "labels" if cases.declared is not None else options.input_type,
                "nnunet": None if options.data.nnunet is None else str(options.data.nnunet),
                "learn": list(options.learn),
                "loss": options.loss,
                "num_folds": result.num_folds,
                "num_iterations": options.num_optimizer_steps,
                "seed": options.seed,
                "max_minutes": options.max_minutes,
                "resample": options.resample,
                "allow_mismatched_dicom": options.allow_mismatched_dicom,
                "config": None if options.config is None else str(options.config),
            },
            "cases": list(cases.case_ids),
            "left_out": [case.to_dict() for case in cases.left_out],
            "label_names": list(cases.label_names),
            "channels": None if cases.regions is None else cases.regions.to_dict(),
            "nnunet_postprocessing": None if cases.postprocessing is None else cases.postprocessing.to_dict(),
            "regions": {region.name: list(region.labels) for region in result.regions},
            "verdict": comparison.verdict.to_dict(),
            "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
            "parameters": result.parameters.to_dict(),
            "final": _fit_dict(result.final.fit),
            **_rival_dict(result.final),
            "folds": [
                {
                    "name": fold.name,
                    "training": list(fold.training),
                    "deciding": list(fold.deciding),
                    "held_out": list(fold.held_out),
                    "fit": _fit_dict(fold.tuned.fit),
                    **_rival_dict(fold.tuned),
                }
                for fold in result.folds
            ],
            "comparison": summary_dicts(comparison.summary),
            "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
            **({"comparison_with_small_object_rules": summary_dicts(comparison.summary_of_rules)} if result.final.rules else {}),
            "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
            "measurements": [asdict(line) for line in comparison.table],
        }
    )
    return report


def _rival_dict(tuned: Tuned) -> dict[str, Any]:
    values = {
        "vector_scaling": asdict(tuned.scaling),
        "smoothing_sigma_mm": tuned.sigma_mm,
        "guided_filter": asdict(tuned.guidance),
        "dice_decision": tuned.decision.to_dict()["scaling"],
        "keep_largest": tuned.keep_largest,
    }
    return values if tuned.rules is None else {**values, "small_object_rules": tuned.rules.to_dict()}


def _fit_dict(fit: FitResult) -> dict[str, Any]:
    return {**fit.to_dict(), "is_network": fit.is_network, "is_calibration": fit.is_calibration}


# The files of a run: the picture of the curves, the report, and the parameters with their origin.


def write_results(result: TrainingResult) -> None:
    """Write the picture, the report and, last, the parameters: each whole or not at all.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    options = result.options
    write_small_file(options.curves, draw_curves(result))
    write_small_file(options.report, (json.dumps(make_report(result), indent=2, default=str, allow_nan=False) + "\n").encode())
    write_small_file(options.output, result.parameters.to_toml(describe_origin(result)).encode())
