"""The output temperature of `train-crf`: the likeliest on the cases of the fit, in the file and in the report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax
from training_helpers import SIZES, SPACING, as_case, crops, fit, material, phantom, start, write_cases

import crfrefine
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.calibration import RANGE, calibrate_output, fit_output_temperature, negative_log_likelihood
from crfrefine.train.comparison import measure_probabilities
from crfrefine.train.model import Model
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.run import run_training
from crfrefine.train.threads import Workers

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def cases():
    return crops(3)


@pytest.fixture(scope="module")
def trained(cases):
    return fit(cases, num_optimizer_steps=2)


def drawn(seed, temperature, count=20_000):
    """Logits that are `temperature` times too sharp, and labels drawn from what they should be."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (3, count)).astype(np.float32)
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=0))
    labels = (random.random(count) > probabilities.cumsum(axis=0)[:-1, :]).sum(axis=0)
    return temperature * logits, labels


def test_the_temperature_of_drawn_labels_is_found_and_what_is_certain_does_not_become_a_step():
    for temperature in (0.5, 3.0):
        cases = [drawn(seed, temperature) for seed in range(2)]
        assert fit_output_temperature(cases) == pytest.approx(temperature, rel=0.04)
    logits, labels = drawn(0, 1.0, count=300)
    for said, expected in ((logits.argmax(axis=0), RANGE[0]), ((labels + 1) % 3, RANGE[1])):
        assert fit_output_temperature([(logits, said)]) == pytest.approx(expected, rel=1e-3)
    assert fit_output_temperature([]) == 1.0


def test_log_odds_of_regions_share_one():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 20_000)
    truth = np.stack([labels > 0, labels == 2])
    # The log-odds of a noisy sign, twice as large as they should be.
    seen = np.where(truth, 1.0, -1.0) + random.normal(0, 1, truth.shape)
    prior = np.log([[2.0], [0.5]])
    logits, signs = (2.0 * (2.0 * seen + prior)).astype(np.float32), np.where(truth, np.float32(1.0), np.float32(-1.0))
    expected = -np.log(np.where(truth, expit(logits / 3.0), expit(-logits / 3.0))).mean()
    assert negative_log_likelihood(logits, signs, 3.0) == pytest.approx(expected, rel=1e-5)
    assert fit_output_temperature([(logits, signs)]) == pytest.approx(2.0, rel=0.05)


def test_a_fit_gets_one_and_labels_stay(cases, trained, monkeypatch):
    """The likeliest one of its own marginals; few voxels of many are enough."""
    assert not trained.is_network
    shared = material(cases)
    with Workers(2) as workers:
        found = calibrate_output(trained, range(3), shared, workers)
        monkeypatch.setattr("crfrefine.train.calibration.MAX_VALUES", 4 * 900)
        few = calibrate_output(trained, range(3), shared, workers).parameters.mean_field.output_temperature
    temperature = found.parameters.mean_field.output_temperature
    assert len({few, temperature, 1.0}) == 3
    assert few == pytest.approx(temperature, rel=0.25)
    assert replace(found, parameters=trained.parameters) == trained
    assert found.parameters.replace(**{"mean_field.output_temperature": 1.0}) == trained.parameters
    model, losses = Model(trained.parameters, (), SIZES), []
    for scale in (temperature, 1.1 * temperature, temperature / 1.1):

        def loss(logits, labels, scale=scale):
            return torch.nn.functional.cross_entropy((logits / scale).t(), labels)

        losses.append(np.mean([model.score(crop, loss, 1).loss for crop in cases]))
    assert min(losses) == losses[0]


def test_a_run_measures_probabilities_and_says_what_became_of_them(tmp_path):
    data = locate_folders(write_cases(tmp_path / "data", 4))
    steps = {"num_folds": 2, "num_optimizer_steps": 1, "threads": 2}
    result = run_training(TrainingOptions(data, start(8.0).parameters, output=tmp_path / "params.toml", learn=("weights",), **steps))
    assert not result.final.fit.is_network
    written = CrfParameters.load(tmp_path / "params.toml")
    assert written == result.parameters
    assert written.mean_field.output_temperature != 1.0
    report = json.loads((tmp_path / "params.report.json").read_text())
    rows = {(row["method"], row["metric"]): row["mean"] for row in report["comparison_of_probabilities"]}
    assert {metric for _, metric in rows} == {"ece", "brier", "nll"}
    assert report["verdict"]["probabilities"]["change"] == "too few cases"
    losses = []
    for fold in result.folds:
        for name in fold.measured:
            case = as_case(phantom(int(name.removeprefix("case"))))
            refined = crfrefine.refine(case.logits, case.image, spacing=SPACING, parameters=fold.tuned.fit.parameters)
            losses.append(measure_probabilities(case, refined.marginals)["all"]["nll"])
    assert rows["trained CRF", "nll"] == pytest.approx(np.mean(losses), rel=1e-3)
