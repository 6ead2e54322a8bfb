"""The head of the parameter file: who wrote it, what the verdict was, and where each value comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import crfrefine
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.results import TrainingResult


def describe_origin(result: TrainingResult) -> str:
    """Return the head of the parameter file: who wrote it, what the verdict was, and where each value comes from."""
    final, options = result.final.fit, result.options
    lines = [
        f"Written by crfrefine {crfrefine.__version__} train-crf on {datetime.now(UTC):%Y-%m-%d}: {len(result.cases.files)} cases, "
        f"{len(result.folds)} folds, loss {options.loss}, seed {options.seed}.",
        f"Verdict on cases held out: {result.comparison.verdict.sentence}.",
    ]
    if result.cases.left_out:
        lines.append(f"{len(result.cases.left_out)} further cases were left out because a file was missing (see left_out in the report).")
    if result.num_cut_short:
        lines.append(
            f"The time (--max-minutes) ran out in {result.num_cut_short} of {len(result.folds)} folds before their training was finished."
        )
    if final.is_network:
        lines.append("No CRF was better than the network alone: all weights are 0, and `infer` returns the network's labels.")
        return _wrapped(lines)
    if final.stopped_by_time:
        lines.append("The time (--max-minutes) ran out before the training on all cases was finished.")
    if final.best_optimizer_step == 0:
        lines.append(f"The values are those of {final.start}; training on all cases brought nothing better.")
    else:
        lines.append(f"Trained on all cases, beginning with {final.start}.")
    if result.keeps_largest:
        lines.append(
            f'postprocess.keep_largest: "{result.final.keep_largest}", best on all cases; the verdict is on the CRF together with it.'
        )
    started = "the file or preset of --config" if options.parameters is not None else "the built-in start"
    lines.append("Where the values come from (value in this file; lowest and highest of the folds):")
    fold_tables = [dict(_entries(fit.parameters)) for fit in (fold.tuned.fit for fold in result.folds) if not fit.is_network]
    for key, value in _entries(result.parameters):
        if _group_of(key) in options.learn:
            others = [table[key] for table in fold_tables if key in table]
            spread = f"; folds {_number(min(others))} to {_number(max(others))}" if others else ""
            lines.append(f"  {key}: trained, {_number(value)}{spread}")
    lines.append(f"All other values are those of {started}; mean_field.num_iterations and tolerance are as in training.")
    return _wrapped(lines)


def _entries(parameters: CrfParameters) -> Iterable[tuple[str, float]]:
    """Yield each number that could have been trained, by its dotted key."""
    table = parameters.to_dict()
    kernels = table["bilateral"]
    named = [(f"bilateral.{number}" if len(kernels) > 1 else "bilateral", kernel) for number, kernel in enumerate(kernels)]
    spatial = [("spatial", table["spatial"])] if any(_flat(table["spatial"]["weight"])) else []
    for name, section in [*named, *spatial]:
        for key, value in section.items():
            yield from _indexed(f"{name}.{key}", value)
    for row, penalties in enumerate(table["compatibility"].get("matrix", [])):
        yield from ((f"compatibility.matrix[{row}][{column}]", float(value)) for column, value in enumerate(penalties) if column != row)
    yield "mean_field.temperature", table["mean_field"]["temperature"]


def _indexed(key: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _indexed(f"{key}[{number}]", entry)
    else:
        yield key, float(value)


def _flat(value: Any) -> list[float]:
    return list(value) if isinstance(value, list) else [value]


def _group_of(key: str) -> str:
    if key.startswith("compatibility"):
        return "compatibility"
    if key.startswith("mean_field"):
        return "temperature"
    return "weights" if ".weight" in key else "theta"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent="  " if line.startswith("  ") else ""))
