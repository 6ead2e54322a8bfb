"""Which starts are trained, and when the training of one ends."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from training_helpers import crops, material, start

from crfrefine.train import run
from crfrefine.train.fit import CaseScores, Trajectory
from crfrefine.train.observer import Progress, TrainingObserver
from crfrefine.train.workers import Workers

EVERY = 8
SECONDS = 20  # after which a barrier gives up: everything here takes milliseconds


def is_over(scores, num_steps=40):
    """Whether a training with these Dice ends, of at most so many steps, evaluated every eight."""
    history = [{"iteration": step} for step in range(1, EVERY * len(scores) + 1)]
    for number, score in enumerate(scores, start=1):
        history[EVERY * number - 1]["score"] = score
    best = max(range(len(scores)), key=scores.__getitem__, default=-1)
    state = SimpleNamespace(
        optimizer_step=EVERY * len(scores),
        _num_optimizer_steps=num_steps,
        history=history,
        best_optimizer_step=EVERY * (best + 1),
    )
    return Trajectory.is_over(state)


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


def test_starts_are_tried_side_by_side_and_the_best_are_trained(monkeypatch):
    """Each fold ranks them by the cases that it has seen; of equal bandwidths the better one."""
    starts = [start(4.0), start(6.0), start(8.0), start(8.0, weight=2.0)]
    dice = [[0.7, 0.7, 0.3], [0.8, 0.8, 0.1], [0.6, 0.9, 0.9], [0.5, 0.95, 0.8]]
    barrier = threading.Barrier(len(starts))

    def score_cases(refine, samples, *_):
        assert len(samples) == 3
        barrier.wait(SECONDS)
        values = values_of(refine.__self__.to_parameters())
        distances = [np.abs(values - values_of(start.parameters)).sum() for start in starts]
        return CaseScores(np.array(dice[int(np.argmin(distances))]), [])

    def values_of(parameters):
        (kernel,) = parameters.bilateral
        return np.array([kernel.theta_alpha, np.mean(kernel.weight)])

    monkeypatch.setattr(run, "score_cases", score_cases)
    observer = Shares()
    with Workers(4) as workers:
        prepared = SimpleNamespace(
            plan=SimpleNamespace(
                folds=[SimpleNamespace(seen=(0, 1)), SimpleNamespace(seen=(0, 2))]
            ),
            workers=workers,
            progress=Progress(observer, num_parts=3, num_steps=4),
            material=material(crops(3)),
            starts=starts,
        )
        chosen = run.choose_starts(prepared, [0, 1])
    assert chosen == {0: [starts[1], starts[2]], 1: [starts[2], starts[0]]}
    assert observer.shares == pytest.approx([0.025, 0.05, 0.075, 0.1])


class Shares(TrainingObserver):
    """Notes the shares of a run that were shown."""

    def __init__(self):
        self.shares = []

    def progressed(self, fraction, done=""):
        self.shares.append(fraction)
