"""Which starts are trained, and when the training of one ends."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from training_helpers import Shares, crops, material, start

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import screening
from crfrefine.train.crops import Crop
from crfrefine.train.fit import Trajectory
from crfrefine.train.material import Sample
from crfrefine.train.options import LEARNABLE
from crfrefine.train.progress import Progress
from crfrefine.train.starts import make_starts
from crfrefine.train.workers import Workers

EVERY = 8
SECONDS = 20  # after which a barrier gives up: everything here takes milliseconds


def is_over(scores, num_steps=40):
    """Whether a training with these Dice ends, of at most so many steps, evaluated every eight."""
    trajectory = Trajectory(start(4.0), material(crops(1)), num_optimizer_steps=num_steps)
    for number, score in enumerate(scores, start=1):
        trajectory.optimizer_step = EVERY * number
        trajectory.history.append({"iteration": trajectory.optimizer_step})
        trajectory.scored(score, loss=1.0 - score)
    return trajectory.is_over()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], False),
        ([0.80, 0.81], False),
        ([0.80, 0.8004], True),  # Nothing moves.
        ([0.79, 0.8002, 0.8004], True),
        ([0.8002, 0.8008], False),
        ([0.81, 0.80], False),  # It may recover with shorter steps.
        ([0.81, 0.80, 0.79], True),
        ([0.70, 0.71, 0.72, 0.73], False),
    ],
)
def test_a_training_ends_when_nothing_moves_or_nothing_improves(scores, expected):
    assert is_over(scores) is expected


def test_a_training_ends_with_its_last_step():
    assert not is_over([0.70, 0.75, 0.80], num_steps=25)
    assert is_over([0.70, 0.75, 0.80], num_steps=24)


def test_of_equal_scores_the_lower_loss_is_kept():
    """Dice within 0.05 points of the best one are equal; a missing Dice or loss is never better."""
    trajectory = Trajectory(start(4.0), material(crops(2)), num_optimizer_steps=40)
    evaluations = [
        (0.8, 0.5, 1),
        (0.8004, 0.6, 1),
        (0.8001, 0.4, 3),
        (0.7998, 0.3, 3),  # It is not within 0.05 points of the second one.
        (0.8003, float("nan"), 3),
        (0.81, float("nan"), 6),
        (0.8102, float("nan"), 7),
        (0.8101, 0.9, 8),
        (0.805, 0.1, 8),
        (float("nan"), 0.0, 8),
    ]
    for number, (score, loss, expected) in enumerate(evaluations, start=1):
        trajectory.optimizer_step = number
        trajectory.history.append({"iteration": number})
        trajectory.scored(score, loss)
        assert trajectory.best.optimizer_step == expected
    assert trajectory.best_score == 0.8102


def screen(monkeypatch, dice_of_tiles, dice_of_crops, *, is_whole, folds=(0, 1), num_finalists=4):
    """Choose among four starts for folds, with such Dice of three cases.

    Returns the starts, those chosen for each fold, and the shares of progress. All starts of a
    round must be tried side by side.
    """
    starts = [start(4.0), start(6.0), start(8.0), start(8.0, weight=2.0)]
    barriers = {Sample: threading.Barrier(4), Crop: threading.Barrier(num_finalists)}

    def values_of(parameters):
        (kernel,) = parameters.bilateral
        return np.array([kernel.theta_alpha, np.mean(kernel.weight)])

    def score_cases(refine, sources, *_):
        assert len(sources) == 3
        (kind,) = {type(source) for source in sources}
        barriers[kind].wait(SECONDS)
        values = values_of(refine.__self__.to_parameters())
        distances = [np.abs(values - values_of(start.parameters)).sum() for start in starts]
        dice = dice_of_tiles if kind is Sample else dice_of_crops
        return np.array(dice[int(np.argmin(distances))])[:, None], []

    monkeypatch.setattr(screening, "score_cases", score_cases)
    monkeypatch.setattr(screening, "NUM_FINALISTS", 3)
    observer = Shares()
    cases = crops(3)
    if not is_whole:
        cases = [replace(crop, tiles=9 * crop.tiles, tile_weights=(1 / 9,) * 9) for crop in cases]
    with Workers(4) as workers:
        shared = replace(
            material(cases, workers=workers),
            progress=Progress(observer, num_folds=2, num_steps=4),
            starts=starts,
        )
        shared.plan.folds = [SimpleNamespace(seen=(0, 1)), SimpleNamespace(seen=(0, 2))]
        chosen = screening.choose_starts(shared, folds)
    return starts, chosen, observer.shares


@pytest.mark.parametrize(
    ("num_steps", "lengths", "num_starts"),
    [
        (100, (1, 3, 6, 12), 16),
        (40, (1, 3, 6, 12), 16),
        (20, (1, 3, 6, 12), 8),
        (10, (1, 3, 6, 12), 4),
        (3, (1, 6), 2),
        (1, (1, 6), 2),
    ],
)
def test_a_short_training_does_not_begin_with_a_long_search(num_steps, lengths, num_starts):
    """It tries fewer starts: first the same bandwidths with fewer weights, then fewer of these."""
    spacing = (1.0, 2.0, 4.0)  # A cube as large as a voxel has sides of 2 mm.
    starts = make_starts(None, LEARNABLE, 3, 1, spacing, num_steps)
    assert len(starts) == num_starts
    alphas = {start.parameters.bilateral[0].theta_alpha for start in starts}
    assert sorted(alphas) == [2.0 * length for length in lengths]
    given = make_starts(CrfParameters(), LEARNABLE, 3, 1, spacing, num_steps)
    assert given[0].name == "given"


DICE = [[0.7, 0.7, 0.3], [0.8, 0.8, 0.1], [0.6, 0.9, 0.9], [0.5, 0.95, 0.8]]


def test_starts_are_tried_side_by_side_and_the_best_are_trained(monkeypatch):
    """Each fold ranks them by the cases that it has seen; of equal bandwidths the better one."""
    starts, chosen, shares = screen(monkeypatch, DICE, None, is_whole=True)
    assert chosen == {0: [starts[1], starts[2]], 1: [starts[2], starts[0]]}
    assert len(shares) == len(starts)


def test_whole_crops_decide_among_the_best_on_tiles(monkeypatch):
    """The best of the folds are starts 1, 2, 3 and 2, 3, 0: the first fold has no start 0."""
    of_crops = [[1.0, 1.0, 1.0], [0.5, 0.5, 0.9], [0.6, 0.6, 0.6], [0.7, 0.7, 0.5]]
    starts, chosen, shares = screen(monkeypatch, DICE, of_crops, is_whole=False)
    assert chosen == {0: [starts[3], starts[1]], 1: [starts[0], starts[2]]}
    assert len(shares) == 2 * len(starts)

    for fold in (0, 1):  # as in a run that is resumed, where the other one is finished
        starts, alone, _ = screen(
            monkeypatch, DICE, of_crops, is_whole=False, folds=[fold], num_finalists=3
        )
        assert alone == {fold: chosen[fold]}


def test_whole_crops_decide_which_start_was_trained_best(monkeypatch):
    """Samples of large crops cut off what is around them; of small ones they are all there is."""
    trajectories = []
    for theta_alpha, of_samples in ((4.0, 0.7), (6.0, 0.6), (8.0, 0.5)):
        trajectory = Trajectory(start(theta_alpha), material(crops(1)), num_optimizer_steps=40)
        trajectory.scored(of_samples, 0.5)
        trajectories.append(trajectory)
    trajectories.append(Trajectory(start(5.0), material(crops(1)), num_optimizer_steps=40))

    def score_cases(refine, sources, *_):
        assert [len(source.tiles) for source in sources] == [9, 9]
        (kernel,) = refine.__self__.to_parameters().bilateral
        return np.array([[kernel.theta_alpha == 6.0], [np.nan]]), []

    monkeypatch.setattr(screening, "score_cases", score_cases)
    small = crops(3)
    large = [replace(crop, tiles=9 * crop.tiles, tile_weights=(1 / 9,) * 9) for crop in small]
    chosen = []
    for cases in (small, large):
        chosen.append(screening.best_on_crops(trajectories, (0, 2), material(cases)))
    assert chosen == trajectories[:2]
