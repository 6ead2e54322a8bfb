"""A single training: it learns where the image helps, leaves the network alone where it does not, and is the same every time."""

import json
import warnings

import numpy as np
import pytest
import torch
from training_helpers import REGIONS, SIZES, crops, fit, material, start

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.baselines import Scores
from crfrefine.train.fit import Trajectory
from crfrefine.train.model import Model, mean_dice, network_refiner, score
from crfrefine.train.options import LEARNABLE
from crfrefine.train.plan import split_training
from crfrefine.train.starts import FitResult, rounded

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def useful():
    return crops(5)


@pytest.fixture(scope="module")
def whole(useful):
    return fit(useful[:3])


def mean_gain(parameters, cases):
    """Dice above the network's, on cases."""
    shared = material(cases)
    model = Model(parameters, (), SIZES)
    found = [mean_dice(score(model.refine, crop, shared.loss, 1)[1], REGIONS) for crop in cases]
    return np.mean(found) - np.mean([mean_dice(score(network_refiner(), crop, shared.loss, 1)[1], REGIONS) for crop in cases])


def test_training_improves_cases_that_it_has_not_seen(useful, whole):
    """What decides is the gain of the parameters as a file holds them: `infer` reproduces what was measured."""
    result = whole
    assert not result.is_network
    # The phantom's labels differ in intensity, so that a CRF gains many points; a tenth of that would be a doubtful success.
    assert mean_gain(result.parameters, useful[3:]) > max(0.05, mean_gain(start(8.0).parameters, useful[3:]))
    read = CrfParameters.from_toml(result.parameters.to_toml())
    assert rounded(read) == read == result.parameters
    deciding = [useful[case] for case in split_training(range(3), seed=1).deciding]
    assert mean_gain(read, deciding) == pytest.approx(result.score - result.network_score, abs=1e-12)
    assert from_plain(FitResult, json.loads(json.dumps(to_plain(result)))) == result


def test_no_crf_is_the_outcome_where_logits_are_right_or_without_foreground_and_without_a_warning():
    result = fit(crops(2, "right"), num_optimizer_steps=3)
    assert result.is_network
    assert (result.parameters.bilateral[0].weight, result.parameters.mean_field.temperature) == (0.0, 1.0)
    cases = crops(3, "right")
    for crop in cases:
        crop.labels[:], crop.outside[:] = 0, 0
        crop.logits[0] += 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(cases, num_optimizer_steps=2)
    assert result.is_network
    assert np.isnan(result.network_score)
    assert Scores((0.0, 1.0, 2.0), np.full((2, 3), np.nan)).best([0, 1]) == 0.0


def test_a_training_has_the_same_bits_on_another_number_of_threads(useful, whole):
    assert fit(useful[:3], threads=1) == whole


def test_the_prior_pulls_values_back_to_where_they_began(useful):
    """Its gradient is that of squared logarithms: zero at the start, and along a value's logarithm twice the distance."""
    model = Model(start(8.0).parameters, LEARNABLE, SIZES)
    origin = model.positions()
    assert all(not gradient.any() for gradient in model.pull(origin))
    (raw,) = model.layer.group("temperature")
    with torch.no_grad():
        raw += 0.3
    gradients = {id(parameter): gradient for (_, parameter), gradient in zip(model.learned, model.pull(origin), strict=True)}
    # The small number added before the logarithm takes off a hundredth of it.
    assert float(gradients.pop(id(raw))) == pytest.approx(0.6, rel=0.05)
    assert all(not gradient.any() for gradient in gradients.values())
    shared, moved = material(useful), []
    for prior in (0.0, 10.0):
        trajectory = Trajectory(start(8.0), shared, 4, prior=prior)
        for _ in range(4):
            trajectory.step(trajectory.model.gradient(useful[0], shared.loss, 1)[1], 0.0)
        moved.append(sum(float(((now - then) ** 2).sum().detach()) for now, then in zip(trajectory.model.positions(), origin, strict=True)))
    assert moved[1] < 0.5 * moved[0]
