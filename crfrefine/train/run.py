"""The whole of `crfrefine train-crf`, stage after stage: prepare, screen, cross-validate, train on all cases, compare, write.

Each stage is a function of what the stages before it returned. Finished work goes into the checkpoint, and so does the training in
progress.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.threads import available_threads
from crfrefine.runs.execution.threads import Workers
from crfrefine.train import starts as setup
from crfrefine.train.budget import Budget, TimeIsUpError
from crfrefine.train.calibration import calibrate, calibrate_output
from crfrefine.train.candidates import CALIBRATION, CRF, UNTRAINED, Candidate, FitResult, choose, is_gain, no_crf, pooled, taken
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
from crfrefine.train.screening import screen_starts, screened_cases
from crfrefine.train.session import Session
from crfrefine.train.starts import Schedule, Start
from crfrefine.train.tuned import Tuned, tune_rivals, tuned_so_far


@keeping_inputs()
def run_training(options: TrainingOptions, observer: TrainingObserver | None = None, *, started: float | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write what was found, and return it.

    Args:
        options: what to do.
        observer: told of the progress.
        started: reading of the monotonic clock when the time of `max_minutes` began; None: now.

    Raises:
        CrfRefineError: nothing can be done: no matplotlib, cases that do not fit, a device that is not there, a place that cannot be
            written to.
        KeyboardInterrupt: passed on, after the checkpoint is saved.
    """
    require_matplotlib()
    budget = Budget(options.max_minutes, started=started)
    add_inputs(*filter(None, [options.config]))
    check_options(options)
    device = choose_device(options.device)
    with (
        torch_in_one_thread(),
        Workers(options.threads or available_threads(), one_by_one=device.is_gpu, check=budget.check) as workers,
    ):
        return _run_stages(options, device, observer or TrainingObserver(), workers, budget)


def _run_stages(
    options: TrainingOptions,
    device: TrainingDevice,
    observer: TrainingObserver,
    workers: Workers,
    budget: Budget,
) -> TrainingResult:
    plan = make_plan(options, device)
    for path in options.files:
        check_no_input(path)
    digest = fingerprint(plan.settings(), plan.cases.files)
    checkpoint = Checkpoint(options.checkpoint, digest)
    done = (checkpoint.load() if options.resume else None) or Done((Part(),) * len(plan.part_names))
    budget.spent_before = done.seconds
    session = Session(plan, done, checkpoint, budget, workers, observer)
    observer.run_started(plan.describe(workers.threads))
    for note in (*([device.note] if device.note else []), *plan.cases.notes):
        observer.note(note)
    prepared: Prepared | None = None
    try:
        prepared = prepare(session)
        screen_starts(prepared, session)
        folds = cross_validate(prepared, session)
        final, is_over = train_on_all_cases(prepared, folds, session), False
    except TimeIsUpError:
        session.save()
        folds = measured_folds(prepared, session)
        final, is_over = best_so_far(prepared, folds, session), True
        observer.note(f"the time (--max-minutes) ran out; what was done is in {options.checkpoint}, run again with --resume for the rest")
    except KeyboardInterrupt as interrupt:
        session.save()
        interrupt.add_note(f"what was done is in {options.checkpoint}, run again with --resume for the rest")
        raise
    seconds = budget.spent_seconds
    result = TrainingResult(plan, folds, final, compare(folds, plan), seconds, workers.threads)
    write_results(result)
    if not is_over:
        checkpoint.remove()
    return result


# The result of a run that ran out of time: the folds that were measured, and the best model so far.


def measured_folds(prepared: Prepared | None, session: Session) -> tuple[FoldResult, ...]:
    """Return the folds whose cases were all measured; none if not even the cases were read."""
    plan, folds = session.plan, []
    for number, split in enumerate(plan.folds if prepared is not None else ()):
        part = session.part(number)
        if part.fit is not None and part.measured is not None:
            tuned = tuned_so_far(part, part.fit, split.seen, plan, prepared)
            folds.append(FoldResult(plan.part_names[number], split, tuned, part.measured))
    return tuple(folds)


def best_so_far(prepared: Prepared | None, folds: Sequence[FoldResult], session: Session) -> Tuned:
    """Return the best model that was found, with what is tuned of its rivals.

    It is that of all cases, or else of the fold that gained most, or the best start; no CRF if none helped the cases that it had not seen.
    """
    plan = session.plan
    part = session.part(len(plan.folds))
    fit = part.fit or replace(_best_of_folds(folds, session) or _best_start(prepared, session), stopped_by_time=True)
    return tuned_so_far(part, fit, range(plan.num_cases), plan, prepared)


def _best_of_folds(folds: Sequence[FoldResult], session: Session) -> FitResult | None:
    fits = [(name, part.fit) for name, part in zip(session.plan.part_names, session.done.parts, strict=True) if part.fit is not None]
    if not fits:
        return None
    name, best = max(fits, key=lambda named: (not named[1].is_network, named[1].score - named[1].network_score))
    gains = gains_held_out(folds)
    if best.is_network or (gains and not is_gain(gains)):
        return no_crf(best.parameters, best.network_score, gains)
    start = best.start if best.is_calibration else f"{name}: {best.start}"
    return replace(best, start=start, best_optimizer_step=0, histories={})


def _best_start(prepared: Prepared | None, session: Session) -> FitResult:
    """Return the start that gained most of those that were tried, without any training."""
    if prepared is None or session.done.screening is None:
        return no_crf(session.plan.base, math.nan)
    dice = np.array(session.done.screening, dtype=float)
    network = prepared.smoothing.dice[screened_cases(session.plan.num_cases), 0]
    best = max(range(dice.shape[1]), key=lambda start: np.nan_to_num(mean_defined(dice[:, start]), nan=-1.0))
    differences = dice[:, best] - network
    gains = tuple(differences[~np.isnan(differences)].tolist())
    start = prepared.starts[best]
    if not is_gain(gains):
        return no_crf(start.parameters, mean_defined(network), gains)
    return taken(Candidate(CRF, start.name, start.parameters, 0, gains), mean_defined(network))


# The final stage: it trains the parameters to be written on all cases, starting from the best results of the folds.

STEP_LENGTH = 0.3
"""Step length in the training on all cases, which starts where the folds ended, relative to that in the folds."""


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult], session: Session) -> Tuned:
    """Return the methods tuned on all cases; no CRF if no fold found one that helps the cases held out."""
    number, everything = len(folds), all_cases(session.plan.num_cases)
    fit = session.part(number).fit
    if fit is None:
        fit = calibrate_output(_fit(prepared, folds, session), everything.seen, prepared.material, session.workers)
        session.note_part(number, fit=fit)
    tuned = tune_rivals(number, fit, everything, prepared, session)
    session.save()
    return tuned


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
    num_optimizer_steps = min(max(setup.EVALUATE_EVERY, half), plan.schedule.num_optimizer_steps)
    # All starts are judged without training, and the best one is trained.
    schedule = Schedule(num_optimizer_steps, rungs=((0, 1),), step_length=STEP_LENGTH)
    fit = train(Task(name, everything, starts, schedule, 1, calibrated, plan.rivals, kind), prepared.material, session)
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
