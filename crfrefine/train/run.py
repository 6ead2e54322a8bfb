"""The whole of `crfrefine train-crf`, stage after stage: prepare, cross-validate, train on all cases, compare, write."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.threads import available_threads
from crfrefine.io.atomic import check_replaceable
from crfrefine.train import starts as setup
from crfrefine.train.calibration import calibrate, calibrate_output
from crfrefine.train.candidates import CALIBRATION, UNTRAINED, Candidate, FitResult, choose, is_gain, no_crf, pooled, taken
from crfrefine.train.comparison import FoldResult, TrainingResult, compare
from crfrefine.train.cross_validation import cross_validate, fingerprint, read_folds
from crfrefine.train.device import choose_device
from crfrefine.train.fitting import Fit, Task
from crfrefine.train.folds import Split
from crfrefine.train.methods import NETWORK, TRAINED
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import Progress, TrainingObserver
from crfrefine.train.options import TrainingOptions, check_options
from crfrefine.train.plan import Plan, make_plan
from crfrefine.train.preparation import Prepared, prepare
from crfrefine.train.report import write_results
from crfrefine.train.starts import Start
from crfrefine.train.threads import Workers


@keeping_inputs()
def run_training(options: TrainingOptions, observer: TrainingObserver | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write the results, and return them.

    Args:
        options: the options of the run.
        observer: receives the progress.

    Raises:
        CrfRefineError: nothing can be done: cases that do not fit, a device that is not there, a place that cannot be written to.
        KeyboardInterrupt: passed on; finished folds are in their files.
    """
    started = time.monotonic()
    add_inputs(*filter(None, [options.config]))
    check_options(options)
    plan = make_plan(options, choose_device(options.device))
    with _torch_in_one_thread(), Workers(options.threads or available_threads(), one_by_one=plan.device.is_gpu) as workers:
        return _run_stages(plan, observer or TrainingObserver(), workers, started)


@contextmanager
def _torch_in_one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are; the time is spent in the engine anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    write_results(result)
    for path in plan.fold_files:
        path.unlink(missing_ok=True)
    return result


STEP_LENGTH = 0.3
"""Step length in the training on all cases, which starts where the folds ended, relative to that in the folds."""


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult]) -> FitResult:
    """Return what was fitted to all cases; no CRF if no fold found one that helps the cases held out."""
    plan, everything, fits = prepared.plan, tuple(range(prepared.plan.num_cases)), [fold.tuned.fit for fold in folds]
    gains = gains_held_out(folds)
    helping = [fit for fit in fits if not fit.is_network]
    network_mean = mean_defined([fit.network_score for fit in fits])
    if not helping or not is_gain(gains):
        return no_crf(fits[0].parameters, network_mean, gains)
    name = plan.part_names[-1]
    prepared.observer.stage_started(name)
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
    prepared.observer.stage_ended(f"{name}: {fit.describe()}")
    return fit


def gains_held_out(folds: Sequence[FoldResult]) -> tuple[float, ...]:
    """Return how much the folds' CRFs added to the mean Dice of each case that they had not seen."""
    gains = []
    for values in (values for fold in folds for values in fold.measured.values()):
        changes = [values[TRAINED][region]["dice"] - values[NETWORK][region]["dice"] for region in values[TRAINED]]
        defined = [change for change in changes if not math.isnan(change)]
        gains += [sum(defined) / len(defined)] if defined else []
    return tuple(gains)
