"""A training, which learns only where the image helps; the methods that the CRF must beat, the
choice, the verdict.
"""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import training_helpers
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import expit, log_softmax
from training_helpers import (
    LARGER,
    REGIONS,
    SIZES,
    SPACING,
    as_case,
    crops,
    fit,
    material,
    phantom,
    start,
    write_cases,
)

import crfrefine
from crfrefine.arrays.region_scheme import probabilities_of
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.cases.finding import locate_folders
from crfrefine.demo.phantom import write_phantom
from crfrefine.metrics.overlap import mean_dice, measure_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters, VolumeParameters
from crfrefine.refinement.case import refine
from crfrefine.statistics.comparison import ResultTable
from crfrefine.statistics.verdict import Outcome
from crfrefine.train import baselines, guided, measuring
from crfrefine.train import comparison as methods
from crfrefine.train import folds as cross_validation
from crfrefine.train.choice import CALIBRATION as CALIBRATED
from crfrefine.train.choice import (
    CRF,
    NO_CRF,
    ONE_WEIGHT,
    UNTRAINED,
    WITH_BIASES,
    Candidate,
    choose_candidate,
    choose_kind,
    no_crf,
    pooled,
    ranked,
    rounded,
)
from crfrefine.train.comparison import Training
from crfrefine.train.final import mean_parameters
from crfrefine.train.fit import Trajectory, fit_starts
from crfrefine.train.model import Model, network_refiner, score
from crfrefine.train.options import LEARNABLE, TrainingOptions
from crfrefine.train.plan import Split, split_training
from crfrefine.train.run import run_training
from crfrefine.train.workers import Workers

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def useful():
    return crops(5)


@pytest.fixture(scope="module")
def whole(useful):
    return fit(useful[:3])


def mean_gain(parameters, cases):
    """Dice above the network's, on cases."""
    model = Model(parameters, (), SIZES)
    return mean_dice_of(model.refine, cases) - mean_dice_of(network_refiner(), cases)


def mean_dice_of(refine, cases):
    loss = material(cases).loss
    counts = [score(refine, crop, loss, 1)[1] for crop in cases]
    return np.mean([mean_dice(count, REGIONS) for count in counts])


def test_training_improves_cases_that_it_has_not_seen(useful, whole):
    """What decides is the gain of the parameters as a file holds them: `infer` reproduces what was
    measured.
    """
    result = whole[0].best
    # The phantom's labels differ in intensity, so that a CRF gains many points; a tenth of that
    # would be a doubtful success.
    assert mean_gain(result.parameters, useful[3:]) > max(
        0.05, mean_gain(start(8.0).parameters, useful[3:])
    )
    read = CrfParameters.from_toml(result.parameters.to_toml())
    assert rounded(read) == read == result.parameters
    deciding = [useful[case] for case in split_training(range(3), seed=1).deciding]
    (found,) = (
        record["score"]
        for record in whole[0].history
        if record["iteration"] == result.optimizer_step
    )
    assert mean_dice_of(Model(read, (), SIZES).refine, deciding) == pytest.approx(found, abs=1e-12)


def test_no_crf_is_the_outcome_where_logits_are_right(tmp_path, monkeypatch):
    training_helpers.shorten(monkeypatch)
    data = locate_folders(write_cases(tmp_path / "data", 4, "right"))
    few = {"num_folds": 2, "num_optimizer_steps": 2, "threads": 2}
    result = run_training(TrainingOptions(**data, output=tmp_path / "p.toml", **few))
    assert {fold.chosen.kind for fold in result.folds} == {NO_CRF}
    final = result.final.chosen
    assert final.is_network
    assert (final.parameters.bilateral[0].weight, final.parameters.mean_field.temperature) == (
        0.0,
        1.0,
    )
    assert result.verdict.sentence.endswith(
        " The folds and the file have the same kind of model: no CRF."
    )


def test_without_foreground_nothing_is_best_and_there_is_no_warning():
    cases = crops(3, "right")
    for crop in cases:
        crop.labels[:] = 0
        crop.outside[:] = 0
        crop.logits[0] += 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectories = fit(cases, num_optimizer_steps=2)
    assert all(trajectory.best is None for trajectory in trajectories)
    undefined = dict.fromkeys((0.0, 1.0, 2.0), np.full(2, np.nan))
    assert ranked(undefined, [0, 1])[0] == 0.0


