"""The choice among what was trained: a gain beyond chance, little harm, the simpler model where chance does not tell them apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_helpers import SILENT, crops, material, phantom, start, write_cases  # noqa: E402

from crfrefine.demo.phantom import write_phantom  # noqa: E402
from crfrefine.execution.threads import Workers  # noqa: E402
from crfrefine.parameters.model import CrfParameters  # noqa: E402
from crfrefine.parameters.sections import VolumeParameters  # noqa: E402
from crfrefine.train.between import mean_of, part_way  # noqa: E402
from crfrefine.train.candidates import (  # noqa: E402
    CALIBRATION,
    CRF,
    ONE_WEIGHT,
    UNTRAINED,
    VOLUMES,
    Candidate,
    Rivals,
    choose,
    pooled,
    variants,
)
from crfrefine.train.device import TrainingDevice  # noqa: E402
from crfrefine.train.fit_result import FitResult  # noqa: E402
from crfrefine.train.fitting import Fit  # noqa: E402
from crfrefine.train.folders import locate_folders  # noqa: E402
from crfrefine.train.folds import Split  # noqa: E402
from crfrefine.train.model import Model, mean_dice, network_score  # noqa: E402
from crfrefine.train.options import TrainingOptions  # noqa: E402
from crfrefine.train.plan import make_plan  # noqa: E402
from crfrefine.train.run import run_training  # noqa: E402
from crfrefine.train.schedule import Schedule  # noqa: E402
from crfrefine.train.training import train  # noqa: E402

CPU_DEVICE = TrainingDevice()


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def candidate(kind: str, *gains: float) -> Candidate:
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found: Candidate) -> str | None:
    best = choose(found)
    return None if best is None else best.kind


def test_a_gain_that_chance_explains_is_not_taken() -> None:
    assert chosen_kind(candidate(CRF, 0.03, -0.02, 0.01)) is None
    assert chosen_kind(candidate(CRF, 0.03, 0.02, 0.01)) == CRF
    assert chosen_kind(candidate(CRF)) is None


def test_losses_count_more_than_gains() -> None:
    """The second gains a little more on average, and more than chance explains, at the price of a case that gets much worse."""
    even, rough = candidate(CRF, *[0.010] * 10), candidate("rough", *[0.020] * 9, -0.05)
    assert np.mean(rough.gains) > np.mean(even.gains)
    assert chosen_kind(rough, even) == CRF


def test_a_gentler_model_is_taken_where_it_keeps_most_of_the_gain_and_chance_explains_the_rest() -> None:
    gains = np.array([0.010, 0.014, 0.012, 0.016, 0.013])
    gentle = candidate(UNTRAINED, *gains)
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.004, -0.003, 0.002, -0.001, 0.0])))) == UNTRAINED
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.001, 0.001, 0.002, 0.001, 0.001])))) == CRF  # too even for chance
    assert chosen_kind(gentle, candidate(CRF, *(gains + np.array([0.030, -0.010, 0.008, 0.002, -0.009])))) == CRF  # too much to give up
    assert chosen_kind(candidate(CRF, *gains), gentle) == CRF  # of equal ones the first


def test_many_weights_must_be_better_than_one_by_more_than_chance() -> None:
    """A trained model with the best mean is not taken where the difference from a model with one weight scatters more than it."""
    gains = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
    one = candidate(f"{ONE_WEIGHT}, volume 0.5 largest", *gains)
    rough = gains + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])
    assert chosen_kind(one, candidate(CRF, *rough)) == one.kind
    assert chosen_kind(candidate("another", *gains), candidate(CRF, *rough)) == CRF
    assert chosen_kind(one, candidate(CRF, *(gains + 0.001))) == CRF
    assert chosen_kind(candidate(one.kind, *(-gains)), candidate(CRF, *gains)) == CRF
    assert chosen_kind(one, candidate(CRF, *(-gains))) == one.kind


def test_few_cases_prefer_a_gentle_model_however_good_the_trained_one_is() -> None:
    """Three tumors say nothing of a hippocampus, on which what they would choose without a volume term loses 3 points and more."""
    gains = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
    for number in (3, 7, 8):
        one, full = candidate(f"{ONE_WEIGHT}, volume 0.5 largest", *gains[:number]), candidate(CRF, *(gains[:number] + 0.04))
        assert chosen_kind(one, full) == (CRF if number == 8 else one.kind)
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
        found = Fit(shared, split, [start(4.0, 8.0)], workers, Schedule(2, rungs=()), rivals=Rivals(volumes)).run(SILENT)
    assert [one.kind for one in found.candidates] == [CRF, "CRF, volume 0.5 expected", "CRF, volume 0.75 argmax"]
    for one in found.candidates:
        model = Model(CrfParameters.from_toml(one.parameters.to_toml()), (), shared.sizes)
        for case, gain in zip(split.deciding, one.gains, strict=True):
            dice = mean_dice(model.score(cases[case], shared.loss, 1).confusion, shared.regions)
            assert gain == pytest.approx(dice - mean_dice(network_score(cases[case], shared.loss).confusion, shared.regions), abs=1e-12)
    chosen = choose(found.candidates)
    assert chosen is not None
    assert (found.parameters, found.gains) == (chosen.parameters, chosen.gains)
    assert FitResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_is_chosen_already_is_the_only_candidate() -> None:
    volumes = (VolumeParameters(0.5, "expected"), VolumeParameters(0.75, "argmax"))
    with Workers(2) as workers:
        fit = Fit(
            material(crops(2), ("weights",)),
            Split((0, 1), (0, 1), ()),
            [start(4.0)],
            workers,
            Schedule(1, rungs=()),
            rivals=Rivals(volumes),
            kind="CRF, volume 0.75 argmax",
        )
        found = fit.run(SILENT)
    assert [one.kind for one in found.candidates] == ["CRF, volume 0.75 argmax"]
    assert found.parameters.volume == volumes[1]


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


def quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six phantoms, and one start that suits them."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 2)
    monkeypatch.setattr("crfrefine.train.starts.THETA_ALPHA_VOXELS", (2.0,))
    monkeypatch.setattr("crfrefine.train.starts.THETA_BETAS", (0.15,))
    monkeypatch.setattr("crfrefine.train.starts.WEIGHTS", (8.0,))
    for seed in range(6):
        write_phantom(phantom(seed), tmp_path / "data", f"case{seed}")


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


def test_the_mean_of_two_halves_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was measured on cases that it had not seen; a training on both would be measured on none."""
    quick_start(tmp_path, monkeypatch)
    halves: list[FitResult] = []

    def kept(*arguments: Any) -> FitResult:
        halves.append(train(*arguments))
        return halves[-1]

    monkeypatch.setattr("crfrefine.train.cross_validation.train", kept)
    result = run_training(options(tmp_path, num_optimizer_steps=4))
    assert len(halves) == 2 * len(result.folds)
    for number, fold in enumerate(result.folds):
        fit = fold.tuned.fit
        assert fit.kind not in (CALIBRATION, UNTRAINED, "no CRF")
        first, last = (next(one for one in half.candidates if one.kind == fit.kind) for half in halves[2 * number : 2 * number + 2])
        assert first.parameters != last.parameters
        assert fit.parameters.replace(**{"mean_field.output_temperature": 1.0}) == mean_of(first.parameters, last.parameters)
        assert fit.gains == (*first.gains, *last.gains)
        assert {name.split(":")[0] for name in fit.histories} == {"half 1", "half 2"}


