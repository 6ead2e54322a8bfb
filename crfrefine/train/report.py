"""The files of a run: the report as JSON, with all that was found, and the parameters."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.base.plain import to_plain
from crfrefine.base.text import MAX_OF_A_LINE
from crfrefine.errors import InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.candidates import FitResult
from crfrefine.train.comparison import TrainingResult, Tuned

SCHEMA = 1


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    plan, comparison = result.plan, result.comparison
    options, cases = plan.options, plan.cases
    report: dict[str, Any] = without_nonfinite(
        {
            "schema": SCHEMA,
            "version": crfrefine.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": result.seconds,
            "device": plan.device.name,
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
                "num_folds": len(result.plan.folds),
                "num_iterations": options.num_optimizer_steps,
                "seed": options.seed,
                "resample": options.resample,
                "config": None if options.config is None else str(options.config),
            },
            "cases": list(cases.case_ids),
            "left_out": [case.to_dict() for case in cases.left_out],
            "label_names": list(cases.label_names),
            "channels": None if cases.regions is None else cases.regions.to_dict(),
            "regions": {region.name: list(region.labels) for region in plan.regions},
            "verdict": comparison.verdict.to_dict(),
            "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
            "parameters": result.parameters.to_dict(),
            "final": _fit_dict(result.final.fit),
            **_rival_dict(result.final),
            "folds": [
                {
                    "name": fold.name,
                    **{name: [cases.case_ids[case] for case in chosen] for name, chosen in vars(fold.split).items()},
                    "fit": _fit_dict(fold.tuned.fit),
                    **_rival_dict(fold.tuned),
                }
                for fold in result.folds
            ],
            "comparison": summary_dicts(comparison.summary),
            "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
            "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
            "measurements": [asdict(line) for line in comparison.table],
        }
    )
    return report


def _rival_dict(tuned: Tuned) -> dict[str, Any]:
    return {
        "vector_scaling": to_plain(tuned.scaling),
        "guided_filter": to_plain(tuned.guidance),
        "keep_largest": tuned.keep_largest,
    }


def _fit_dict(fit: FitResult) -> dict[str, Any]:
    return {**to_plain(fit), "is_network": fit.is_network, "is_calibration": fit.is_calibration}


def write_results(result: TrainingResult) -> None:
    """Write the report and, last, the parameters: each whole or not at all.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    options = result.plan.options
    write_small_file(options.report, (json.dumps(make_report(result), indent=2, default=str, allow_nan=False) + "\n").encode())
    head = (
        f"{_FIRST_WORDS} {crfrefine.__version__} train-crf on {datetime.now(UTC):%Y-%m-%d} from {len(result.plan.cases.files)} cases: "
        f"{options.report.name} has the verdict, and the values of each fold."
    )
    write_small_file(options.output, result.parameters.to_toml(textwrap.fill(head, 98)).encode())


DEFAULT_NAME = "crfrefine.toml"
"""The parameter file in the folder of a trained network of nnU-Net."""

_FIRST_WORDS = "Written by crfrefine"


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder, unless it holds a file of that name that `train-crf` has not written.

    Raises:
        InputError: there is such a file.
    """
    path = folder / DEFAULT_NAME
    if os.path.lexists(path):
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file, so it is not replaced; name another file with --output")
        with path.open("rb") as file:
            if not file.readline(MAX_OF_A_LINE).startswith(f"# {_FIRST_WORDS}".encode()):
                raise InputError(f"{path}: was not written by train-crf, so it is not replaced; name another file with --output")
    return path