def test_a_training_has_the_same_bits_on_another_number_of_threads(useful, whole):
    alone = fit(useful[:3], threads=1)
    for trajectory, expected in zip(alone, whole, strict=True):
        assert trajectory.start == expected.start
        assert trajectory.best == expected.best
        assert trajectory.history == expected.history


def test_the_prior_pulls_values_back_to_where_they_began(useful):
    """Its gradient is that of squared logarithms: zero at the start, and along a value's logarithm
    twice the distance.
    """
    model = Model(start(8.0).parameters, LEARNABLE, SIZES)
    origin = model.positions()
    assert all(not gradient.any() for gradient in model.pull(origin))
    (raw,) = model.layer.group("temperature")
    with torch.no_grad():
        raw += 0.3
    gradients = {}
    for parameter, gradient in zip(model.moving, model.pull(origin), strict=True):
        gradients[id(parameter)] = gradient
    # The small number added before the logarithm takes off a hundredth of it.
    assert float(gradients.pop(id(raw))) == pytest.approx(0.6, rel=0.05)
    assert all(not gradient.any() for gradient in gradients.values())
    shared = material(useful)
    moved = []
    for prior in (0.0, 10.0):
        trajectory = Trajectory(start(8.0), shared, 4, prior=prior)
        for _ in range(4):
            _, gradients = trajectory.model.gradient(useful[:1], shared.loss, Workers(1))
            trajectory.step(gradients, 0.0)
        distance = 0.0
        for now, then in zip(trajectory.model.positions(), origin, strict=True):
            distance += float(((now - then) ** 2).sum().detach())
        moved.append(distance)
    assert moved[1] < 0.5 * moved[0]


SHAPE = (11, 6, 9)
WINDOW = (2, 1, 1)  # voxels of 1.0, 2.1 and 1.4 mm in a radius of 2 mm
INSIDE = tuple(slice(2 * width, -2 * width) for width in WINDOW)


def by_definition(channel, image, epsilon):
    """Equations 14 to 16 of He, Sun & Tang, where windows of windows lie in the grid: averages of a
    linear function per window.
    """
    sizes = tuple(2 * width + 1 for width in WINDOW)
    windows = sliding_window_view(np.concatenate([image, channel[None]]), sizes, axis=(1, 2, 3))
    windows = windows.reshape(*windows.shape[:4], -1).astype(float)
    means = windows.mean(axis=-1)
    products = np.einsum("i...n,j...n->...ij", windows, windows) / windows.shape[-1] - np.einsum(
        "i...,j...->...ij", means, means
    )
    slopes = np.linalg.solve(products[..., :3, :3] + epsilon * np.eye(3), products[..., :3, 3:])[
        ..., 0
    ]
    offsets = means[3] - np.einsum("...i,i...->...", slopes, means[:3])
    averaged = sliding_window_view(
        np.stack([*np.moveaxis(slopes, -1, 0), offsets]), sizes, axis=(1, 2, 3)
    ).mean(axis=(-3, -2, -1))
    return (averaged[:3] * image[:, *INSIDE]).sum(axis=0) + averaged[3]


def test_windows_are_those_of_the_definition():
    """Inside, where windows of windows lie in the grid: at its border each filter repeats the
    outermost values by itself.
    """
    random = np.random.default_rng(0)
    image = random.random((3, *SHAPE)).astype(np.float32)
    channel = random.random(SHAPE).astype(np.float32)
    epsilons = guided.EPSILONS[:: len(guided.EPSILONS) - 1]
    filtered = guided.Guide(image, 2.0, (1.0, 2.1, 1.4)).filter(channel, epsilons)
    for epsilon, own in zip(epsilons, filtered, strict=True):
        # Covariances in float32 are differences of numbers near 0.3, so that they are known to
        # 1e-7; divided by epsilon that is 1e-4.
        np.testing.assert_allclose(own[INSIDE], by_definition(channel, image, epsilon), atol=1e-3)


