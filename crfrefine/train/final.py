"""The last training of a run: on all cases, of the kind that the cases held out chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch

from crfrefine.metrics.overlap import mean_defined
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.baselines import calibrate, calibrate_output, fit_scaling
from crfrefine.train.choice import (
    CALIBRATION,
    CRF,
    UNTRAINED,
    Candidate,
    choose_kind,
    is_gain,
    no_crf,
    pooled,
    ranked,
    rounded,
    variants,
)
from crfrefine.train.comparison import Training, gains_of
from crfrefine.train.fit import fit_starts, histories_of
from crfrefine.train.material import Material
from crfrefine.train.model import Model, mean_tensor
from crfrefine.train.plan import Split
from crfrefine.train.progress import ALL_CASES

# Factor on the step length in the training on all cases, which starts where the folds ended.
STEP_LENGTH = 0.3
# Share of their gain that the mean of the folds may lack against the best one, best by chance.
# A mean that lacks more is of folds that found different models.
TOLERATED_LOSS = 0.2
MEAN_OF_FOLDS = "mean of the folds"


def train_on_all_cases(material: Material, folds: Sequence[Training]) -> Training:
    """Return the training on all cases.

    It is the plain network if the CRFs of the folds do not help the cases held out.
    """
    everything = tuple(range(len(material.crops)))
    scaling = fit_scaling(material, everything)
    # How much the CRFs of the folds added to the mean Dice of each case held out that has one.
    gains = tuple(chain.from_iterable(map(gains_of, folds)))
    candidates = [fold.candidates for fold in folds]
    network_scores = []
    for fold in folds:  # Each case held out counts once.
        num_cases = max((len(candidate.gains) for candidate in fold.candidates), default=1)
        network_scores += [fold.network_score] * num_cases
    final = Training(
        ALL_CASES,
        Split(everything, everything, ()),
        no_crf(folds[0].chosen.parameters, gains),
        mean_defined(network_scores),
        {},
        tuple(pooled(candidates)),
        scaling,
        ranked(material.rules, everything)[0],
        ranked(material.guided, everything)[0],
    )
    chosen = choose_kind(candidates)
    if chosen is not None and is_gain(gains):
        material.progress.stage_started(ALL_CASES)
        final = _train(material, folds, replace(final, chosen=chosen))
        material.progress.training_ended(ALL_CASES, f"{ALL_CASES}: {final.describe()}")
    chosen = calibrate_output(final.chosen, everything, material)
    return replace(final, chosen=chosen)


def _train(material: Material, folds: Sequence[Training], final: Training) -> Training:
    """Return the training on all cases with a model of the kind that is chosen."""
    chosen = final.chosen
    if chosen.kind == UNTRAINED:
        return final
    if chosen.kind == CALIBRATION:
        base = material.starts[0].parameters
        calibrated = calibrate(material, final.split.training, base, final.scaling)
        assert calibrated is not None  # It was a candidate of the folds.
        return replace(final, chosen=replace(chosen, parameters=calibrated))

    # The mean of the folds' models is trained on all cases.
    plan = material.plan
    of_folds = []
    for fold in folds:
        trained = fold.candidate(CRF)
        assert trained is not None  # All folds have the kind that is chosen, so all trained.
        of_folds.append(replace(trained, name=f"{fold.name}: {trained.name}"))
    gains = np.concatenate([each.gains for each in of_folds])
    mean = Candidate(CRF, MEAN_OF_FOLDS, mean_parameters(of_folds, material))
    starts = [mean, *of_folds]
    half = int(np.median([each.optimizer_step for each in of_folds])) // 2
    trajectories = fit_starts(
        material,
        final.split,
        starts,
        min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps),
        partial(material.progress.stepped, ALL_CASES),
        step_length=STEP_LENGTH,
        tolerance=TOLERATED_LOSS * max(0.0, float(gains.mean())),
    )
    winner = trajectories[0]
    assert winner.best is not None  # The cases of the folds had a Dice.
    models = variants(winner.best, plan.volumes, plan.untrained)
    model = next(model for model in models if model.kind == chosen.kind)
    chosen = replace(model, gains=chosen.gains)
    return replace(final, chosen=chosen, histories=histories_of(trajectories))


def mean_parameters(models: Sequence[Candidate], material: Material) -> CrfParameters:
    """Return the mean of models with the same values, as gradients move them.

    One fold's model depends on the cases that it was trained on and stopped by; their mean does so
    much less.
    """
    plan = material.plan
    mean, *others = [Model(each.parameters, plan.learn, plan.cases.sizes) for each in models]
    of_models = [mean.layer.parameters(), *(other.layer.parameters() for other in others)]
    with torch.no_grad():
        for value, *values in zip(*of_models, strict=True):
            value.copy_(mean_tensor([value, *values]))
    return rounded(mean.to_parameters())
