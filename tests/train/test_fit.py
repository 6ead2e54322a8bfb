"""A single training: it learns where the image helps, leaves the network alone where it does not, and is the same every time."""

import json
import warnings

import numpy as np
import pytest
import torch
from training_helpers import LARGER, REGIONS, SILENT, SIZES, SPACING, crops, fit, material, start, table_of_gains

from crfrefine.execution.threads import Workers
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.verdict import Outcome
from crfrefine.train.baselines import choose_best, fit_vector_scaling, smoothed, smoothing_scores
from crfrefine.train.comparison import judge
from crfrefine.train.fitting import Fit, Hooks
from crfrefine.train.folds import Split, split_training
from crfrefine.train.methods import (
    DICE_LARGEST,
    GUIDED_LARGEST,
    LARGEST,
    MEASURED,
    NNUNET,
    SCALING_LARGEST,
    SMOOTHING_LARGEST,
    TRAINED,
    TRAINED_LARGEST,
)
from crfrefine.train.model import Model, mean_dice, network_score
from crfrefine.train.options import LEARNABLE
from crfrefine.train.rounding import rounded
from crfrefine.train.schedule import Schedule
from crfrefine.train.screening import choose_starts, screen
from crfrefine.train.starts import Start, make_starts, without_crf
from crfrefine.train.trajectory import Trajectory


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_torch():
    """As in a run: sums of several threads depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def useful():
    return crops(5)


@pytest.fixture(scope="module")
def whole(useful):
    """A training that nothing stops: its result, and its state after each part."""
    states = []
    result = fit(useful[:3], hooks=Hooks(lambda *_: None, lambda state: states.append(json.dumps(state)), lambda: False))
    return result, states


def mean_gain(parameters, cases):
    """Dice above the network's, on cases."""
    shared = material(cases)
    model = Model(parameters, (), SIZES)
    found = [mean_dice(model.score(crop, shared.loss, 1).confusion, REGIONS) for crop in cases]
    return np.mean(found) - np.mean([mean_dice(network_score(crop, shared.loss).confusion, REGIONS) for crop in cases])


def test_training_improves_cases_that_it_has_not_seen(useful):
    result = fit(useful[:3], num_optimizer_steps=8)
    assert not result.is_network
    gain_before = mean_gain(start(8.0).parameters, useful[3:])
    # The phantom's labels differ in intensity, so that a CRF gains many points; a tenth of that would be a doubtful success.
    assert mean_gain(result.parameters, useful[3:]) > max(0.05, gain_before)


def test_no_crf_is_the_outcome_where_logits_are_right():
    result = fit(crops(3, "right"), num_optimizer_steps=4)
    assert result.is_network
    assert result.parameters.bilateral[0].weight == 0.0
    assert result.parameters.mean_field.temperature == 1.0


def test_a_weight_near_zero_can_be_reached_and_left():
    """From 0 the CRF grows where it helps; where labels are single voxels, those of the labels shrink to a fraction."""
    for kind, weight in (("useful", 0.0), ("scattered", 0.3)):
        cases = crops(2, kind, **LARGER)
        shared = material(cases)
        trajectory = Trajectory(start(6.0, weight=weight), ("weights",), SIZES, Schedule(100))
        for _ in range(7):
            found = [trajectory.model.gradient(crop, shared.loss, 1) for crop in cases]
            trajectory.step([sum(parts[1:], parts[0]) for parts in zip(*(one.gradients for one in found), strict=True)], 0.0)
        weights = trajectory.model.to_parameters().bilateral[0].weight
        assert min(weights) > 0.3 if kind == "useful" else max(weights[1:]) < 0.1


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_a_restored_training_ends_with_the_same_bits(useful, whole, stop_after):
    """Stopped in the first rung, in its second start, and in the last rung."""
    expected, states = whole
    assert len(states) > stop_after
    split, schedule = split_training(range(3), seed=1), Schedule(6, rungs=((3, 1),))
    with Workers(1) as workers:
        again = Fit(material(useful[:3]), split, [start(4.0), start(8.0)], workers, schedule, json.loads(states[stop_after]))
        result = again.run(Hooks(lambda *_: None, lambda state: None, lambda: False))
    assert result == expected


def test_the_result_does_not_depend_on_threads(useful):
    assert fit(useful[:3], num_optimizer_steps=3, threads=1) == fit(useful[:3], num_optimizer_steps=3, threads=3)


def test_time_that_is_up_ends_a_training_with_what_it_has(useful):
    calls = []

    def is_over():
        calls.append(None)
        return len(calls) > 6

    result = fit(useful[:3], num_optimizer_steps=50, hooks=Hooks(lambda *_: None, lambda state: None, is_over))
    assert max(len(history) for history in result.histories.values()) < 6


def test_without_any_time_the_first_start_is_judged_as_it_is(useful):
    result = fit(useful[:3], num_optimizer_steps=50, hooks=Hooks(lambda *_: None, lambda state: None, lambda: True))
    assert (result.start, result.best_optimizer_step, result.stopped_by_time) == ("theta_alpha 4", 0, True)
    assert result.score > result.network_score
    assert not fit(useful[:2], num_optimizer_steps=2).stopped_by_time