def test_it_is_chosen_where_the_image_helps_and_not_where_logits_are_right():
    """The scores are of the labels that are measured."""
    cases = crops(2, **LARGER)
    right = crops(2, "right", **LARGER)
    useful = baselines.score_guided(material(cases), LARGER["spacing"])
    unguided = baselines.score_guided(material(right), LARGER["spacing"])
    assert len(useful) == 1 + len(guided.RADII_VOXELS) * len(guided.EPSILONS)
    chosen = ranked(useful, [0, 1])[0]
    assert chosen.radius_mm > 0
    gain = useful[chosen] - useful[guided.UNGUIDED]
    # The phantom's labels differ in intensity: a filter that sees the image gains points.
    assert gain.min() > 0.02
    assert ranked(unguided, [0, 1])[0] == guided.UNGUIDED
    case = cases[0]
    setting = list(useful)[5]
    probabilities = probabilities_of(case.logits.astype(np.float32), None)
    (labels,) = guided.Guide(case.image, setting.radius_mm, case.spacing).labels(
        probabilities, [setting.epsilon], None
    )
    assert useful[setting][0] == mean_dice(case.confusion(labels), REGIONS)


SHIFT = 8.0
CALIBRATION = ("temperature", "bias")


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
    scaling = baselines.fit_scaling(shared, split.seen)
    found = baselines.calibrate(shared, split.training, start(4.0).parameters)
    assert scaling.bias[2] - np.mean([scaling.bias[label] for label in (0, 1, 3)]) > 1.0
    assert sum(scaling.bias) == pytest.approx(0.0, abs=1e-5)
    assert found.bilateral[0].weight == 0.0
    assert found.mean_field.temperature == pytest.approx(scaling.temperature, rel=1e-5)
    np.testing.assert_allclose(
        found.mean_field.bias, np.array(scaling.bias) * scaling.temperature, rtol=1e-4, atol=1e-5
    )
    assert found == CrfParameters.from_toml(found.to_toml())
    as_network = score(network_refiner(calibrated=found), shifted[0], shared.loss, 1)
    as_crf = score(Model(found, (), SIZES).refine, shifted[0], shared.loss, 1)
    np.testing.assert_array_equal(as_network[1], as_crf[1])
    assert as_network[0] == pytest.approx(as_crf[0], rel=1e-5)


def test_a_step_of_vector_scaling_takes_a_share_of_the_voxels_and_all_steps_take_all(
    shifted, monkeypatch
):
    """Each step takes about SCALING_VOXELS of a case, and three in a row take each voxel once."""
    shared = material(shifted[:1])
    num_voxels = shared.voxels[0][1].numel()
    # A share that leaves a remainder, so that the steps differ in size.
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_VOXELS", num_voxels // 3 + 1)
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 3)
    taken = []

    def loss(logits, labels):
        taken.append(logits.detach().clone())
        return shared.loss(logits, labels)

    baselines.fit_scaling(replace(shared, loss=loss), [0], learned=("bias",))
    # The temperature is fixed to 1, and the biases are of no interest: differences of two labels
    # in the first step are those of the network.
    assert [len(part[0]) for part in taken] == [
        len(range(step, num_voxels, 3)) for step in range(3)
    ]
    first = taken[0][1] - taken[0][0]
    network = shared.voxels[0][0]
    torch.testing.assert_close(first, (network[1] - network[0])[::3])


def test_the_recalibrated_network_reuses_vector_scaling_where_both_groups_are_learned(shifted):
    shared = material(shifted)
    known = baselines.VectorScaling(2.0, (0.25, -0.5, 0.5, -0.25))
    base = start(4.0).parameters
    reused = baselines.calibrate(shared, [0, 1], base, known)
    assert reused.mean_field.temperature == 2.0
    assert reused.mean_field.bias == (0.5, -1.0, 1.0, -0.5)
    only_bias = material(shifted, learn=("bias",))
    fitted = baselines.calibrate(only_bias, [0, 1], base, known)
    assert fitted.mean_field.temperature == pytest.approx(base.mean_field.temperature)