def test_a_run_takes_the_kind_that_all_its_cases_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume term that is chosen is in the folds' parameters, in the file, and in the labels that were measured."""
    quick_start(tmp_path, monkeypatch)

    def by_kind(found: list[Candidate]) -> Candidate:
        return next(one for one in found if one.kind == f"{ONE_WEIGHT}, volume 0.75 largest")

    for module in ("fitting", "cross_validation", "final"):
        monkeypatch.setattr(f"crfrefine.train.{module}.choose", by_kind)
    result = run_training(options(tmp_path))
    wanted = VolumeParameters(0.75, "largest")
    assert [fold.tuned.fit.parameters.volume for fold in result.folds] == [wanted] * 2
    text = (tmp_path / "params.toml").read_text()
    assert CrfParameters.load(tmp_path / "params.toml").volume == wanted
    assert "volume.weight: trained, 0.75; folds 0.75 to 0.75" in text
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert f"{ONE_WEIGHT}, volume 0.75 largest" in [one["kind"] for one in report["final"]["candidates"]]


def test_two_cases_do_not_tell_many_candidates_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 2)
    monkeypatch.setattr("crfrefine.train.starts.NUM_TRAINED", 1)
    write_cases(tmp_path / "data", 4)
    result = run_training(options(tmp_path))
    assert [len(fold.training) for fold in result.folds] == [2, 2]
    assert {one.kind for fold in result.folds for one in fold.tuned.fit.candidates} == {CALIBRATION, CRF}
