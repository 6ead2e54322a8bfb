"""The last training of a run: on all cases, of the kind that the cases held out chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.baselines import VectorScaling, calibrate
from crfrefine.train.choice import (
    CALIBRATION,
    UNTRAINED,
    FitResult,
    choose_kind,
    is_gain,
    no_crf,
    pooled,
    taken,
    variants,
)
from crfrefine.train.comparison import NETWORK, TRAINED, FoldResult
from crfrefine.train.fit import Fit
from crfrefine.train.model import mean_defined
from crfrefine.train.plan import Split
from crfrefine.train.preparing import Prepared
from crfrefine.train.starts import Start

# Factor on the step length in the training on all cases, which starts where the folds ended.
STEP_LENGTH = 0.3
ALL_CASES = "all cases"  # name of the part of the run after the folds


def train_on_all_cases(
    prepared: Prepared, folds: Sequence[FoldResult], scaling: VectorScaling
) -> FitResult:
    """Return the result of the training on all cases, to which `scaling` is fitted, too.

    The result is the network alone if the CRFs of the folds do not help the cases held out.
    """
    fits = [fold.tuned.fit for fold in folds]
    network_score = mean_defined([fit.network_score for fit in fits])
    gains = gains_held_out(folds)
    trainings = [fit.candidates for fit in fits]
    candidates = tuple(pooled(trainings))
    chosen = choose_kind(trainings)
    if chosen is None or not is_gain(gains):
        network = no_crf(fits[0].parameters, network_score, gains)
        return replace(network, candidates=candidates)

    prepared.progress.stage_started(ALL_CASES)
    fit = replace(taken(chosen, network_score), candidates=candidates)
    everything = range(len(prepared.material.crops))
    base = prepared.starts[0].parameters
    if chosen.kind == CALIBRATION:
        calibrated = calibrate(prepared.material, everything, base, prepared.workers, scaling)
        assert calibrated is not None  # It was a candidate of the folds.
        fit = replace(fit, parameters=calibrated)
    elif chosen.kind != UNTRAINED:
        fit = _continue_folds(prepared, folds, fit)
    prepared.progress.training_ended(ALL_CASES, f"{ALL_CASES}: {fit.describe()}")
    return fit


def _continue_folds(prepared: Prepared, folds: Sequence[FoldResult], fit: FitResult) -> FitResult:
    """Train the best of the folds' models on all cases; return the result of the same kind."""
    plan = prepared.plan
    starts = []
    steps = []
    for fold in folds:
        trained = fold.tuned.fit.trained
        assert trained is not None  # All folds have the kind that is chosen, so all trained.
        starts.append(Start(f"{fold.name}: {trained.start}", trained.parameters))
        steps.append(trained.optimizer_step)
    half = int(np.median(steps)) // 2
    everything = tuple(range(len(plan.cases.files)))
    training = Fit(
        prepared.material,
        prepared.workers,
        prepared.progress.stepped,
        ALL_CASES,
        Split(everything, everything, ()),
        starts,
        num_optimizer_steps=min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps),
        step_length=STEP_LENGTH,
        trains_best=True,
    )
    trajectories = training.run()
    winner = trajectories[0]
    assert winner.best is not None  # The cases of the folds had a Dice.
    models: dict[str, CrfParameters] = dict(variants(winner.best.parameters, plan.rivals))
    return replace(
        fit,
        start=winner.start.name,
        parameters=models[fit.kind],
        best_optimizer_step=winner.best.optimizer_step,
        histories={each.start.name: each.history for each in trajectories if each.history},
    )


def gains_held_out(folds: Sequence[FoldResult]) -> tuple[float, ...]:
    """Return how much the CRFs of the folds added to the mean Dice of the cases held out.

    There is a gain for each case that has a Dice.
    """
    gains = []
    for fold in folds:
        for values in fold.measured.values():
            changes = []
            for region, trained in values[TRAINED].items():
                change = trained["dice"] - values[NETWORK][region]["dice"]
                if not math.isnan(change):
                    changes.append(change)
            if changes:
                gains.append(sum(changes) / len(changes))
    return tuple(gains)
