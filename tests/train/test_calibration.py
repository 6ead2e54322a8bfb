"""The network recalibrated: a start of the training, and what a CRF must be better than."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_helpers import REGIONS, SILENT, SIZES, crops, material, phantom, start, write_cases  # noqa: E402

from crfrefine.demo.phantom import Phantom, write_phantom  # noqa: E402
from crfrefine.execution.threads import Workers  # noqa: E402
from crfrefine.parameters.model import CrfParameters  # noqa: E402
from crfrefine.train.baselines import fit_vector_scaling  # noqa: E402
from crfrefine.train.calibration import calibrate, with_calibrated  # noqa: E402
from crfrefine.train.crops import Crop  # noqa: E402
from crfrefine.train.fit_result import FitResult  # noqa: E402
from crfrefine.train.fitting import Fit  # noqa: E402
from crfrefine.train.folders import locate_folders  # noqa: E402
from crfrefine.train.folds import split_training  # noqa: E402
from crfrefine.train.model import Model, calibrated_score, dice_of, network_score  # noqa: E402
from crfrefine.train.options import TrainingOptions  # noqa: E402
from crfrefine.train.run import run_training  # noqa: E402
from crfrefine.train.schedule import Schedule  # noqa: E402
from crfrefine.train.starts import without_crf  # noqa: E402

SHIFT = 8.0
CALIBRATION = ("temperature", "bias")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def shifted() -> list[Crop]:
    """Cases whose logits are right but for a bias of label 2."""
    cases = crops(3, "right")
    for crop in cases:
        crop.logits[2] -= SHIFT
    return cases


def train(cases: list[Crop], weight: float, learn: tuple[str, ...], *, calibrates: bool = True) -> FitResult:
    """A short training from one start."""
    shared, split, first = material(cases, learn), split_training(range(len(cases)), seed=1), start(8.0, weight)
    with Workers(2) as workers:
        calibrated = calibrate(shared, split.training, first.parameters, workers) if calibrates else None
        return Fit(shared, split, [first], workers, Schedule(2, rungs=()), calibrated=calibrated).run(SILENT)


def test_the_recalibrated_network_is_vector_scaling_as_a_crf_without_weights(shifted):
    split = split_training(range(3), seed=1)
    with Workers(2) as workers:
        scaling = fit_vector_scaling(material(shifted), split, workers)
        found = calibrate(material(shifted), split.training, start(4.0).parameters, workers)
    assert found.bilateral[0].weight == 0.0
    assert found.mean_field.temperature == pytest.approx(scaling.temperature, rel=1e-5)
    np.testing.assert_allclose(found.mean_field.bias, np.array(scaling.bias) * scaling.temperature, rtol=1e-4, atol=1e-5)
    assert found == CrfParameters.from_toml(found.to_toml())
    shared, model = material(shifted), Model(found, (), SIZES)
    for crop in shifted:
        one, other = calibrated_score(found, crop, shared.loss), model.score(crop, shared.loss, 1)
        np.testing.assert_array_equal(one.confusion, other.confusion)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.parametrize("learn", [("temperature",), ("bias",)], ids=str)
def test_what_is_not_learned_of_the_calibration_stays(shifted, learn):
    base = start(4.0).parameters.replace(**{"mean_field.bias": [0.5, 0.0, 2.0, 0.0], "mean_field.temperature": 0.8})
    with Workers(2) as workers:
        found = calibrate(material(shifted, ("weights", *learn)), range(3), base, workers).mean_field
        assert calibrate(material(shifted, ("weights",)), range(3), base, workers) is None
    if "bias" in learn:
        assert found.temperature == 0.8
        assert found.bias[2] - np.mean([found.bias[0], found.bias[1], found.bias[3]]) > 0.8
    else:
        assert found.temperature != 0.8
        np.testing.assert_allclose(found.bias, base.mean_field.bias, rtol=1e-5)


def test_the_best_start_is_tried_on_the_recalibrated_network_too():
    starts, base = [start(4.0), start(8.0)], start(6.0).parameters
    calibrated = replace(base, mean_field=replace(base.mean_field, temperature=1.5, bias=(1.0, 0.0, 0.0, -1.0)))
    assert with_calibrated(starts, None) == starts
    *same, added = with_calibrated(starts, calibrated)
    assert same == starts
    assert added.name == "theta_alpha 4, recalibrated"
    assert added.parameters.bilateral == starts[0].parameters.bilateral
    assert added.parameters.mean_field == replace(starts[0].parameters.mean_field, temperature=1.5, bias=(1.0, 0.0, 0.0, -1.0))


def test_a_crf_that_is_worse_than_the_recalibrated_network_is_not_taken(shifted):
    """Weights that erase what is small, and are not learned: better than nothing is only the recalibration."""
    found = train(shifted, 200.0, CALIBRATION)
    assert found.is_calibration
    assert not found.is_network
    assert found.parameters.bilateral[0].weight == 0.0
    assert found.describe().startswith("no CRF is better than the network recalibrated: Dice 0.")
    assert FitResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    shared = material(shifted)
    dice = [np.nanmean(dice_of(calibrated_score(found.parameters, crop, shared.loss).confusion, REGIONS)) for crop in shifted]
    assert found.score == pytest.approx(np.mean(dice), abs=1e-12)
    assert train(shifted, 200.0, CALIBRATION, calibrates=False).is_network


def test_a_crf_that_adds_to_the_recalibrated_network_is_taken():
    """The phantom's image tells its labels apart, and no recalibration comes near that."""
    cases = crops(3)
    for crop in cases:
        crop.logits[2] -= 1.0
    found = train(cases, 4.0, ("weights", *CALIBRATION))
    assert found.start == "theta_alpha 8"
    assert found.score > found.network_score
    assert found.parameters.bilateral[0].weight != 0.0


