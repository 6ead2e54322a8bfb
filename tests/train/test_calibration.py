"""The network recalibrated: a start of the training, and what a CRF must be better than."""

import json
from dataclasses import replace

import numpy as np
import pytest
from training_helpers import SIZES, crops, material, phantom, start

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.demo.phantom import write_phantom
from crfrefine.train.baselines import fit_scaling
from crfrefine.train.calibration import calibrate, with_calibrated
from crfrefine.train.candidates import CALIBRATION as CALIBRATED
from crfrefine.train.candidates import CRF, FitResult
from crfrefine.train.folds import Split
from crfrefine.train.model import Model, network_score
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.run import run_training
from crfrefine.train.threads import Workers

SHIFT = 8.0
CALIBRATION = ("temperature", "bias")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def shifted():
    """Cases whose logits are right but for a bias of label 2."""
    cases = crops(3, "right")
    for crop in cases:
        crop.logits[2] -= SHIFT
    return cases


def test_the_recalibrated_network_is_vector_scaling_as_a_crf_without_weights(shifted, monkeypatch):
    """Which finds the bias that was put in."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 30)
    split = Split((0,), (0,), ())
    shared = material(shifted)
    with Workers(2) as workers:
        scaling = fit_scaling(shared, split.seen, workers)
        found = calibrate(shared, split.training, start(4.0).parameters, workers)
    assert scaling.bias[2] - np.mean([scaling.bias[label] for label in (0, 1, 3)]) > 1.0
    assert sum(scaling.bias) == pytest.approx(0.0, abs=1e-5)
    assert found.bilateral[0].weight == 0.0
    assert found.mean_field.temperature == pytest.approx(scaling.temperature, rel=1e-5)
    np.testing.assert_allclose(found.mean_field.bias, np.array(scaling.bias) * scaling.temperature, rtol=1e-4, atol=1e-5)
    assert found == CrfParameters.from_toml(found.to_toml())
    one, other = network_score(shifted[0], shared.loss, calibrated=found), Model(found, (), SIZES).score(shifted[0], shared.loss, 1)
    np.testing.assert_array_equal(one.confusion, other.confusion)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_what_is_not_learned_of_the_calibration_stays(shifted):
    base = start(4.0).parameters.replace(**{"mean_field.bias": [0.5, 0.0, 2.0, 0.0], "mean_field.temperature": 0.8})
    with Workers(2) as workers:
        temperature, bias = (calibrate(material(shifted, (name,)), range(3), base, workers).mean_field for name in CALIBRATION)
        assert calibrate(material(shifted, ("weights",)), range(3), base, workers) is None
    assert bias.temperature == 0.8 != temperature.temperature
    assert bias.bias[2] - np.mean([bias.bias[0], bias.bias[1], bias.bias[3]]) > 0.8
    np.testing.assert_allclose(temperature.bias, base.mean_field.bias, rtol=1e-5)


def test_the_best_start_is_tried_on_the_recalibrated_network_too():
    best, base = start(4.0), start(6.0).parameters
    calibrated = replace(base, mean_field=replace(base.mean_field, temperature=1.5, bias=(1.0, 0.0, 0.0, -1.0)))
    added = with_calibrated(best, calibrated)
    assert added.name == "theta_alpha 4, recalibrated"
    assert added.parameters.bilateral == best.parameters.bilateral
    assert added.parameters.mean_field == replace(best.parameters.mean_field, temperature=1.5, bias=(1.0, 0.0, 0.0, -1.0))


def test_a_run_does_not_lose_to_vector_scaling(tmp_path, monkeypatch):
    """With weights that do harm and stay as they are, each case held out has the values of vector scaling, and the file says what it is."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 20)
    for seed in range(4):
        case = phantom(seed, "right")
        case.logits[2] -= SHIFT
        write_phantom(case, tmp_path / "data", f"case{seed}")
    steps = {"learn": CALIBRATION, "num_folds": 2, "num_optimizer_steps": 2, "threads": 2}
    parameters = CrfParameters().replace(**{"bilateral.weight": 200.0})
    result = run_training(TrainingOptions(locate_folders(tmp_path / "data"), parameters, output=tmp_path / "params.toml", **steps))
    values = [methods for fold in result.folds for methods in fold.measured.values()]
    assert len(values) == 4
    for methods in values:
        assert methods["trained CRF"] == methods["vector scaling"]
        trained, network = (np.mean([row["dice"] for row in methods[name].values()]) for name in ("trained CRF", "network"))
        assert trained > network
    assert {one.kind for fold in result.folds for one in fold.tuned.fit.candidates} == {CALIBRATED, CRF}
    final = result.final.fit
    assert final.describe().startswith("no CRF is better than the network recalibrated: Dice 0.")
    assert from_plain(FitResult, json.loads(json.dumps(to_plain(final)))) == final
    assert json.loads((tmp_path / "params.report.json").read_text())["final"]["is_calibration"]
    written = CrfParameters.load(tmp_path / "params.toml")
    assert (written.bilateral[0].weight, written.mean_field.bias[2] > 0.5) == (0.0, True)