def test_a_run_does_not_lose_to_vector_scaling(tmp_path, monkeypatch):
    """With weights that do harm and stay as they are, each case held out has the values of vector
    scaling, and the file says what it is.
    """
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 20)
    for seed in range(4):
        case = phantom(seed, "right")
        case.logits[2] -= SHIFT
        write_phantom(case, tmp_path / "data", f"case{seed}")
    steps = {"learn": CALIBRATION, "num_folds": 2, "num_optimizer_steps": 2, "threads": 2}
    parameters = CrfParameters().replace(**{"bilateral.weight": 200.0})
    result = run_training(
        TrainingOptions(
            **locate_folders(tmp_path / "data"),
            parameters=parameters,
            output=tmp_path / "params.toml",
            **steps,
        )
    )
    measured = []
    kinds = set()
    for fold in result.folds:
        measured += fold.measured.values()
        kinds.update(one.kind for one in fold.candidates)
    assert len(measured) == 4
    for values in measured:
        assert values["trained CRF"] == values["vector scaling"]
        trained = np.mean([row["dice"] for row in values["trained CRF"].values()])
        network = np.mean([row["dice"] for row in values["network"].values()])
        assert trained > network
    assert kinds == {CALIBRATED, CRF}
    final = result.final
    assert final.describe().startswith("recalibration alone: Dice 0.")
    assert from_plain(Training, json.loads(json.dumps(to_plain(final)))) == final
    assert json.loads((tmp_path / "params.report.json").read_text())["final"]["is_calibration"]
    written = CrfParameters.load(tmp_path / "params.toml")
    assert (written.bilateral[0].weight, written.mean_field.bias[2] > 0.5) == (0.0, True)


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
        assert baselines.fit_output_temperature(cases) == pytest.approx(temperature, rel=0.04)
    logits, labels = drawn(0, 1.0, count=300)
    for said, expected in (
        (logits.argmax(axis=0), baselines.RANGE[0]),
        ((labels + 1) % 3, baselines.RANGE[1]),
    ):
        assert baselines.fit_output_temperature([(logits, said)]) == pytest.approx(
            expected, rel=1e-3
        )
    assert baselines.fit_output_temperature([]) == 1.0


def test_log_odds_of_regions_share_one():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 20_000)
    signs = np.where([labels > 0, labels == 2], np.float32(1.0), np.float32(-1.0))
    # The log-odds of a noisy sign, twice as large as they should be.
    logits = (
        2.0 * (2.0 * (signs + random.normal(0, 1, signs.shape)) + np.log([[2.0], [0.5]]))
    ).astype(np.float32)
    assert baselines.negative_log_likelihood(logits, signs, 3.0) == pytest.approx(
        -np.log(expit(signs * logits / 3.0)).mean(), rel=1e-5
    )
    assert baselines.fit_output_temperature([(logits, signs)]) == pytest.approx(2.0, rel=0.05)


def test_a_fit_gets_one_and_labels_stay(monkeypatch):
    """The likeliest one of its own marginals; few voxels of many are enough."""
    cases = crops(3)
    parameters = fit(cases, num_optimizer_steps=2)[0].best.parameters
    trained = Candidate(CRF, "start", parameters, 2, (0.1,))
    shared = material(cases)
    found = baselines.calibrate_output(trained, range(3), shared)
    monkeypatch.setattr("crfrefine.train.baselines.MAX_VALUES", 4 * 900)
    few = baselines.calibrate_output(
        trained, range(3), shared
    ).parameters.mean_field.output_temperature
    temperature = found.parameters.mean_field.output_temperature
    assert len({few, temperature, 1.0}) == 3
    assert few == pytest.approx(temperature, rel=0.25)
    assert replace(found, parameters=trained.parameters) == trained
    assert found.parameters.replace(**{"mean_field.output_temperature": 1.0}) == trained.parameters
    model = Model(trained.parameters, (), SIZES)

    def loss(scale):
        def own(logits, labels):
            return torch.nn.functional.cross_entropy((logits / scale).t(), labels)

        return np.mean([score(model.refine, crop, own, 1)[0] for crop in cases])

    assert loss(temperature) < min(loss(1.1 * temperature), loss(temperature / 1.1))


def test_a_run_measures_probabilities_and_says_what_became_of_them(tmp_path):
    data = locate_folders(write_cases(tmp_path / "data", 4))
    steps = {"num_folds": 2, "num_optimizer_steps": 1, "threads": 2}
    result = run_training(
        TrainingOptions(
            **data,
            parameters=start(8.0).parameters,
            output=tmp_path / "params.toml",
            learn=("weights",),
            **steps,
        )
    )
    assert not result.final.chosen.is_network
    written = CrfParameters.load(tmp_path / "params.toml")
    assert written == result.parameters
    assert written.mean_field.output_temperature != 1.0
    report = json.loads((tmp_path / "params.report.json").read_text())
    rows = {}
    for row in report["comparison_of_probabilities"]:
        rows[row["method"], row["metric"]] = row["mean"]
    assert {metric for _, metric in rows} == {"ece", "brier", "nll"}
    assert report["verdict"]["probabilities"]["change"] == "too few cases"
    losses = []
    for fold in result.folds:
        for name in fold.measured:
            case = as_case(phantom(int(name.removeprefix("case"))))
            refined = crfrefine.refine(
                case.logits, case.image, spacing=SPACING, parameters=fold.chosen.parameters
            )
            losses.append(measuring.measure_probabilities(case, refined.marginals)["all"]["nll"])
    assert rows["trained CRF", "nll"] == pytest.approx(np.mean(losses), rel=1e-3)


