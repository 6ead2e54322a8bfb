"""The choice among what was trained: a gain beyond chance, little harm, the simpler model where chance does not tell them apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
from training_helpers import shorten, start, write_cases

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.train.between import mean_of, part_way
from crfrefine.train.candidates import CALIBRATION, CRF, ONE_WEIGHT, UNTRAINED, VOLUMES, Candidate, Rivals, choose, pooled, variants
from crfrefine.train.device import TrainingDevice
from crfrefine.train.fitting import train
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.plan import make_plan
from crfrefine.train.run import run_training

CPU_DEVICE = TrainingDevice()


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def candidate(kind, *gains):
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found):
    best = choose(found)
    return None if best is None else best.kind


GAINS = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
ROUGH = GAINS + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])  # better on average, not beyond chance
EVEN, ONE = GAINS[:5], f"{ONE_WEIGHT}, volume 0.5 largest"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # A gain that chance explains is not taken; losses count more than gains.
        ([(CRF, [0.03, -0.02, 0.01])], None),
        ([(CRF, [0.03, 0.02, 0.01])], CRF),
        ([(CRF, [])], None),
        ([("rough", [0.020] * 9 + [-0.05]), (CRF, [0.010] * 10)], CRF),
        # A gentler model, which comes first, is taken where it keeps most of the gain and chance explains the rest.
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.004, -0.003, 0.002, -0.001, 0.0]))], UNTRAINED),
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.001, 0.001, 0.002, 0.001, 0.001]))], CRF),  # too even for chance
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.030, -0.010, 0.008, 0.002, -0.009]))], CRF),  # too much to give up
        ([(CRF, EVEN), (UNTRAINED, EVEN)], CRF),  # of equal ones the first
        # Many weights must be better than one by more than chance, on eight cases or more: three tumors say nothing of a hippocampus.
        ([(ONE, GAINS), (CRF, ROUGH)], ONE),
        ([("another", GAINS), (CRF, ROUGH)], CRF),
        ([(ONE, GAINS), (CRF, GAINS + 0.001)], CRF),
        ([(ONE, -GAINS), (CRF, GAINS)], CRF),
        ([(ONE, GAINS), (CRF, -GAINS)], ONE),
        ([(ONE, GAINS[:7]), (CRF, GAINS[:7] + 0.04)], ONE),
        ([(ONE, -GAINS[:7]), (CRF, GAINS[:7])], CRF),
    ],
)
def test_the_choice_among_gains(found, expected):
    assert chosen_kind(*(candidate(kind, *gains) for kind, gains in found)) == expected


def test_trainings_on_other_cases_add_their_cases():
    """Alone, each would take something else; what only one of them tried is no candidate of both."""
    first = [candidate(CALIBRATION, 0.010, 0.011), candidate(CRF, 0.004, 0.005), candidate("only here", 0.5, 0.5)]
    second = [candidate(CALIBRATION, -0.010, 0.002), replace(candidate(CRF, 0.024, 0.025), start="theta_alpha 8")]
    found = pooled([first, second])
    assert [one.kind for one in found] == [CALIBRATION, CRF]
    assert found[1].gains == (0.004, 0.005, 0.024, 0.025)
    assert found[1].start == "theta_alpha 8"
    assert chosen_kind(*first) == "only here"
    assert chosen_kind(*found) == CRF
    assert pooled([]) == []


def test_models_between_the_preset_and_the_trained_one_come_before_it():
    """By the logarithms of bandwidths and temperature, by weights and biases themselves."""
    untrained = CrfParameters().replace(**{"bilateral.theta_alpha": 2.0, "bilateral.weight": 4.0, "mean_field.temperature": 1.0})
    trained = start(8.0).parameters.replace(
        **{"bilateral.weight": [6.0, 2.0, 4.0, 8.0], "mean_field.temperature": 0.25, "mean_field.bias": [1.0, -1.0, 0.0, 0.5]}
    )
    found = variants(trained, Rivals(untrained=untrained))
    assert [kind for kind, _ in found] == [UNTRAINED, "CRF, 0.5 of the way", "CRF, 0.75 of the way", CRF]
    assert (found[0][1], found[-1][1]) == (untrained, trained)
    protected = variants(trained, Rivals(VOLUMES, untrained, prefers_first_volume=True))
    names = [UNTRAINED, *(f"{ONE_WEIGHT}{way}, volume 0.5 largest" for way in (", 0.5 of the way", ", 0.75 of the way", "")), CRF]
    assert [kind for kind, _ in protected] == [*names, f"{ONE_WEIGHT}, volume 0.75 largest"]
    steady = protected[3][1]
    assert (steady.bilateral[0].weight, steady.mean_field.bias) == (5.0, 0.0)
    assert steady.volume == VOLUMES[0]
    assert protected[1][1].bilateral[0].weight == pytest.approx(4.5)
    assert protected[4] == (CRF, trained)
    gentle = found[1][1]
    assert gentle == part_way(untrained, trained, 0.5) == CrfParameters.from_toml(gentle.to_toml())
    assert gentle.bilateral[0].weight == (5.0, 3.0, 4.0, 6.0)
    assert gentle.bilateral[0].theta_alpha == pytest.approx(4.0)
    assert gentle.bilateral[0].theta_beta == pytest.approx((0.005**0.5,) * 2, rel=1e-5)  # six digits, as a file has
    assert gentle.mean_field.temperature == pytest.approx(0.5)
    assert gentle.mean_field.bias == (0.5, -0.5, 0.0, 0.25)
    assert part_way(untrained, trained, 0.75).mean_field.temperature == pytest.approx(0.25**0.75, rel=1e-5)


def options(root, **changes):
    settings = {"num_folds": 2, "num_optimizer_steps": 1, "threads": 2, **changes}
    return TrainingOptions(locate_folders(root / "data"), output=root / "params.toml", **settings)


def test_volume_terms_are_tried_on_every_device(tmp_path):
    """By default; a model's own volume term is learned instead."""
    write_cases(tmp_path / "data", 2)
    for device in (CPU_DEVICE, TrainingDevice("cuda:0")):
        plan = make_plan(options(tmp_path), device)
        assert {volume.keep for volume in plan.rivals.volumes} == {"largest"}
        assert "volume" not in plan.learn
    assert make_plan(options(tmp_path, learn=("weights", "theta")), CPU_DEVICE).rivals.volumes == ()
    own = make_plan(options(tmp_path, parameters=CrfParameters().replace(**{"volume.weight": 0.5})), CPU_DEVICE)
    assert own.rivals.volumes == (VolumeParameters(0.0, "expected"),)
    assert "volume" in own.learn