def test_without_a_crf_there_is_no_bias_either(shifted):
    parameters = without_crf(start(4.0).parameters.replace(**{"mean_field.bias": [1.0, -9.0, 0.0, 3.0]}))
    shared = material(shifted)
    for crop in shifted:
        found, network = Model(parameters, (), SIZES).score(crop, shared.loss, 1), network_score(crop, shared.loss)
        np.testing.assert_array_equal(found.confusion, network.confusion)


def test_a_run_does_not_lose_to_vector_scaling(tmp_path, monkeypatch):
    """With weights that do harm and stay as they are, each case held out has the values of vector scaling, and the file says what it is."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 20)
    write_cases(tmp_path / "data", 0)
    for seed in range(4):
        case = phantom(seed, "right")
        logits = case.logits.copy()
        logits[2] -= SHIFT
        write_phantom(Phantom(case.image, case.labels, logits, case.spacing), tmp_path / "data", f"case{seed}")
    options = TrainingOptions(
        locate_folders(tmp_path / "data"),
        tmp_path / "params.toml",
        parameters=CrfParameters().replace(**{"bilateral.weight": 200.0}),
        learn=CALIBRATION,
        num_folds=2,
        num_optimizer_steps=2,
        threads=2,
    )
    result = run_training(options)
    values = [fold.measured[case] for fold in result.folds for case in fold.held_out]
    assert len(values) == 4
    for methods in values:
        assert methods["trained CRF"] == methods["vector scaling"]
        assert np.mean([row["dice"] for row in methods["trained CRF"].values()]) > np.mean(
            [row["dice"] for row in methods["network"].values()]
        )
    text = (tmp_path / "params.toml").read_text()
    assert "No CRF was better than the network recalibrated" in " ".join(text.replace("#", " ").split())
    assert "mean_field.bias[2]: trained" in text
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert report["final"]["is_calibration"]
    assert CrfParameters.load(tmp_path / "params.toml").mean_field.bias[2] > 0.5


def test_all_cases_are_recalibrated_as_those_of_the_folds(tmp_path, monkeypatch):
    """What is not learned of the calibration is that of the starts, not that of the default parameters."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 5)
    monkeypatch.setattr("crfrefine.train.starts.NUM_TRAINED", 1)
    bases = []

    def recorded(material, cases, base, workers):
        bases.append(base)
        return calibrate(material, cases, base, workers)

    for module in ("cross_validation", "final"):
        monkeypatch.setattr(f"crfrefine.train.{module}.calibrate", recorded)
    options = TrainingOptions(
        locate_folders(write_cases(tmp_path / "data", 3)),
        tmp_path / "params.toml",
        learn=("weights", "bias"),
        num_folds=2,
        num_optimizer_steps=1,
        threads=2,
    )
    run_training(options)
    assert len(bases) > options.num_folds
    assert {base.mean_field.temperature for base in bases} == {0.7}