def candidate(kind, *gains):
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found):
    return getattr(choose_candidate(found, len(found[0].gains)), "kind", None)


GAINS = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
# better on average, not beyond chance
ROUGH = GAINS + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])
EVEN = GAINS[:5]
MANY = np.tile(GAINS, 2)  # of so many cases that biases are tried
UNEVEN = 0.001 + 0.003 * np.tile([1, -1], 8)  # 1.3 standard errors above 0
ONE = f"{ONE_WEIGHT}, volume 0.5"
BIASED = f"{WITH_BIASES}, volume 0.5"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # A gain that chance explains is not taken; losses count more than gains.
        ([(CRF, [0.03, -0.02, 0.01])], None),
        ([(CRF, [0.03, 0.02, 0.01])], CRF),
        ([(CRF, [])], None),
        ([("rough", [0.020] * 9 + [-0.05]), (CRF, [0.010] * 10)], CRF),
        # A gentler model, which comes first, is taken where it keeps 95 % of the gain, however even
        # the rest is over the cases.
        (
            [(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.004, -0.003, 0.002, -0.001, 0.0]))],
            UNTRAINED,
        ),
        (
            [(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.001, 0.001, 0.002, 0.001, 0.001]))],
            CRF,
        ),
        ([(UNTRAINED, GAINS), (CRF, GAINS + 0.0005)], UNTRAINED),
        (
            [(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.030, -0.010, 0.008, 0.002, -0.009]))],
            CRF,
        ),  # too much to give up
        ([(CRF, EVEN), (UNTRAINED, EVEN)], CRF),  # of equal ones the first
        # Many weights must be better than one by more than chance, on eight cases or more: three
        # tumors say nothing of a hippocampus.
        ([(ONE, GAINS), (CRF, ROUGH)], ONE),
        ([("another", GAINS), (CRF, ROUGH)], CRF),
        # Two cases tell a recalibration and a CRF apart, no more.
        ([(ONE, GAINS[:2]), (CALIBRATED, GAINS[:2] / 2), (CRF, GAINS[:2] / 3)], CALIBRATED),
        ([(ONE, GAINS), (CRF, GAINS + 0.001)], CRF),
        ([(ONE, -GAINS), (CRF, GAINS)], CRF),
        ([(ONE, GAINS), (CRF, -GAINS)], ONE),
        ([(ONE, GAINS[:7]), (CRF, GAINS[:7] + 0.04)], ONE),
        ([(ONE, -GAINS[:7]), (CRF, GAINS[:7])], CRF),
        # With many cases, one weight has biases, and many weights must be clearly better.
        ([(ONE, MANY), (BIASED, MANY), (CRF, MANY)], BIASED),
        ([(ONE, MANY[1:]), (BIASED, MANY[1:] + 0.01), (CRF, MANY[1:])], ONE),
        ([(ONE, MANY + 0.01), (BIASED, -MANY)], None),
        ([(BIASED, MANY), (CRF, MANY + UNEVEN)], BIASED),
        ([(BIASED, MANY), (CRF, MANY + UNEVEN + 0.001)], CRF),
    ],
)
def test_the_choice_among_gains(found, expected):
    assert chosen_kind(*(candidate(kind, *gains) for kind, gains in found)) == expected


def test_trainings_on_other_cases_add_their_cases():
    """Alone, each would take something else.

    What only one of them tried is no candidate of both.
    """
    first = [
        candidate(CALIBRATED, 0.010, 0.011, 0.012),
        candidate(CRF, 0.004, 0.005, 0.006),
        candidate("only here", 0.5, 0.5, 0.5),
    ]
    second = [
        candidate(CALIBRATED, -0.010, 0.002),
        replace(candidate(CRF, 0.024, 0.025), name="theta_alpha 8"),
    ]
    both = pooled([first, second])
    assert [each.kind for each in both] == [CALIBRATED, CRF]
    assert (both[1].gains, both[1].name) == ((0.004, 0.005, 0.006, 0.024, 0.025), "theta_alpha 8")
    assert (chosen_kind(*first), chosen_kind(*both)) == ("only here", CRF)


