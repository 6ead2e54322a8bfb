"""The whole of `crfrefine train-crf`, stage after stage: prepare, cross-validate, train on all cases, compare, write."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.plain import to_plain
from crfrefine.base.text import MAX_OF_A_LINE, listed
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import check_replaceable
from crfrefine.runs.cases.case_files import left_out_entries
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train import starts as setup
from crfrefine.train.baselines import Tuned, calibrate, calibrate_output
from crfrefine.train.comparison import NETWORK, TRAINED, FoldResult, TrainingResult, compare
from crfrefine.train.cross_validation import Fit, Task, cross_validate, fingerprint, read_folds
from crfrefine.train.material import choose_device
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import Progress, TrainingObserver, Workers
from crfrefine.train.options import DEFAULT_LEARN, WRITTEN_BY, TrainingOptions
from crfrefine.train.plan import Plan, Prepared, Split, make_plan, prepare
from crfrefine.train.starts import CALIBRATION, UNTRAINED, Candidate, FitResult, Start, choose, is_gain, no_crf, pooled, taken


@keeping_inputs()
def run_training(options: TrainingOptions, observer: TrainingObserver | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write the results, and return them; finished folds stay if the run is stopped."""
    started = time.monotonic()
    add_inputs(*filter(None, [options.config]))
    if not options.learn or not set(options.learn) <= set(DEFAULT_LEARN):
        groups = listed(options.learn) or "nothing"
        raise ConfigError(f"--learn: expected some of {', '.join(DEFAULT_LEARN)}, separated by commas; got {groups}")
    options.check_files()
    plan = make_plan(options, choose_device(options.device))
    observer, torch_threads = observer or TrainingObserver(), torch.get_num_threads()
    torch.set_num_threads(1)  # Sums of several threads depend on how many there are; the time is spent in the engine anyway.
    try:
        with Workers(options.threads or available_threads(), one_by_one=plan.device.is_gpu) as workers:
            return _run_stages(plan, observer, workers, started)
    finally:
        torch.set_num_threads(torch_threads)


def _run_stages(plan: Plan, observer: TrainingObserver, workers: Workers, started: float) -> TrainingResult:
    options = plan.options
    check_replaceable(*plan.fold_files)
    for path in options.files:
        check_no_input(path)
    finished = read_folds(plan.fold_files, fingerprint(plan)) if options.resume else {}
    observer.run_started(plan.describe(workers.threads))
    for note in filter(None, (plan.device.note, *plan.cases.notes)):
        observer.note(note)
    try:
        progress = Progress(observer, 1 + len(plan.folds) - len(finished), setup.NUM_TRAINED * plan.num_optimizer_steps)
        prepared = prepare(plan, workers, progress)
        folds = cross_validate(prepared, finished)
        everything = range(plan.num_cases)
        fit = calibrate_output(train_on_all_cases(prepared, folds), everything, prepared.material, workers)
        final = prepared.tune_rivals(fit, everything)
    except KeyboardInterrupt as interrupt:
        if any(path.exists() for path in plan.fold_files):
            interrupt.add_note(f"finished folds are beside {options.output}, run again with --resume for the rest")
        raise
    result = TrainingResult(plan, folds, final, compare(folds, plan), time.monotonic() - started, workers.threads)
    origin = (
        f" train-crf on {datetime.now(UTC):%Y-%m-%d} from {plan.num_cases} cases: "
        f"{options.report.name} has the verdict, and the values of each fold."
    )
    options.write(SCHEMA, make_report(result), result.parameters, origin)
    for path in plan.fold_files:
        path.unlink(missing_ok=True)
    return result


# Step length in the training on all cases, which starts where the folds ended, relative to that in the folds.
STEP_LENGTH = 0.3


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult]) -> FitResult:
    """Return the result of the training on all cases; no CRF if the CRFs of the folds do not help the cases held out."""
    plan, everything, fits = prepared.plan, tuple(range(prepared.plan.num_cases)), [fold.tuned.fit for fold in folds]
    gains = gains_held_out(folds)
    helping = [fit for fit in fits if not fit.is_network]
    network_mean = mean_defined([fit.network_score for fit in fits])
    if not helping or not is_gain(gains):
        return no_crf(fits[0].parameters, network_mean, gains)
    name = "all cases"
    prepared.progress.observer.stage_started(name)
    calibrated = calibrate(prepared.material, everything, prepared.starts[0].parameters, prepared.workers)
    # The deciding cases of all folds choose the kind; it is mostly the kind that was measured on the cases held out.
    chosen = choose(pooled([fit.candidates for fit in fits]))
    kind = helping[0].kind if chosen is None else chosen.kind
    unmoved = {CALIBRATION: calibrated, UNTRAINED: plan.rivals.untrained}.get(kind)
    if unmoved is not None:
        fit = taken(Candidate(kind, kind, unmoved, 0, gains), network_mean)
    else:
        trained = [(fold.name, fit) for fold, fit in zip(folds, fits, strict=True) if not fit.is_network and fit.trained is not None]
        half = int(np.median([fit.best_optimizer_step for _, fit in trained])) // 2
        task = Task(
            name,
            Split(everything, everything, ()),
            [Start(f"{fold}: {fit.start}", fit.trained) for fold, fit in trained if fit.trained is not None],
            min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps),
            step_length=STEP_LENGTH,
            trains_best=True,
            calibrated=calibrated,
            rivals=plan.rivals,
            kind=kind,
        )
        fit = Fit(prepared.material, task, prepared.workers, prepared.progress.stepped).run()
    prepared.progress.observer.stage_ended(f"{name}: {fit.describe()}")
    return fit


def gains_held_out(folds: Sequence[FoldResult]) -> tuple[float, ...]:
    """Return how much the folds' CRFs added to the mean Dice of each case that they had not seen."""
    gains = []
    for values in (values for fold in folds for values in fold.measured.values()):
        changes = [values[TRAINED][region]["dice"] - values[NETWORK][region]["dice"] for region in values[TRAINED]]
        defined = [change for change in changes if not math.isnan(change)]
        gains += [sum(defined) / len(defined)] if defined else []
    return tuple(gains)


SCHEMA = 1


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    plan, comparison = result.plan, result.comparison
    options, cases, data = plan.options, plan.cases, plan.options.data
    return {
        "seconds": result.seconds,
        "device": plan.device.name,
        "threads": result.threads,
        "options": {
            **{name: getattr(data, name) for name in ("images", "labels", "logits", "masks")},
            "input_type": "labels" if cases.declared is not None else options.input_type,
            "nnunet": data.nnunet,
            "learn": options.learn,
            "loss": options.loss,
            "num_folds": len(plan.folds),
            "num_iterations": options.num_optimizer_steps,
            **{name: getattr(options, name) for name in ("seed", "resample", "config")},
        },
        "cases": cases.case_ids,
        "left_out": left_out_entries(cases.left_out),
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


DEFAULT_NAME = "crfrefine.toml"  # the parameter file in the folder of a trained network of nnU-Net


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder; raise InputError if it holds a file of that name that `train-crf` has not written."""
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
