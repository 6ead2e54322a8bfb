"""The whole of `crfrefine train-crf`, stage after stage: prepare, screen, cross-validate, train on all cases, compare, write.

Each stage is a function of the results of the stages before it. Finished folds go into the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.threads import available_threads
from crfrefine.runs.threads import Workers
from crfrefine.train import starts as setup
from crfrefine.train.calibration import calibrate, calibrate_output
from crfrefine.train.candidates import CALIBRATION, UNTRAINED, Candidate, FitResult, choose, is_gain, no_crf, pooled, taken
from crfrefine.train.checkpoint import Checkpoint, Done, Part, fingerprint
from crfrefine.train.comparison import FoldResult, TrainingResult, compare
from crfrefine.train.cross_validation import cross_validate, torch_in_one_thread
from crfrefine.train.curves import require_matplotlib
from crfrefine.train.device import TrainingDevice, choose_device
from crfrefine.train.fitting import Task, train
from crfrefine.train.folds import all_cases
from crfrefine.train.methods import NETWORK, TRAINED
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import TrainingOptions, check_options
from crfrefine.train.plan import make_plan
from crfrefine.train.preparation import Prepared, prepare
from crfrefine.train.report import write_results
from crfrefine.train.screening import screen_starts
from crfrefine.train.session import Session
from crfrefine.train.starts import Start
from crfrefine.train.tuned import Tuned, tune_rivals


@keeping_inputs()
def run_training(options: TrainingOptions, observer: TrainingObserver | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write what was found, and return it.

    Args:
        options: what to do.
        observer: told of the progress.

    Raises:
        CrfRefineError: nothing can be done: no matplotlib, cases that do not fit, a device that is not there, a place that cannot be
            written to.
        KeyboardInterrupt: passed on; finished folds are in the checkpoint.
    """
    require_matplotlib()
    add_inputs(*filter(None, [options.config]))
    check_options(options)
    device = choose_device(options.device)
    with torch_in_one_thread(), Workers(options.threads or available_threads(), one_by_one=device.is_gpu) as workers:
        return _run_stages(options, device, observer or TrainingObserver(), workers)


def _run_stages(options: TrainingOptions, device: TrainingDevice, observer: TrainingObserver, workers: Workers) -> TrainingResult:
    plan = make_plan(options, device)
    for path in options.files:
        check_no_input(path)
    checkpoint = Checkpoint(options.checkpoint, fingerprint(plan.settings(), plan.cases.files))
    done = (checkpoint.load() if options.resume else None) or Done((Part(),) * len(plan.part_names))
    session = Session(plan, done, checkpoint, workers, observer)
    observer.run_started(plan.describe(workers.threads))
    for note in (*([device.note] if device.note else []), *plan.cases.notes):
        observer.note(note)
    try:
        prepared = prepare(session)
        screen_starts(prepared, session)
        folds = cross_validate(prepared, session)
        final = train_on_all_cases(prepared, folds, session)
    except KeyboardInterrupt as interrupt:
        if any(part != Part() for part in session.done.parts):
            interrupt.add_note(f"finished folds are in {options.checkpoint}, run again with --resume for the rest")
        raise
    result = TrainingResult(plan, folds, final, compare(folds, plan), session.seconds, workers.threads)
    write_results(result)
    checkpoint.remove()
    return result


# The final stage: it trains the parameters to be written on all cases, starting from the best results of the folds.

STEP_LENGTH = 0.3
"""Step length in the training on all cases, which starts where the folds ended, relative to that in the folds."""


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult], session: Session) -> Tuned:
    """Return the methods tuned on all cases; no CRF if no fold found one that helps the cases held out."""
    number, everything = len(folds), all_cases(session.plan.num_cases)
    session.part_begun(number)
    part = session.part(number)
    fit = part.fit or calibrate_output(_fit(prepared, folds, session), everything.seen, prepared.material, session.workers)
    if part.fit is None:
        session.note_part(number, fit=fit)
    return tune_rivals(fit, None, everything.seen, prepared, session.workers)


def _fit(prepared: Prepared, folds: Sequence[FoldResult], session: Session) -> FitResult:
    plan = session.plan
    gains = gains_held_out(folds)
    found = [fold for fold in folds if not fold.tuned.fit.is_network]
    if not found or not is_gain(gains):
        network_mean = mean_defined([fold.tuned.fit.network_score for fold in folds])
        return no_crf(folds[0].tuned.fit.parameters, network_mean, gains)
    name = plan.part_names[-1]
    session.observer.stage_started(name)
    everything = all_cases(plan.num_cases)
    calibrated = calibrate(prepared.material, everything.training, prepared.starts[0].parameters, session.workers)
    # What was measured on the cases held out is mostly the kind that the folds' cases choose together, and so should be what is written.
    chosen = choose(pooled([fold.tuned.fit.candidates for fold in folds]))
    kind = found[0].tuned.fit.kind if chosen is None else chosen.kind
    unmoved = {CALIBRATION: calibrated, UNTRAINED: plan.rivals.untrained}.get(kind)
    if unmoved is not None:
        network_mean = mean_defined([fold.tuned.fit.network_score for fold in folds])
        fit = taken(Candidate(kind, kind, unmoved, 0, gains), network_mean)
        session.observer.stage_ended(f"{name}: {fit.describe()}")
        return fit
    fits = {fold.name: fold.tuned.fit for fold in found}
    starts = [Start(f"{name}: {fit.start}", fit.trained) for name, fit in fits.items() if fit.trained is not None]
    half = int(np.median([fit.best_optimizer_step for fit in fits.values() if fit.trained is not None])) // 2
    task = Task(
        name,
        everything,
        starts,
        min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps),
        step_length=STEP_LENGTH,
        trains_best=True,
        calibrated=calibrated,
        rivals=plan.rivals,
        kind=kind,
    )
    fit = train(task, prepared.material, session)
    session.observer.stage_ended(f"{name}: {fit.describe()}")
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