def test_the_kind_that_is_chosen_is_written(tmp_path, monkeypatch):
    """A volume term that is chosen is in the folds' parameters, in the file, and in the labels that
    were measured. In folds of three and four cases, each case counts once for the final Dice, too.
    """
    training_helpers.shorten(monkeypatch)
    data = locate_folders(write_cases(tmp_path / "data", 7))
    kind = f"{ONE_WEIGHT}, volume 0.75"
    monkeypatch.setattr(
        "crfrefine.train.choice.choose_candidate",
        lambda tried, _: next(each for each in tried if each.kind == kind),
    )
    result = run_training(
        TrainingOptions(
            **data, output=tmp_path / "params.toml", num_folds=2, num_optimizer_steps=2, threads=2
        )
    )
    for fold in result.folds:
        assert not set(fold.split.training) & set(fold.split.deciding)
        assert (fold.chosen.kind, fold.chosen.parameters.volume) == (
            kind,
            VolumeParameters(0.75),
        )
    dice = []
    for fold in result.folds:
        for values in fold.measured.values():
            dice.append(np.mean([row["dice"] for row in values["network"].values()]))
    assert result.final.network_score == pytest.approx(np.mean(dice))
    assert CrfParameters.load(tmp_path / "params.toml").volume == VolumeParameters(0.75)
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert kind in [each["kind"] for each in report["final"]["candidates"]]
    assert report["verdict"]["sentence"].endswith(
        f" The folds and the file have the same kind of model: {kind}."
    )


def test_the_mean_of_models_is_that_of_their_values_as_gradients_move_them():
    """Lengths are averaged as logarithms, biases as they are."""
    models = []
    for theta_alpha, bias in ((2.0, 0.5), (8.0, -0.1)):
        parameters = start(theta_alpha).parameters.replace(**{"mean_field.bias": (0, 0, 0, bias)})
        models.append(replace(start(theta_alpha), parameters=parameters))
    mean = mean_parameters(models, material(crops(1)))
    assert mean.bilateral[0].theta_alpha == pytest.approx(4.0, rel=1e-5)
    assert mean.mean_field.bias == pytest.approx((0, 0, 0, 0.2), abs=1e-6)
    weight = models[0].parameters.bilateral[0].weight
    assert mean.bilateral[0].weight == pytest.approx(weight, rel=1e-5)


def test_of_starts_about_as_good_as_the_best_the_first_one_is_trained():
    shared = material(crops(4))
    split = Split((0, 1), (2, 3), ())
    best, other = start(4.0), replace(start(4.0), name="other")
    bad = replace(best, parameters=no_crf(best.parameters).parameters)
    for starts in ([other, best], [best, other], [bad, best, other]):
        trained, *rest = fit_starts(shared, split, starts, 1, lambda *_: None, tolerance=5e-4)
        assert trained.start is next(each for each in starts if each is not bad)
        assert [each.optimizer_step for each in (trained, *rest)] == [1, *[0] * len(rest)]


@pytest.mark.parametrize("num_folds", [2, 5, 6])
def test_folds_and_file_choose_by_the_same_rule_and_each_case_counts_once(num_folds):
    """In every fold and at the end, six cases are too few for a weight and a bias per label."""
    random = np.random.default_rng(num_folds)
    folds = np.array_split(random.permutation(6), num_folds)
    kinds = {ONE: GAINS[:6], CRF: GAINS[:6] + 0.04}
    trainings = []
    for held_out in folds:
        trainings.append([candidate(kind, *gains[held_out]) for kind, gains in kinds.items()])
    at_the_end = choose_kind(trainings)
    assert sorted(at_the_end.gains) == sorted(GAINS[:6])
    assert at_the_end.kind == ONE
    for number, held_out in enumerate(folds):
        others = choose_kind(trainings, without=number)
        assert others.kind == ONE
        assert sorted(others.gains) == sorted(np.delete(GAINS[:6], held_out))


def test_what_a_fold_holds_out_does_not_choose_its_kind():
    """The two cases of the last fold alone speak for recalibration, by far."""
    trainings = [[candidate(CALIBRATED, -0.01), candidate(CRF, gain)] for gain in GAINS]
    trainings.append([candidate(CALIBRATED, 0.9, 0.8), candidate(CRF, -0.02, -0.01)])
    assert choose_kind(trainings, without=len(GAINS)).kind == CRF
    assert choose_kind(trainings).kind == CALIBRATED
    assert choose_kind([training[:1] for training in trainings], without=len(GAINS)) is None