def test_the_mean_of_two_models():
    """Is half of the way between them; models that differ in anything else than what is learned have none."""
    changes = {"bilateral.weight": (2.0, 4.0), "bilateral.theta_alpha": 3.0, "mean_field.bias": (0.25, -0.25)}
    first = start(4.0).parameters.replace(**changes)
    last = first.replace(**{"bilateral.weight": (4.0, 5.0), "bilateral.theta_alpha": 12.0, "mean_field.temperature": 2.0})
    assert mean_of(first, last) == part_way(first, last, 0.5)
    assert mean_of(first, last).bilateral[0].theta_alpha == pytest.approx(6.0)
    for change in ({"spatial.weight": 2.0}, {"volume.weight": 0.5}, {"mean_field.num_iterations": 3}):
        assert mean_of(first, last.replace(**change)) is None
    assert mean_of(first, last.replace(bilateral=last.bilateral * 2)) is None


def test_a_run_takes_the_mean_of_two_halves_of_the_kind_that_all_cases_choose(tmp_path, monkeypatch):
    """Each was measured on cases that it had not seen; a training on both would be measured on none.

    A volume term that is chosen is in the folds' parameters, in the file, and in the labels that were measured.
    """
    shorten(monkeypatch)
    write_cases(tmp_path / "data", 6)
    halves = []
    kind = f"{ONE_WEIGHT}, volume 0.75 largest"
    for module in ("fitting", "cross_validation", "run"):
        monkeypatch.setattr(f"crfrefine.train.{module}.choose", lambda found: next(one for one in found if one.kind == kind))
    monkeypatch.setattr("crfrefine.train.cross_validation.train", lambda *given: halves.append(train(*given)) or halves[-1])
    result = run_training(options(tmp_path, num_optimizer_steps=2))
    assert len(halves) == 2 * len(result.folds)
    for number, fold in enumerate(result.folds):
        fit = fold.tuned.fit
        assert fit.kind == kind
        first, last = (next(one for one in half.candidates if one.kind == kind) for half in halves[2 * number : 2 * number + 2])
        assert first.parameters != last.parameters
        assert fit.parameters.replace(**{"mean_field.output_temperature": 1.0}) == mean_of(first.parameters, last.parameters)
        assert fit.gains == (*first.gains, *last.gains)
        assert {name.split(":")[0] for name in fit.histories} == {"half 1", "half 2"}
        assert fit.parameters.volume == VolumeParameters(0.75, "largest")
    assert CrfParameters.load(tmp_path / "params.toml").volume == VolumeParameters(0.75, "largest")
    assert "volume.weight: trained, 0.75; folds 0.75 to 0.75" in (tmp_path / "params.toml").read_text()
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert kind in [one["kind"] for one in report["final"]["candidates"]]
