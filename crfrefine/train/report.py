"""The files of a run: the report as JSON, with all results, and the parameters."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crfrefine.base.plain import to_plain
from crfrefine.base.text import MAX_OF_A_LINE
from crfrefine.errors import InputError
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.comparison import TrainingResult, Tuned
from crfrefine.train.options import WRITTEN_BY

SCHEMA = 1


def write_results(result: TrainingResult) -> None:
    """Write the report and the parameters.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    options = result.plan.options
    origin = (
        f" train-crf on {datetime.now(UTC):%Y-%m-%d} from {result.plan.num_cases} cases: "
        f"{options.report.name} has the verdict, and the values of each fold."
    )
    options.write(SCHEMA, make_report(result), result.parameters, origin)


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    plan, comparison = result.plan, result.comparison
    options, cases, data = plan.options, plan.cases, plan.options.data
    return {
        "seconds": result.seconds,
        "device": plan.device.name,
        "threads": result.threads,
        "options": {
            "images": data.images,
            "labels": data.labels,
            "logits": data.logits,
            "masks": data.masks,
            "input_type": "labels" if cases.declared is not None else options.input_type,
            "nnunet": data.nnunet,
            "learn": options.learn,
            "loss": options.loss,
            "num_folds": len(plan.folds),
            "num_iterations": options.num_optimizer_steps,
            "seed": options.seed,
            "resample": options.resample,
            "config": options.config,
        },
        "cases": cases.case_ids,
        "left_out": [case.to_dict() for case in cases.left_out],
        "label_names": cases.label_names,
        "channels": to_plain(cases.regions),
        "regions": {region.name: region.labels for region in plan.regions},
        "verdict": comparison.verdict.to_dict(),
        "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
        "parameters": result.parameters.to_dict(),
        **_tuned_dict("final", result.final),
        "folds": [
            {
                "name": fold.name,
                **{name: [cases.case_ids[case] for case in chosen] for name, chosen in vars(fold.split).items()},
                **_tuned_dict("fit", fold.tuned),
            }
            for fold in result.folds
        ],
        "comparison": summary_dicts(comparison.summary),
        "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
        "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
        "measurements": [asdict(line) for line in comparison.table],
    }


def _tuned_dict(name: str, tuned: Tuned) -> dict[str, Any]:
    fit = tuned.fit
    return {
        name: {**to_plain(fit), "is_network": fit.is_network, "is_calibration": fit.is_calibration},
        "vector_scaling": to_plain(tuned.scaling),
        "guided_filter": to_plain(tuned.guidance),
        "keep_largest": tuned.keep_largest,
    }


DEFAULT_NAME = "crfrefine.toml"
"""The parameter file in the folder of a trained network of nnU-Net."""


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder, unless it holds a file of that name that `train-crf` has not written.

    Raises:
        InputError: there is such a file.
    """
    path = folder / DEFAULT_NAME
    if not os.path.lexists(path):
        return path
    problem = "" if path.is_file() else "is not a regular file"
    if not problem:
        with path.open("rb") as file:
            is_own = file.readline(MAX_OF_A_LINE).startswith(f"# {WRITTEN_BY}".encode())
        problem = "" if is_own else "was not written by train-crf"
    if problem:
        raise InputError(f"{path}: {problem}, so it is not replaced; name another file with --output")
    return path
