"""The whole of `crfrefine train-crf`, stage after stage: prepare, cross-validate, train on all cases, compare, write.

Each stage is a function of the results of the stages before it.
"""

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
from crfrefine.train.device import TrainingDevice, choose_device
from crfrefine.train.fitting import Fit, Task
from crfrefine.train.folds import Split
from crfrefine.train.methods import NETWORK, TRAINED
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import Progress, TrainingObserver
from crfrefine.train.options import TrainingOptions, check_options
from crfrefine.train.plan import make_plan
from crfrefine.train.preparation import Prepared, prepare
from crfrefine.train.report import write_results
from crfrefine.train.starts import Start
from crfrefine.train.threads import Workers


@keeping_inputs()
def run_training(options: TrainingOptions, observer: TrainingObserver | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write what was found, and return it.

    Args:
        options: what to do.
        observer: told of the progress.

    Raises:
        CrfRefineError: nothing can be done: cases that do not fit, a device that is not there, a place that cannot be written to.
        KeyboardInterrupt: passed on; finished folds are in their files.
    """
    add_inputs(*filter(None, [options.config]))
    check_options(options)
    device = choose_device(options.device)
    with torch_in_one_thread(), Workers(options.threads or available_threads(), one_by_one=device.is_gpu) as workers:
        return _run_stages(options, device, observer or TrainingObserver(), workers)


@contextmanager
def torch_in_one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are; the time is spent in the engine anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_stages(options: TrainingOptions, device: TrainingDevice, observer: TrainingObserver, workers: Workers) -> TrainingResult:
    started = time.monotonic()
    plan = make_plan(options, device)
    check_replaceable(*plan.fold_files)
    for path in options.files:
        check_no_input(path)
    finished = read_folds(plan.fold_files, fingerprint(plan)) if options.resume else {}
    observer.run_started(plan.describe(workers.threads))
    for note in (*([device.note] if device.note else []), *plan.cases.notes):
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


# The final stage: it trains the parameters to be written on all cases, starting from the best results of the folds.

STEP_LENGTH = 0.3
"""Step length in the training on all cases, which starts where the folds ended, relative to that in the folds."""


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult]) -> FitResult:
    """Return what was fitted to all cases; no CRF if no fold found one that helps the cases held out."""
    plan, everything = prepared.plan, tuple(range(prepared.plan.num_cases))
    gains = gains_held_out(folds)
    helping = [fold for fold in folds if not fold.tuned.fit.is_network]
    network_mean = mean_defined([fold.tuned.fit.network_score for fold in folds])
    if not helping or not is_gain(gains):
        return no_crf(folds[0].tuned.fit.parameters, network_mean, gains)
    name = plan.part_names[-1]
    prepared.observer.stage_started(name)
    calibrated = calibrate(prepared.material, everything, prepared.starts[0].parameters, prepared.workers)
    # What was measured on the cases held out is mostly the kind that the folds' cases choose together, and so should be what is written.
    chosen = choose(pooled([fold.tuned.fit.candidates for fold in folds]))
    kind = helping[0].tuned.fit.kind if chosen is None else chosen.kind
    unmoved = {CALIBRATION: calibrated, UNTRAINED: plan.rivals.untrained}.get(kind)
    if unmoved is not None:
        fit = taken(Candidate(kind, kind, unmoved, 0, gains), network_mean)
    else:
        fits = {fold.name: fold.tuned.fit for fold in helping if fold.tuned.fit.trained is not None}
        half = int(np.median([fit.best_optimizer_step for fit in fits.values()])) // 2
        task = Task(
            name,
            Split(everything, everything, ()),
            [Start(f"{name}: {fit.start}", fit.trained) for name, fit in fits.items() if fit.trained is not None],
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
    for fold in folds:
        for values in fold.measured.values():
            pairs = [(values[TRAINED][region]["dice"], values[NETWORK][region]["dice"]) for region in values[TRAINED]]
            defined = [trained - network for trained, network in pairs if not math.isnan(trained - network)]
            gains += [sum(defined) / len(defined)] if defined else []
    return tuple(gains)
