"""The report of a run as JSON: all that was found."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import crfrefine
from crfrefine.base.plain import to_plain
from crfrefine.base.text import MAX_OF_A_LINE
from crfrefine.errors import InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.candidates import UNTRAINED, FitResult
from crfrefine.train.comparison import TrainingResult
from crfrefine.train.curves import draw_curves
from crfrefine.train.tuned import Tuned

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


# The files of a run: the picture of the curves, the report, and the parameters with their origin.


def write_results(result: TrainingResult) -> None:
    """Write the picture, the report and, last, the parameters: each whole or not at all.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    options = result.plan.options
    write_small_file(options.curves, draw_curves(result))
    write_small_file(options.report, (json.dumps(make_report(result), indent=2, default=str, allow_nan=False) + "\n").encode())
    write_small_file(options.output, result.parameters.to_toml(describe_origin(result)).encode())


DEFAULT_NAME = "crfrefine.toml"
"""The parameter file in the folder of a trained network of nnU-Net."""

_FIRST_WORDS = "Written by crfrefine"
_OUTPUT_TEMPERATURE = "mean_field.output_temperature"  # Of no group: always fitted, since it changes no label.


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


def describe_origin(result: TrainingResult) -> str:
    """Return the head of the parameter file: who wrote it, what the verdict was, and where each value comes from."""
    final, options = result.final.fit, result.plan.options
    lines = [
        f"{_FIRST_WORDS} {crfrefine.__version__} train-crf on {datetime.now(UTC):%Y-%m-%d}: {len(result.plan.cases.files)} cases, "
        f"{len(result.plan.folds)} cross-validation folds, loss {options.loss}, seed {options.seed}.",
        f"Verdict on cases held out: {result.comparison.verdict.sentence}",
    ]
    if result.plan.cases.regions is not None:
        lines.append(f"For one sigmoid channel per region, lists of weights in their order: {result.plan.cases.regions.describe()}.")
    if result.plan.cases.declared is not None:
        lines.append("Trained on label maps: mean_field.temperature is that of their confidence, so use the file with label maps alone.")
    if result.plan.cases.left_out:
        lines.append(
            f"{len(result.plan.cases.left_out)} further cases were left out because a file was missing (see left_out in the report)."
        )
    if final.is_network:
        lines.append("No CRF was better than the network alone: all weights are 0, and `infer` returns the network's labels.")
        return _wrapped([*lines, *_rules_lines(result)])
    if final.is_calibration:
        lines.append("No CRF was better than the network recalibrated: all weights are 0; what is learned is temperature and bias.")
    elif final.kind == UNTRAINED:
        lines.append("No trained CRF was better than the preset default, by more than chance: the values are those of the preset.")
    else:
        lines += _training_lines(result)
    if result.keeps_largest:
        lines.append(
            f'postprocess.keep_largest: "{result.final.keep_largest}", best on all cases; the verdict is on the CRF together with it.'
        )
    lines += _rules_lines(result)
    if final.kind == UNTRAINED:
        return _wrapped(lines)
    started = "the file or preset of --config" if options.parameters is not None else "the built-in start"
    lines.append("Where the values come from (value in this file; lowest and highest of the folds):")
    fold_tables = [dict(_entries(fit.parameters)) for fit in (fold.tuned.fit for fold in result.folds) if not fit.is_network]
    for key, value in _entries(result.parameters):
        if key == _OUTPUT_TEMPERATURE or (_group_of(key) in options.learn and (not final.is_calibration or key.startswith("mean_field"))):
            others = [table[key] for table in fold_tables if key in table]
            if key == "volume.weight" and not any((value, *others)):
                continue
            spread = f"; folds {min(others):.3g} to {max(others):.3g}" if others else ""
            lines.append(f"  {key}: trained, {value:.3g}{spread}")
    lines.append(f"All other values are those of {started}; mean_field.num_iterations and tolerance are as in training.")
    return _wrapped(lines)


def _training_lines(result: TrainingResult) -> list[str]:
    """Say how the training on all cases went."""
    final = result.final.fit
    if final.best_optimizer_step == 0:
        return [f"The values are those of {final.start}; training on all cases brought nothing better."]
    return [f"Trained on all cases, beginning with {final.start}."]


def _rules_lines(result: TrainingResult) -> list[str]:
    """Say what `infer` needs with rules that remove components."""
    needed = ["A case that loses more than a tenth of a structure to the rules of [postprocess] needs `infer --allow-vanishing`."]
    needed = needed if result.parameters.postprocess.removing else []
    return needed


def _entries(parameters: CrfParameters) -> Iterable[tuple[str, float]]:
    """Yield each number that could have been trained, by its dotted key."""
    table = parameters.to_dict()
    kernels = table["bilateral"]
    named = [(f"bilateral.{number}" if len(kernels) > 1 else "bilateral", kernel) for number, kernel in enumerate(kernels)]
    spatial = [("spatial", table["spatial"])] if np.any(parameters.spatial.weight) else []
    for name, section in [*named, *spatial]:
        for key, value in section.items():
            yield from _indexed(f"{name}.{key}", value)
    for row, penalties in enumerate(table["compatibility"].get("matrix", [])):
        yield from ((f"compatibility.matrix[{row}][{column}]", float(value)) for column, value in enumerate(penalties) if column != row)
    yield "volume.weight", table["volume"]["weight"]
    yield "mean_field.temperature", table["mean_field"]["temperature"]
    yield from _indexed("mean_field.bias", table["mean_field"]["bias"])
    yield _OUTPUT_TEMPERATURE, table["mean_field"]["output_temperature"]


def _indexed(key: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _indexed(f"{key}[{number}]", entry)
    else:
        yield key, float(value)


def _group_of(key: str) -> str:
    if key.startswith("compatibility"):
        return "compatibility"
    if key.startswith("volume"):
        return "volume"
    if key.startswith("mean_field"):
        return "bias" if "bias" in key else "temperature"
    return "weights" if ".weight" in key else "theta"


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent="  " if line.startswith("  ") else ""))