def test_a_verdict_on_another_kind_than_that_of_the_file_says_so():
    told = methods.describe_kinds([ONE, ONE, UNTRAINED], CRF)
    assert told == (
        "This verdict is not about the file: the folds have CRF with one weight, volume 0.5 "
        "(2 of 3), untrained preset (1 of 3); the file has CRF."
    )
    told = methods.describe_kinds([ONE, CRF, ONE], ONE)
    assert told.startswith("This verdict is only in part about the file: the folds have CRF with ")


def test_folds_that_differ_more_than_their_cases_are_told():
    rough = 0.01 * np.tile([1.0, -1.0], 8)  # 1 point, more than between the folds
    alike = [rough + gain for gain in (0.010, 0.011, 0.012, 0.011, 0.010)]
    assert methods.describe_spread(alike) == ""
    differing = [rough / 10 + gain for gain in (0.002, 0.011, 0.020, 0.011, 0.010)]
    assert methods.describe_spread(differing) == (
        "The folds differ more than their cases do, from +0.20 to +2.00 points: by folds, the 95 % "
        "CI is 0.52 to 1.64."
    )
    assert methods.describe_spread([[0.01], [0.02], [0.5]]) == ""  # each fold is a case
    assert methods.describe_spread(differing[:2]) == ""


def test_candidates_are_compared_over_the_same_regions_and_cases(monkeypatch):
    """One of them leaves a region empty that the reference lacks, so that it counts for none."""
    dice = {
        "network": [[0.6, 0.7, 0.0], [0.0, 0.5, math.nan]],  # regions, cases
        "recalibrated": [[0.7, 0.8, 0.1], [math.nan, 0.6, math.nan]],
        "crf": [[0.8, 0.7, math.nan], [0.0, 0.9, math.nan]],
    }
    values = iter(dice.values())
    monkeypatch.setattr(cross_validation, "score_cases", lambda *_: (np.array(next(values)).T, []))
    parameters = start(4.0).parameters
    models = [Candidate(CALIBRATED, CALIBRATED, parameters), Candidate(CRF, "start", parameters)]
    network_score, candidates = cross_validation._try(models, (0, 1, 2), material(crops(3)))
    recalibrated, trained = candidates
    assert recalibrated.gains == pytest.approx((0.1, 0.1))
    assert trained.gains == pytest.approx((0.2, 0.2))
    assert network_score == pytest.approx(0.6)


TRAINED_LARGEST = methods.with_rule(methods.TRAINED, methods.LARGEST)
WITH_LARGEST = {methods.with_rule(name, methods.LARGEST) for name in methods.RIVALS}


def check(measured, gains, method, baseline, rivals, unbeaten):
    """Judge methods of which some gain something; return the sentence."""
    read, alone = methods.judge(
        training_helpers.table_of_gains(dict.fromkeys(measured, 0.0) | gains)
    )
    assert (read.method, read.baseline, alone.method) == (method, baseline, methods.TRAINED)
    assert read.outcome == (Outcome.NOT_BETTER_THAN_SIMPLE if unbeaten else Outcome.HELPS)
    assert rivals <= {rival.name for rival in read.rivals}
    assert {rival.name for rival in read.rivals if not rival.is_beaten} == unbeaten
    return read.sentence


def test_the_crf_with_the_largest_component_has_rivals_with_it():
    """The CRF is no better than the largest component: they are combined, and so are the other
    rivals, but for nnU-Net's own rules.
    """
    gains = {
        methods.TRAINED: 0.02,
        methods.LARGEST: 0.02,
        TRAINED_LARGEST: 0.05,
        methods.with_rule(methods.SCALING, methods.LARGEST): 0.06,
    }
    told = check(
        methods.MEASURED,
        gains,
        TRAINED_LARGEST,
        methods.LARGEST,
        WITH_LARGEST,
        {methods.with_rule(methods.SCALING, methods.LARGEST)},
    )
    assert ": the trained CRF with the largest component helps. " in told
    gains = {methods.TRAINED: 0.02, methods.LARGEST: 0.02, TRAINED_LARGEST: 0.06}
    check(methods.MEASURED, gains, TRAINED_LARGEST, methods.LARGEST, {*WITH_LARGEST}, set())


