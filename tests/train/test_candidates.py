"""The choice among what was trained: a gain beyond chance, little harm, the simpler model where chance does not tell them apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_helpers import SILENT, crops, material, shorten, start, write_cases

from crfrefine.execution.threads import Workers
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.train.between import mean_of, part_way
from crfrefine.train.candidates import CALIBRATION, CRF, ONE_WEIGHT, UNTRAINED, VOLUMES, Candidate, Rivals, choose, pooled, variants
from crfrefine.train.device import TrainingDevice
from crfrefine.train.fit_result import FitResult
from crfrefine.train.fitting import Fit
from crfrefine.train.folders import locate_folders
from crfrefine.train.folds import Split
from crfrefine.train.model import Model, mean_dice, network_score
from crfrefine.train.options import TrainingOptions
from crfrefine.train.plan import make_plan
from crfrefine.train.run import run_training
from crfrefine.train.schedule import Schedule
from crfrefine.train.training import train

CPU_DEVICE = TrainingDevice()


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def candidate(kind: str, *gains: float) -> Candidate:
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found: Candidate) -> str | None:
    best = choose(found)
    return None if best is None else best.kind


def test_a_gain_that_chance_explains_is_not_taken() -> None:
    """Losses count more than gains: the last gains a little more on average, at the price of a case that gets much worse."""
    assert chosen_kind(candidate(CRF, 0.03, -0.02, 0.01)) is None
    assert chosen_kind(candidate(CRF, 0.03, 0.02, 0.01)) == CRF
    assert chosen_kind(candidate(CRF)) is None
    assert chosen_kind(candidate("rough", *[0.020] * 9, -0.05), candidate(CRF, *[0.010] * 10)) == CRF


def test_a_gentler_model_is_taken_where_it_keeps_most_of_the_gain_and_chance_explains_the_rest() -> None:
    gains = np.array([0.010, 0.014, 0.012, 0.016, 0.013])
    gentle = candidate(UNTRAINED, *gains)
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.004, -0.003, 0.002, -0.001, 0.0])))) == UNTRAINED
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.001, 0.001, 0.002, 0.001, 0.001])))) == CRF  # too even for chance
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.030, -0.010, 0.008, 0.002, -0.009])))) == CRF  # too much to give up
    assert chosen_kind(candidate(CRF, *gains), gentle) == CRF  # of equal ones the first


def test_many_weights_must_be_better_than_one_by_more_than_chance() -> None:
    """A trained model with the best mean is not taken where the difference from a model with one weight scatters more than it.

    Nor with less than eight cases, however good: three tumors say nothing of a hippocampus.
    """
    gains = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
    one = candidate(f"{ONE_WEIGHT}, volume 0.5 largest", *gains)
    rough = gains + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])
    assert chosen_kind(one, candidate(CRF, *rough)) == one.kind
    assert chosen_kind(candidate("another", *gains), candidate(CRF, *rough)) == CRF
    assert chosen_kind(one, candidate(CRF, *(gains + 0.001))) == CRF
    assert chosen_kind(candidate(one.kind, *(-gains)), candidate(CRF, *gains)) == CRF
    assert chosen_kind(one, candidate(CRF, *(-gains))) == one.kind
    for number in (3, 7, 8):
        few, full = candidate(one.kind, *gains[:number]), candidate(CRF, *(gains[:number] + 0.04))
        assert chosen_kind(few, full) == (CRF if number == 8 else one.kind)
        assert chosen_kind(candidate(one.kind, *-gains[:number]), full) == CRF


def test_trainings_on_other_cases_add_their_cases() -> None:
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


def test_a_model_is_tried_with_each_volume_term() -> None:
    """The first goes before the model without, as a gentler one, unless the model has a volume term of its own."""
    volumes = (VolumeParameters(0.5, "argmax"), VolumeParameters(0.25, "expected"))
    plain = start(4.0).parameters
    found = variants(plain, Rivals(volumes, prefers_first_volume=True))
    assert [kind for kind, _ in found] == ["CRF, volume 0.5 argmax", CRF, "CRF, volume 0.25 expected"]
    assert [parameters.volume for _, parameters in found] == [volumes[0], VolumeParameters(), volumes[1]]
    assert all(parameters.bilateral == plain.bilateral for _, parameters in found)
    own = Rivals((volumes[0], VolumeParameters(0.0, "argmax")))
    assert [kind for kind, _ in variants(plain.replace(volume=volumes[0]), own)] == [CRF, "CRF, no volume term"]


def test_models_between_the_preset_and_the_trained_one_come_before_it() -> None:
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


def test_every_candidate_is_measured_on_the_cases_that_decide() -> None:
    """Each with the Dice that its parameters have, read from a file again; the one that they choose is the result."""
    cases, volumes = crops(4), (VolumeParameters(0.5, "expected"), VolumeParameters(0.75, "argmax"))
    shared, split = material(cases, ("weights",)), Split((0, 1), (2, 3), ())
    with Workers(2) as workers:
        found = Fit(shared, split, [start(4.0, 8.0)], workers, Schedule(1, rungs=()), rivals=Rivals(volumes)).run(SILENT)
        kind = "CRF, volume 0.75 argmax"
        chosen_already = Fit(shared, split, [start(4.0)], workers, Schedule(1, rungs=()), rivals=Rivals(volumes), kind=kind).run(SILENT)
    assert [one.kind for one in found.candidates] == [CRF, "CRF, volume 0.5 expected", kind]
    for one in found.candidates:
        model = Model(CrfParameters.from_toml(one.parameters.to_toml()), (), shared.sizes)
        for case, gain in zip(split.deciding, one.gains, strict=True):
            dice = mean_dice(model.score(cases[case], shared.loss, 1).confusion, shared.regions)
            assert gain == pytest.approx(dice - mean_dice(network_score(cases[case], shared.loss).confusion, shared.regions), abs=1e-12)
    chosen = choose(found.candidates)
    assert chosen is not None
    assert (found.parameters, found.gains) == (chosen.parameters, chosen.gains)
    assert FitResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert [one.kind for one in chosen_already.candidates] == [kind]
    assert chosen_already.parameters.volume == volumes[1]


def options(root: Path, **changes: object) -> TrainingOptions:
    settings = {"num_folds": 2, "num_optimizer_steps": 1, "threads": 2, **changes}
    return TrainingOptions(locate_folders(root / "data"), root / "params.toml", **settings)  # type: ignore[arg-type]


def test_volume_terms_are_tried_on_every_device(tmp_path: Path) -> None:
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
    assert make_plan(options(tmp_path, learn=("volume",)), CPU_DEVICE).learn == ("volume",)


def test_the_mean_of_two_models() -> None:
    """Bandwidths and temperature by their logarithms; models that differ in anything else have none."""
    first = start(4.0).parameters.replace(
        **{"bilateral.weight": (2.0, 4.0), "bilateral.theta_alpha": 3.0, "mean_field.temperature": 0.5, "mean_field.bias": (0.25, -0.25)}
    )
    last = first.replace(
        **{"bilateral.weight": (4.0, 5.0), "bilateral.theta_alpha": 12.0, "mean_field.temperature": 2.0, "mean_field.bias": 0.0}
    )
    mean = mean_of(first, last)
    assert mean is not None
    assert mean.bilateral[0].weight == (3.0, 4.5)
    assert mean.bilateral[0].theta_alpha == pytest.approx(6.0)
    assert mean.mean_field.temperature == pytest.approx(1.0)
    assert mean.mean_field.bias == (0.125, -0.125)
    assert mean_of(first, first) == first
    for change in ({"spatial.weight": 2.0}, {"volume.weight": 0.5}, {"mean_field.num_iterations": 3}):
        assert mean_of(first, last.replace(**change)) is None
    assert mean_of(first, last.replace(bilateral=last.bilateral * 2)) is None


def test_a_run_takes_the_mean_of_two_halves_of_the_kind_that_all_cases_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was measured on cases that it had not seen; a training on both would be measured on none.

    A volume term that is chosen is in the folds' parameters, in the file, and in the labels that were measured.
    """
    shorten(monkeypatch)
    write_cases(tmp_path / "data", 6)
    halves: list[FitResult] = []
    kind = f"{ONE_WEIGHT}, volume 0.75 largest"
    for module in ("fitting", "cross_validation", "final"):
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
