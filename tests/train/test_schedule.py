"""When the training of a start ends."""

from types import SimpleNamespace

import pytest

from crfrefine.train.fit import Trajectory

EVERY = 8


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