def test_the_smallest_volume_is_chosen_by_lesion_f1():
    """Specks of two voxels go, and the lesion of 120 stays: in Dice, the specks hardly count."""
    reference = np.zeros((17, 11, 9), np.uint8)
    reference[3:9, 4:9, 2:6] = 1
    network = reference.copy()
    for place in (1, 12, 15):
        network[place, 1, 7:9] = 1
    spacing = (1.0, 1.2, 2.5)  # A voxel has 3 mm³, so that a speck has 0.006 ml.
    (plain,) = crops(1)
    crop = replace(
        plain,
        logits=np.zeros((4, *reference.shape), np.float16),
        labels=reference,
        mask=np.ones(reference.shape, bool),
        spacing=spacing,
        label_map=network,
    )
    shared = material([crop])
    shared.plan.regions = {"lesion": (1,)}
    shared.plan.options.lesions = "isles"
    scores = baselines.score_rules(shared)
    by_volume = {rule.min_component_ml: float(value) for rule, (value,) in scores.items()}
    assert by_volume[0.0] == pytest.approx(2 / (2 + 3))
    assert by_volume[0.01] == by_volume[0.2] == 1.0
    assert by_volume[0.5] == 0.0
    assert ranked(scores, [0])[0] == PostprocessParameters(min_component_ml=0.01)


def test_the_smallest_volume_is_taken_where_it_adds_to_lesion_f1():
    """Losses count twice, and Dice does not decide."""
    both = methods.with_rule(methods.TRAINED, methods.SMALLEST)
    measured = [name for name in methods.MEASURED if methods.LARGEST not in name]
    lines = list(training_helpers.table_of_gains(dict.fromkeys(measured, 0.0)))
    for gain, method in ((0.1, both), (0.0, methods.TRAINED), (-0.1, methods.TRAINED)):
        f1 = []
        for line in lines:
            added = gain if line.method == both else 0.0
            f1.append(replace(line, metric="lesion_f1", value=0.5 + added))
        table = ResultTable([*lines, *f1])
        main, alone = methods.judge(table, methods.SMALLEST)
        assert (main.method, alone.method) == (method, methods.TRAINED)
        assert methods.SMALLEST in {rival.name for rival in alone.rivals}
        rule = PostprocessParameters(min_component_ml=0.05)
        told = methods.describe_lesions(table, rule, main.method)
        assert told == (
            "Mean lesion F1 is 0.500 for the network, 0.500 with the smallest volume, 0.500 with "
            f"the trained CRF and {0.5 + gain:.3f} with both. The file "
            f"{'has' if gain > 0 else 'does not have'} it; on all cases it is 0.05 ml."
        )


def test_the_untrained_preset_is_a_rival():
    """A training that ends at the preset gains nothing over it; one that is clearly better than all
    rivals names the best of them.
    """
    for gain, unbeaten in ((0.05, {methods.DEFAULT}), (0.09, set())):
        gains = {methods.TRAINED: gain, methods.DEFAULT: 0.05}
        told = check(methods.MEASURED, gains, methods.TRAINED, methods.NETWORK, set(), unbeaten)
    assert "It gains more than every rival, the best of which is default preset: " in told


def test_the_preset_is_measured_as_infer_runs_it():
    """Not with the normalization of the trained model."""
    case = replace(as_case(phantom(3, **training_helpers.FINER)), spacing=(1.1, 1.2, 1.7))
    regions = {str(label): (label,) for label in range(1, len(case.logits))}
    parameters = CrfParameters().replace(
        **{"intensity.normalization": "zscore", "bilateral.theta_beta": 0.5}
    )
    scaling = (1.0, (0.0,) * len(case.logits))
    training = training_helpers.tuned(
        parameters, scaling, PostprocessParameters(keep_largest="each")
    )
    found = measuring.measure_methods(case, regions, training, "cpu", 1)
    options = {"spacing": case.spacing, "input_type": "logits"}
    with_largest = methods.with_rule(methods.DEFAULT, methods.LARGEST)
    for name, keep in ((methods.DEFAULT, "none"), (with_largest, "each")):
        preset = CrfParameters().replace(**{"postprocess.keep_largest": keep})
        labels = refine(
            case.logits, case.image, parameters=preset, allow_vanishing=True, **options
        ).label_map
        how = {"metrics": methods.METRICS, "tolerance_mm": min(case.spacing)}
        assert found[name] == measure_case(labels, case.labels, regions, case.spacing, **how)
        assert found[name] not in (found[methods.NETWORK], found[methods.TRAINED])
