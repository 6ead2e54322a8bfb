"""The choice among what was trained: a gain beyond chance, little harm, the simpler model where chance does not tell them apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
from training_helpers import shorten, start, write_cases

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.train.candidates import CALIBRATION, CRF, ONE_WEIGHT, UNTRAINED, VOLUMES, Candidate, Rivals, choose, pooled, variants
from crfrefine.train.material import TrainingDevice
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.plan import make_plan
from crfrefine.train.run import run_training

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def candidate(kind, *gains):
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found):
    best = choose(found)
    return None if best is None else best.kind


GAINS = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
ROUGH = GAINS + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])  # better on average, not beyond chance
EVEN, ONE = GAINS[:5], f"{ONE_WEIGHT}, volume 0.5"


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


def test_gentler_models_come_before_the_trained_one():
    untrained = CrfParameters().replace(**{"bilateral.theta_alpha": 2.0})
    trained = start(8.0).parameters.replace(**{"bilateral.weight": [6.0, 2.0, 4.0, 8.0], "mean_field.bias": [1.0, -1.0, 0.0, 0.5]})
    assert variants(trained, Rivals(untrained=untrained)) == [(UNTRAINED, untrained), (CRF, trained)]
    protected = variants(trained, Rivals(VOLUMES, untrained, prefers_first_volume=True))
    names = [UNTRAINED, f"{ONE_WEIGHT}, volume 0.5", CRF, f"{ONE_WEIGHT}, volume 0.75"]
    assert [kind for kind, _ in protected] == names
    gentle = protected[1][1]
    assert (gentle.bilateral[0].weight, gentle.mean_field.bias, gentle.volume) == (5.0, 0.0, VOLUMES[0])
    assert protected[2] == (CRF, trained)


def options(root, **changes):
    settings = {"num_folds": 2, "num_optimizer_steps": 1, "threads": 2, **changes}
    return TrainingOptions(locate_folders(root / "data"), output=root / "params.toml", **settings)


def test_volume_terms_are_tried_on_every_device(tmp_path):
    """By default; a model's own volume term is learned instead."""
    write_cases(tmp_path / "data", 2)
    own = CrfParameters().replace(**{"volume.weight": 0.5})
    for device, changes, volumes, is_learned in (
        (TrainingDevice(), {}, [0.5, 0.75], False),
        (TrainingDevice("cuda:0"), {}, [0.5, 0.75], False),
        (TrainingDevice(), {"learn": ("weights", "theta")}, [], False),
        (TrainingDevice(), {"parameters": own}, [0.0], True),
    ):
        plan = make_plan(options(tmp_path, **changes), device)
        assert [volume.weight for volume in plan.rivals.volumes] == volumes
        assert ("volume" in plan.learn) == is_learned


def test_the_kind_that_is_chosen_is_written(tmp_path, monkeypatch):
    """A volume term that is chosen is in the folds' parameters, in the file, and in the labels that were measured."""
    shorten(monkeypatch)
    write_cases(tmp_path / "data", 6)
    kind = f"{ONE_WEIGHT}, volume 0.75"
    for module in ("fitting", "run"):
        monkeypatch.setattr(f"crfrefine.train.{module}.choose", lambda found: next(one for one in found if one.kind == kind))
    result = run_training(options(tmp_path, num_optimizer_steps=2))
    for fold in result.folds:
        assert not set(fold.split.training) & set(fold.split.deciding)
        assert fold.tuned.fit.kind == kind
        assert fold.tuned.fit.parameters.volume == VolumeParameters(0.75)
    assert CrfParameters.load(tmp_path / "params.toml").volume == VolumeParameters(0.75)
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert kind in [candidate["kind"] for candidate in report["final"]["candidates"]]
