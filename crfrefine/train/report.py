"""The report of a training run, as its JSON file has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from crfrefine.base.option import REFERENCE, mapping_of
from crfrefine.base.plain import to_plain
from crfrefine.cases.case_files import left_out_entries
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.baselines import Tuned
from crfrefine.train.choice import CALIBRATION, FitResult
from crfrefine.train.comparison import FoldResult, TrainingResult
from crfrefine.train.plan import Plan


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    cases = result.plan.cases
    comparison = result.comparison
    return {
        "seconds": result.seconds,
        "device": result.device,
        "threads": result.threads,
        "options": _options_entry(result.plan),
        "cases": cases.case_ids,
        "left_out": left_out_entries(cases.left_out),
        "label_names": cases.label_names,
        "channels": to_plain(cases.regions),
        "regions": result.plan.labels_of_regions,
        "verdict": comparison.verdict.to_dict(),
        "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
        "parameters": result.parameters.to_dict(),
        "final": _fit_entry(result.final.fit),
        **_rivals_entries(result.final),
        "folds": [_fold_entry(fold, cases.case_ids) for fold in result.folds],
        "comparison": summary_dicts(comparison.summary),
        "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
        "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
        "measurements": [asdict(line) for line in comparison.table],
    }


def _options_entry(plan: Plan) -> dict[str, Any]:
    """Return what the report says of the options of a run."""
    options = plan.options
    input_type = options.input_type
    if plan.cases.declared is not None:
        input_type = "labels"
    return {
        **vars(options.data),
        "input_type": input_type,
        "num_folds": len(plan.folds),
        "num_iterations": options.num_optimizer_steps,
        "learn": options.learn,
        "loss": options.loss,
        "seed": options.seed,
        "resample": options.resample,
        "mapping": mapping_of(options.mapped),
        "reference_mapping": mapping_of(options.mapped, REFERENCE),
        "config": options.config,
    }


def _fold_entry(fold: FoldResult, case_ids: Sequence[str]) -> dict[str, Any]:
    """Return what the report says of a fold."""
    entry: dict[str, Any] = {"name": fold.name}
    for role, numbers in vars(fold.split).items():
        entry[role] = [case_ids[number] for number in numbers]
    entry["fit"] = _fit_entry(fold.tuned.fit)
    entry.update(_rivals_entries(fold.tuned))
    return entry


def _fit_entry(fit: FitResult) -> dict[str, Any]:
    """Return what the report says of a training."""
    entry: dict[str, Any] = to_plain(fit)
    entry["is_network"] = fit.is_network
    entry["is_calibration"] = fit.kind == CALIBRATION
    return entry


def _rivals_entries(tuned: Tuned) -> dict[str, Any]:
    """Return what the report says of the rivals of a CRF, tuned on the same cases."""
    return {
        "vector_scaling": to_plain(tuned.scaling),
        "guided_filter": to_plain(tuned.guidance),
        "keep_largest": tuned.keep_largest,
    }
