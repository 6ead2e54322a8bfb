"""Whether probabilities got better or worse: the test, its direction, and the sentence."""

import numpy as np

from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import Measurement, ResultTable, format_p, summarize
from crfrefine.statistics.harm import Change, judge_probabilities
from crfrefine.statistics.paired import compare_pairs


def table(steps, region=ALL_LABELS, base=0.05):
    """Metrics of a network, the same in every case, and of a CRF that adds to them."""
    return ResultTable(
        Measurement(f"case_{number:02d}", region, metric, value, method)
        for metric, changes in steps.items()
        for number, change in enumerate(changes)
        for method, value in (("network", base), ("crf", base + change))
    )


def judged(steps, **options):
    return judge_probabilities(summarize(table(steps, **options), "network"), "crf")


FALLS = -0.01 * (1.0 + np.linspace(-1.4, 1.0, 24))  # in 20 of 24 cases


def test_better_and_worse():
    for sign, change, word in ((1, Change.BETTER, "better"), (-1, Change.WORSE, "worse")):
        found = judged({"nll": sign * FALLS, "ece": -0.001 + 0 * FALLS, "brier": 0.002 + 0 * FALLS})
        p_value = compare_pairs(0.05 + sign * FALLS, 0.05 + 0 * FALLS).p_value
        wins = int((sign * FALLS < 0).sum())
        assert found.change == change
        nll = f"negative log likelihood 0.05000 → {0.05 + sign * FALLS.mean():.5f} (better in {wins} of 24 cases, p {format_p(p_value)})"
        others = "calibration error (ECE) 0.05000 → 0.04900, Brier score 0.05000 → 0.05200."
        assert found.sentence == f"The probabilities of all labels: {word}, {nll}, {others}"


def test_no_difference_and_too_few():
    assert judged({"nll": 0.01 * np.cos(np.arange(24) * np.pi) * (1 + np.arange(24) / 100)}).change == Change.NO_DIFFERENCE
    few = judged({"nll": FALLS[-5:]})
    assert few.change == Change.TOO_FEW
    assert few.sentence.startswith("The probabilities of all labels: too few cases, negative log likelihood ")
    for same in (judged({"nll": 0 * FALLS, "ece": 0 * FALLS}), judged({"nll": -1e-9 - 1e-10 * np.arange(24)})):
        assert same.change == Change.NO_DIFFERENCE
        assert same.sentence.startswith("The probabilities of all labels: no difference, negative log likelihood 0.05000 → 0.05000 (")
