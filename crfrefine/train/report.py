"""The report of a training run, as its JSON file has it."""

from __future__ import annotations

from typing import Any

from crfrefine.base.plain import to_plain
from crfrefine.cases.incomplete import left_out_entries
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train.choice import CALIBRATION
from crfrefine.train.comparison import Training, TrainingResult


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    cases = result.plan.cases
    options = result.plan.options
    settings = {
        "images": options.images,
        "labels": options.labels,
        "logits": options.logits,
        "masks": options.masks,
        "nnunet": options.nnunet,
        **options.to_dict(),
        "num_folds": len(result.folds),
        "num_iterations": options.num_optimizer_steps,
        "learn": options.learn,
        "loss": options.loss,
        "seed": options.seed,
        "reference_mapping": cases.reading.reference_mapping,
        "config": options.config,
    }
    if options.lesions is not None:
        settings["lesions"] = options.lesions
    if cases.reading.declared is not None:
        settings["input_type"] = "labels"
    folds = []
    for fold in result.folds:
        entry: dict[str, Any] = {"name": fold.name}
        for role, numbers in vars(fold.split).items():
            entry[role] = [cases.case_ids[number] for number in numbers]
        folds.append({**entry, "fit": _fit_entry(fold), **_rivals_entries(fold)})
    return {
        "seconds": result.seconds,
        "device": result.device,
        "threads": result.threads,
        "options": settings,
        "cases": cases.case_ids,
        "left_out": left_out_entries(cases.left_out),
        "label_names": cases.label_names,
        "channels": to_plain(cases.regions),
        "regions": result.plan.regions,
        "verdict": result.verdict.to_dict(),
        "verdict_without_postprocessing": result.verdict_alone.to_dict(),
        "parameters": result.parameters.to_dict(),
        "final": _fit_entry(result.final),
        **_rivals_entries(result.final),
        "folds": folds,
        "comparison": summary_dicts(result.summary),
        f"comparison_with_{result.rule.replace(' ', '_')}": summary_dicts(result.summary_with_rule),
        "comparison_of_probabilities": summary_dicts(result.summary_of_probabilities),
        "measurements": [to_plain(line) for line in result.table],
    }


def _fit_entry(training: Training) -> dict[str, Any]:
    """Return the report's entry of the choice of a training, and of its candidates."""
    chosen = training.chosen
    return {
        "start": chosen.name,
        "parameters": chosen.parameters.to_dict(),
        "score": training.score,
        "network_score": training.network_score,
        "gains": list(chosen.gains),
        "best_iteration": chosen.optimizer_step,
        "histories": training.histories,
        "kind": chosen.kind,
        "candidates": to_plain(training.candidates),
        "is_network": chosen.is_network,
        "is_calibration": chosen.kind == CALIBRATION,
    }


def _rivals_entries(training: Training) -> dict[str, Any]:
    """Return the report's entry of the rivals of a CRF, tuned on the same cases."""
    entries = {
        "vector_scaling": to_plain(training.scaling),
        "guided_filter": to_plain(training.guidance),
        "keep_largest": training.rule.keep_largest,
    }
    if training.rule.keep_largest == "none":  # It is a rule for lesions.
        entries["min_component_ml"] = training.rule.min_component_ml
    return entries