def test_cases_without_foreground_decide_for_no_crf_without_a_warning():
    cases = crops(3, "right")
    for crop in cases:
        crop.labels[:] = 0
        crop.logits[0] += 100.0
        crop.outside[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(cases, num_optimizer_steps=2)
    assert result.is_network
    assert np.isnan(result.network_score)
    assert choose_best(np.full((2, 3), np.nan), (0.0, 1.0, 2.0), [0, 1]) == 0.0


def test_frozen_groups_stay_as_they_start(useful):
    result = fit(useful[:2], num_optimizer_steps=3, learn=("weights",))
    (kernel,) = result.parameters.bilateral
    assert kernel.theta_alpha in (4.0, 8.0)
    assert kernel.theta_beta == 0.1
    assert result.parameters.mean_field.temperature == 0.7
    assert set(kernel.weight) != {4.0}


def test_a_result_survives_its_own_text(useful):
    result = fit(useful[:2], num_optimizer_steps=2)
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_starts_span_the_scales_of_the_data():
    starts = make_starts(None, LEARNABLE, 4, 2, SPACING)
    voxel = np.prod(SPACING) ** (1 / 3)
    alphas = sorted({one.parameters.bilateral[0].theta_alpha for one in starts})
    assert alphas[0] == pytest.approx(voxel)
    assert alphas[-1] >= 8 * voxel
    assert len({one.name for one in starts}) == len(starts)


def test_starts_are_in_voxels_where_positions_are():
    given = CrfParameters().replace(**{"mean_field.positions": "voxels"})
    starts = make_starts(given, LEARNABLE, 4, 2, SPACING)[1:]
    assert sorted({one.parameters.bilateral[0].theta_alpha for one in starts}) == [1.0, 3.0, 6.0, 12.0]
    assert all(" voxels, " in one.name for one in starts)


def test_no_crf_has_no_postprocessing():
    given = CrfParameters().replace(**{"postprocess.keep_largest": "each", "postprocess.min_component_ml": 2.0})
    assert without_crf(given).postprocess == CrfParameters().postprocess


def test_the_crf_with_the_largest_component_has_rivals_with_it():
    """The CRF is no better than the largest component: they are combined, and so are the other rivals."""
    gains = dict.fromkeys(MEASURED, 0.0) | {TRAINED: 0.02, LARGEST: 0.02, TRAINED_LARGEST: 0.05, SCALING_LARGEST: 0.06}
    read, alone = judge(table_of_gains(gains))
    assert (read.method, read.baseline, alone.method) == (TRAINED_LARGEST, LARGEST, TRAINED)
    assert read.sentence.startswith("The trained CRF with the largest component ")
    assert read.outcome == Outcome.NOT_BETTER_THAN_SIMPLE
    others = [(name, True) for name in (SMOOTHING_LARGEST, GUIDED_LARGEST, DICE_LARGEST)]
    assert [(rival.name, rival.is_beaten) for rival in read.rivals] == [(SCALING_LARGEST, False), *others]


@pytest.mark.parametrize(("gain", "is_beaten"), [(0.01, True), (0.09, False)], ids=["weaker than the CRF", "better than the CRF"])
def test_the_postprocessing_of_nnunet_is_a_rival(gain, is_beaten):
    gains = dict.fromkeys(MEASURED, 0.0) | {TRAINED: 0.05, NNUNET: gain}
    read, alone = judge(table_of_gains(gains))
    assert read == alone
    assert [(rival.name, rival.is_beaten) for rival in read.rivals][-1] == (NNUNET, is_beaten)
    assert read.outcome == (Outcome.HELPS if is_beaten else Outcome.NOT_BETTER_THAN_SIMPLE)


def test_the_crf_with_the_largest_component_is_compared_with_nnunet_too():
    """Both postprocessings alone are as good as the CRF; what counts is whether the CRF with one of them is better than both."""
    gains = dict.fromkeys(MEASURED, 0.0) | {TRAINED: 0.02, LARGEST: 0.02, NNUNET: 0.03, TRAINED_LARGEST: 0.06}
    read, _ = judge(table_of_gains(gains))
    assert (read.method, read.outcome) == (TRAINED_LARGEST, Outcome.HELPS)
    assert [rival.name for rival in read.rivals] == [SCALING_LARGEST, SMOOTHING_LARGEST, GUIDED_LARGEST, DICE_LARGEST, NNUNET]


def test_a_given_model_keeps_its_structure_and_is_the_only_start_without_theta():
    given = CrfParameters().replace(bilateral=[{"theta_alpha": 2.0}, {"theta_alpha": 9.0, "weight": 1.0}], **{"spatial.weight": 0.5})
    (only,) = make_starts(given, ("weights",), 4, 2, SPACING)
    assert [kernel.theta_alpha for kernel in only.parameters.bilateral] == [2.0, 9.0]
    several = make_starts(given, LEARNABLE, 4, 2, SPACING)
    assert several[0].name == "given"
    assert {one.parameters.bilateral[1].theta_alpha for one in several} == {9.0}
    assert {one.parameters.spatial.weight for one in several} == {0.5}


def test_starts_are_chosen_on_the_cases_of_the_fold_alone(useful):
    starts = [start(4.0), start(8.0), start(40.0)]
    with Workers(2) as workers:
        rows = screen(material(useful), starts, [0, 1, 2], workers, lambda table: None)
        told = []
        assert screen(material(useful), starts, [0, 1, 2], workers, told.append, [row[:2] for row in rows]) == rows
    assert told == [rows], "those that were tried before are not tried again"
    table = np.array(rows)
    assert table.shape == (3, 3)
    table[2] = [0.0, 0.0, 9.0]
    assert [one.name for one in choose_starts(starts, table, [0, 1, 2], (0, 1), 2)] != ["theta_alpha 40"]
    assert choose_starts(starts, table, [0, 1, 2], (2,), 1)[0].name == "theta_alpha 40"


def test_no_crf_leaves_the_labels_as_they_are(useful):
    shared = material(useful)
    model = Model(without_crf(start(4.0).parameters), (), SIZES)
    for crop in useful[:2]:
        np.testing.assert_array_equal(model.score(crop, shared.loss, 1).confusion, network_score(crop, shared.loss).confusion)


def test_vector_scaling_finds_a_bias_that_was_put_in():
    cases = crops(3, "right")
    for crop in cases:
        crop.logits[2] -= 8.0
    with Workers(2) as workers:
        scaling = fit_vector_scaling(material(cases), Split((0, 1, 2), (0, 1, 2), ()), workers)
    # Most of it within 60 steps of a falling rate that starts at 0.1.
    assert scaling.bias[2] - np.mean([scaling.bias[label] for label in (0, 1, 3)]) > 1.0
    assert sum(scaling.bias) == pytest.approx(0.0, abs=1e-5)


def test_smoothing_is_chosen_where_it_helps():
    rough, right = crops(2), crops(2, "right")
    sigmas = (0.0, 2.0, 4.0)
    with Workers(2) as workers:
        assert choose_best(smoothing_scores(rough, REGIONS, sigmas, workers), sigmas, [0]) == 2.0
        assert choose_best(smoothing_scores(right, REGIONS, sigmas, workers), sigmas, [0, 1]) == 0.0
    crop = rough[0]
    assert smoothed(crop.logits, 0.0, crop.spacing) is crop.logits
    along_x = smoothed(crop.logits.astype(np.float32), 1.0, (1e9, 1e9, 1e-12))
    assert np.ptp(along_x, axis=3).max() < 0.1 * np.ptp(crop.logits), "far wider than the grid"


def test_the_prior_pulls_values_back_to_where_they_began():
    """Its gradient is that of squared logarithms: zero at the start, and along a value's logarithm twice the distance."""
    model = Model(start(8.0).parameters, LEARNABLE, SIZES)
    origin = model.positions()
    assert all(not gradient.any() for gradient in model.pull(origin))
    (raw,) = model.layer.group("temperature")
    with torch.no_grad():
        raw += 0.3
    names = [name for name, _ in model.learned]
    gradients = dict(zip(names, model.pull(origin), strict=True))
    name = next(name for name, parameter in model.learned if parameter is raw)
    # The small number added before the logarithm takes off a hundredth of it.
    assert float(gradients.pop(name)) == pytest.approx(0.6, rel=0.05)
    assert all(not gradient.any() for gradient in gradients.values())


def test_a_strong_prior_keeps_a_training_where_it_began(useful):
    shared = material(useful)
    moved = []
    for prior in (0.0, 10.0):
        trajectory = Trajectory(start(8.0), LEARNABLE, SIZES, Schedule(6), prior=prior)
        for _ in range(6):
            gradients = trajectory.model.gradient(useful[0], shared.loss, 1).gradients
            trajectory.step(gradients, 0.0)
        before, after = Model(start(8.0).parameters, LEARNABLE, SIZES).positions(), trajectory.model.positions()
        moved.append(sum(float(((now - then) ** 2).sum().detach()) for now, then in zip(after, before, strict=True)))
    assert moved[1] < 0.5 * moved[0]


def test_the_final_score_is_that_of_the_parameters_a_file_holds(useful):
    """Written and read again, they are the same and have the same gain: `infer` reproduces what was measured."""
    result = fit(useful[:3], num_optimizer_steps=4)
    assert not result.is_network
    read = CrfParameters.from_toml(result.parameters.to_toml())
    assert rounded(read) == read == result.parameters
    assert mean_gain(read, useful[:3]) == pytest.approx(result.score - result.network_score, abs=1e-12)


def test_the_volume_term_is_learned_where_asked() -> None:
    """From the start's weight; the network's own labels have no such term."""
    begin = start(4.0)
    begin = Start(begin.name, begin.parameters.replace(**{"volume.weight": 0.5}))
    with Workers(2) as workers:
        split = split_training(range(3), seed=1)
        fit = Fit(material(crops(3), ("volume",)), split, [begin], workers, Schedule(1, rungs=()))
        assert 0.0 < abs(fit.run(SILENT).parameters.volume.weight - 0.5) < 0.2
    assert without_crf(begin.parameters).volume.weight == 0.0
