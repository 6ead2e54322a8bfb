"""The decision for the best expected Dice as a rival: recalibrated on the cases that it may see, or the network itself."""

import json

import numpy as np
import pytest
from training_helpers import REGIONS, crops, material

from crfrefine.arrays.dice_decision import dice_labels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.baselines import VectorScaling, label_confusion
from crfrefine.train.crops import probabilities_of
from crfrefine.train.dice_rival import ARGMAX, DiceDecision, decided_labels, score_decisions, tune_decision
from crfrefine.train.folds import Split
from crfrefine.train.model import mean_dice

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    """A few steps are enough to see who decides about what."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 6)


NONE = VectorScaling(1.0, (0.0,) * 4)
SPLIT = Split((0, 1), (0, 1), (2,))


def tuned(cases, scaling=NONE, threads=2):
    with Workers(threads) as workers:
        return tune_decision(score_decisions(material(cases), workers), scaling, SPLIT.seen, material(cases), workers)


def test_it_finds_what_the_argmax_misses():
    """The held-out case and the threads change nothing; where logits are right it is the network itself."""
    cases = crops(3, "right")
    assert tuned(cases) == ARGMAX
    for crop in cases:
        crop.logits[0] += 6.4  # a network that finds most of a structure just too improbable for the argmax
    decision = tuned(cases)
    assert decision.scaling is not None
    held_out = cases[2]
    found = decided_labels(held_out.logits.astype(np.float32), decision.scaling, None, held_out.mask)
    network = mean_dice(label_confusion(held_out, held_out.decode(held_out.logits)), REGIONS)
    # Noise of 0.5 around log-odds of -0.4: the argmax misses most voxels, the decision few.
    assert network < 0.75 < 0.9 < mean_dice(label_confusion(held_out, found), REGIONS)
    held_out.labels[:] = 0
    assert tuned(cases, threads=1) == decision


def test_the_scaling_that_is_a_rival_itself_is_a_candidate():
    """It undoes a bias that no temperature can undo."""
    cases = crops(3, "right")
    for crop in cases:
        crop.logits[1] -= 7.0
        crop.logits[2] += 3.5
    undone = VectorScaling(1.0, (0.0, 7.0, -3.5, 0.0))
    assert tuned(cases, undone) == DiceDecision(undone) == from_plain(DiceDecision, json.loads(json.dumps(to_plain(DiceDecision(undone)))))


def test_only_voxels_near_foreground_are_decided():
    logits = np.zeros((3, 6, 7, 8), np.float32)
    logits[0] = 6.0
    logits[1, 1:3, 2:5, 3:6] = 5.6
    mask = np.ones((6, 7, 8), bool)
    mask[1] = False
    hot = VectorScaling(20.0, (0.0, 0.0, 0.0))
    near = logits[1] > 0
    np.testing.assert_array_equal(decided_labels(logits, hot, None, None), near)
    np.testing.assert_array_equal(decided_labels(logits, hot, None, mask), near & mask)
    # Everywhere it would be more: at this temperature a hundred voxels of background are as likely.
    assert dice_labels(probabilities_of(hot.apply(logits), None)).sum() > near.sum()


def test_regions_are_decided_one_by_one():
    scheme = RegionScheme.of({"whole": [1, 2], "core": 2})
    log_odds = np.full((2, 5, 6, 7), -8.0, np.float32)
    log_odds[0, 1:4, 1:5, 2:6] = -0.2
    log_odds[1, 2:3, 2:4, 3:5] = -0.1
    labels = decided_labels(log_odds, VectorScaling(1.0, (0.0, 0.0)), scheme, None)
    np.testing.assert_array_equal(labels, np.where(log_odds[1] > -1, 2, np.where(log_odds[0] > -1, 1, 0)))
