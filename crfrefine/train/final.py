"""The final stage: it trains the parameters to be written on all cases, starting from the best results of the folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.train import starts as setup
from crfrefine.train.calibration import calibrate
from crfrefine.train.candidates import CALIBRATION, UNTRAINED, Candidate, choose, is_gain, pooled
from crfrefine.train.fit_result import FitResult, no_crf, taken
from crfrefine.train.folds import all_cases
from crfrefine.train.methods import NETWORK, TRAINED
from crfrefine.train.model import mean_defined
from crfrefine.train.output_temperature import calibrate_output
from crfrefine.train.plan import Plan
from crfrefine.train.preparation import Prepared
from crfrefine.train.results import FoldResult
from crfrefine.train.schedule import Schedule
from crfrefine.train.session import Session
from crfrefine.train.starts import Start
from crfrefine.train.training import Task, train
from crfrefine.train.tuned import Tuned, tune_rivals

STEP_LENGTH = 0.3
"""Step length in the training on all cases, which starts where the folds ended, relative to that in the folds."""


def train_on_all_cases(plan: Plan, prepared: Prepared, folds: Sequence[FoldResult], session: Session) -> Tuned:
    """Return the methods tuned on all cases; no CRF if no fold found one that helps the cases held out."""
    number = len(folds)
    fit = session.journal.part(number).fit
    if fit is None:
        fit = _fit(plan, prepared, folds, session)
        fit = calibrate_output(fit, range(plan.num_cases), prepared.material, session.workers)
        session.journal.note_part(number, replace(session.journal.part(number), fit=fit))
    tuned = tune_rivals(number, fit, all_cases(plan.num_cases), plan, prepared, session)
    session.journal.save()
    return tuned


def _fit(plan: Plan, prepared: Prepared, folds: Sequence[FoldResult], session: Session) -> FitResult:
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
