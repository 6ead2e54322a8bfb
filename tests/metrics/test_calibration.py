"""Calibration: known answers, a brute force, and the conventions."""

import math

import numpy as np
import pytest
from evaluation_helpers import SHAPE, expected_calibration, expected_calibration_of_all, label_map, logits_of
from oracles import softmax

from crfrefine.metrics.calibration import _BLOCK_VOXELS, measure_calibration
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS

REGIONS = {"1": (1,), "2": (2,), "both": (1, 2)}
ROUNDING = 1e-12  # sums of a thousand doubles in another order


@pytest.mark.parametrize("order", ["C", "F"])
def test_every_number_equals_the_brute_force(order):
    """The second grid has more voxels than two blocks, and not a whole number of them."""
    rng, shape = np.random.default_rng(0), (2 * _BLOCK_VOXELS // 15 + 3, 5, 3)
    small = label_map(3)
    # Sums of a thousand and of 60,000 doubles in another order.
    for reference, logits, rounding in (
        (small, logits_of(small, 4), ROUNDING),
        (rng.integers(0, 3, shape), rng.normal(0, 2, (3, *shape)), 1e-10),
    ):
        probabilities = softmax(logits).astype(np.float32)
        measured = measure_calibration(np.asarray(probabilities, order=order), np.asarray(reference, order=order), REGIONS)
        regions = {"1": probabilities[1], "2": probabilities[2], "both": probabilities[1].astype(float) + probabilities[2]}
        for name, probability in regions.items():
            assert measured[name] == pytest.approx(expected_calibration(probability, np.isin(reference, REGIONS[name])), abs=rounding)
        assert measured[ALL_LABELS] == pytest.approx(expected_calibration_of_all(probabilities, reference), abs=rounding)
        assert list(measured["1"]) == list(CALIBRATION_METRICS)


def test_certain_and_right_is_zero_and_certain_and_wrong_is_bounded():
    reference = np.array([0, 1])
    right = np.array([[1.0, 0.0], [0.0, 1.0]])
    for row in measure_calibration(right, reference, {"1": (1,)}).values():
        assert row == {"ece": 0.0, "brier": 0.0, "nll": 0.0}
    wrong = measure_calibration(right[::-1], reference, {"1": (1,)})
    assert wrong["1"] == pytest.approx({"ece": 1.0, "brier": 1.0, "nll": -math.log(1e-7)})
    assert wrong[ALL_LABELS] == pytest.approx({"ece": 1.0, "brier": 2.0, "nll": -math.log(1e-7)})


def test_ignored_voxels_do_not_count():
    reference = label_map(5)
    probabilities = softmax(logits_of(reference, 6))
    marked = reference.copy()
    marked[:4] = 9
    measured = measure_calibration(probabilities, marked, REGIONS, ignore_label=9)
    alone = measure_calibration(probabilities[:, 4:], reference[4:], REGIONS)
    for name, row in alone.items():
        assert measured[name] == pytest.approx(row, abs=ROUNDING)
    nothing = measure_calibration(probabilities, np.full(SHAPE, 9), REGIONS, ignore_label=9)
    assert all(math.isnan(value) for row in nothing.values() for value in row.values())


def test_a_label_without_a_channel_has_the_probability_zero():
    reference = np.array([0, 5])
    probabilities = np.array([[1.0, 0.6], [0.0, 0.4]])
    measured = measure_calibration(probabilities, reference, {"5": (5,), "6": (6,)})
    assert measured["5"] == pytest.approx({"ece": 0.5, "brier": 0.5, "nll": -math.log(1e-7) / 2})
    assert measured["6"] == {"ece": 0.0, "brier": 0.0, "nll": 0.0}
    # All labels: the truth has a label that nothing was said about, so its 1 counts in full, and so does every other probability.
    assert measured[ALL_LABELS] == pytest.approx({"ece": 0.3, "brier": (1 + 0.6**2 + 0.4**2) / 2, "nll": -math.log(1e-7) / 2})
