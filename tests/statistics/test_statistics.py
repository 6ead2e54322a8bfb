"""Paired statistics against published tables and examples, enumeration, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from crfrefine.errors import InputError
from crfrefine.statistics import paired
from crfrefine.statistics.comparison import harm_text
from crfrefine.statistics.paired import bootstrap_interval, compare_pairs, detectable_difference, holm, signed_rank, smallest_p_value

# Exact distributions are sums of at most some thousand positive terms.
ROUNDING = 1e-12

# Darwin's maize, crossed minus self-fertilized, eighths of an inch (Fisher, The Design of Experiments, table 3).
DARWIN = np.array([49.0, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])


def test_without_ties_the_p_value_is_that_of_scipy():
    for num_pairs in (1, 5, 120):
        differences = np.random.default_rng(num_pairs).normal(0.2, 1.0, num_pairs)
        assert signed_rank(differences)[0] == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, rel=1e-9)


def test_with_ties_and_zeros_the_p_value_is_that_of_all_signs():
    """All 2^n assignments of signs to the mean ranks, one by one; zeros take no part."""
    differences = np.random.default_rng(1).integers(-3, 5, 11).astype(float)
    nonzero = differences[differences != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    seen = abs(ranks[nonzero > 0].sum() - ranks.sum() / 2)
    extreme = [
        abs(sum(itertools.compress(ranks, signs)) - ranks.sum() / 2) >= seen - 1e-9
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    assert signed_rank(differences)[0] == pytest.approx(np.mean(extreme), rel=ROUNDING)


def test_many_cases_take_the_normal_approximation():
    """With ties and zeros and the continuity correction, as scipy and R have it; fewer are counted, whatever their ties."""
    differences = np.round(np.random.default_rng(8).normal(0.15, 1.0, 700), 1)
    expected = stats.wilcoxon(differences[differences != 0], correction=True, method="approx").pvalue
    assert signed_rank(differences)[0] == pytest.approx(expected, rel=1e-9)
    approximate = stats.wilcoxon(differences[:450][differences[:450] != 0], correction=True, method="approx").pvalue
    assert signed_rank(differences[:450])[0] not in (approximate, pytest.approx(approximate, rel=1e-9))


def test_the_smallest_p_value_is_that_of_one_sign_and_nothing_to_test_gives_one():
    for num_pairs in (1, 2, 6, 9, 120):  # a difference of cumulative probabilities, as in scipy, ends at 2e-16
        assert signed_rank(np.arange(1.0, num_pairs + 1))[0] == pytest.approx(smallest_p_value(num_pairs), rel=ROUNDING)
    assert smallest_p_value(5) > 0.05 > smallest_p_value(6)
    assert smallest_p_value(0) == 1.0
    assert signed_rank(np.zeros(4)) == (1.0, 0.0)
    assert np.isnan(signed_rank(np.zeros(0))).all()


def test_holm_equals_published_examples():
    for p_values, adjusted in (
        # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        # The worked example of the method's encyclopedia article: reject at 0.05 the first and the last alone.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.9, 0.8, math.nan], [1.0, 1.0, math.nan]),
        ([], []),
    ):
        assert holm(p_values) == pytest.approx(adjusted, rel=ROUNDING, nan_ok=True)


def test_a_comparison_in_all_its_numbers():
    """Darwin's maize on a baseline of 100, with one case that is equal and four that have a value missing."""
    values = [*(100 + DARWIN), math.nan, 3.0, 4.0, math.nan, 100.0]
    baseline = [100.0] * 15 + [5.0, math.nan, math.nan, math.nan, 100.0]
    names = [f"case {number:02d}" for number in range(20)]
    comparison = compare_pairs(values, baseline, cases=names)
    assert (comparison.num_pairs, comparison.num_only_method, comparison.num_only_baseline, comparison.num_neither) == (16, 2, 1, 1)
    assert comparison.mean_difference == pytest.approx(314 / 16)
    assert comparison.mean == pytest.approx(100 + 314 / 16)
    assert comparison.mean_baseline == comparison.median_baseline == 100.0
    assert comparison.median_difference == pytest.approx((23 + 24) / 2)
    assert comparison.median == pytest.approx(123.5)
    assert comparison.p_value == pytest.approx(0.041259765625, rel=ROUNDING)
    assert (comparison.wins, comparison.ties, comparison.losses) == (13, 1, 2)
    assert comparison.effect_size == pytest.approx((96 - 24) / 120, rel=ROUNDING)
    assert [name for name, _ in comparison.worst] == ["case 01", "case 14"]
    assert [difference for _, difference in comparison.worst] == pytest.approx([-67, -48])
    assert comparison.large_losses == 2
    assert harm_text(comparison, with_name=True, minus="−") == "12.5% (case 01 −6700.00)"
    assert harm_text(comparison, "volume_difference_ml") == "-67.00"
    assert harm_text(compare_pairs([1.0, 0.51], [1.0, 0.515])) == "0% (-0.50)"
    assert (harm_text(compare_pairs([1.0], [0.5])), harm_text(compare_pairs([], []))) == ("none", "")
    assert comparison.standard_deviation == pytest.approx(np.std([*DARWIN, 0.0], ddof=1))
    low, high = comparison.interval
    assert low < comparison.mean_difference < high


@pytest.mark.parametrize(
    ("values", "baseline", "better", "counts", "mean"),
    [
        ([1.0, 2.0, 9.0, 4.0], [2.0, 3.0, 5.0, 4.0], "lower", (2, 1, 1), 0.5),
        ([-1.0, 2.0, 0.0], [3.0, -2.0, -4.0], "nearer_zero", (2, 1, 0), -2.0),  # compared by magnitude
        ([0.1 + 0.2, 0.5, 0.7, 0.9], [0.3, 0.4, 0.6, 1.0], "higher", (2, 1, 1), 0.025),  # rounding is no win
    ],
)
def test_the_direction_decides_on_wins(values, baseline, better, counts, mean):
    comparison = compare_pairs(values, baseline, better=better)
    assert (comparison.wins, comparison.ties, comparison.losses) == counts
    assert comparison.mean_difference == pytest.approx(mean)
    if better == "lower":
        assert comparison.worst == (("2", pytest.approx(4.0)),)
    if better == "higher":  # Three equal magnitudes of which one is negative: 2 x (1 + 3) / 8; rounding is no rank.
        assert (comparison.p_value, comparison.effect_size) == (1.0, pytest.approx(1 / 3))


def test_one_pair_and_none_and_bad_values():
    for num_pairs in (0, 1):
        comparison = compare_pairs([0.5] * num_pairs, [0.4] * num_pairs)
        assert comparison.num_pairs == num_pairs
        assert math.isnan(comparison.interval[0])
        assert math.isnan(comparison.detectable_difference)
        assert comparison.p_value == pytest.approx(1.0 if num_pairs else math.nan, nan_ok=True)
        assert math.isnan(comparison.mean_difference) == (num_pairs == 0)
    for values, cases, text in (
        ([1.0], None, "expected one value per case"),
        ([1.0, 2.0], ["a"], "expected one value per case"),
        ([1.0, math.inf], None, "expected finite values"),
    ):
        with pytest.raises(InputError, match=text):
            compare_pairs(values, [1.0, 2.0], cases=cases)


def test_the_interval_of_few_skewed_differences_is_corrected_for_bias_and_skewness():
    """The formula of Efron 1987 on other resamples, twenty times as many; the uncorrected percentiles lie clearly lower."""
    differences = np.random.default_rng(13).exponential(size=25)
    mean = differences.mean()
    resampled = np.random.default_rng(14).choice(differences, (200_000, 25)).mean(axis=1)
    bias = stats.norm.ppf(np.mean(resampled < mean))
    acceleration = ((differences - mean) ** 3).sum() / (6 * ((differences - mean) ** 2).sum() ** 1.5)
    reach = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(resampled, stats.norm.cdf(bias + reach / (1 - acceleration * reach)))
    # Ends of 9999 resamples scatter by about a hundredth of the width of the interval, 0.7.
    assert bootstrap_interval(differences) == pytest.approx(expected, abs=0.02)
    assert (expected - np.quantile(resampled, [0.025, 0.975]) > 0.025).all()
    assert bootstrap_interval(DARWIN, seed=1) == bootstrap_interval(DARWIN, seed=1) != bootstrap_interval(DARWIN, seed=2)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_detectable_difference_asks_for_the_usual_numbers_of_cases(monkeypatch):
    """Small, medium and large effects after Cohen, two-sided at 0.05 with a power of 80 %: what G*Power and pwr.t.test (paired) say.

    The signed-rank test needs a twentieth more cases, and at least six.
    """
    signed = detectable_difference(1.0, 20)
    with monkeypatch.context() as patch:
        patch.setattr(paired, "_EFFICIENCY", 1.0)  # of the t-test itself
        for effect, num_pairs in ((0.2, 199), (0.5, 34), (0.8, 15)):
            assert detectable_difference(1.0, num_pairs) <= effect < detectable_difference(1.0, num_pairs - 1)
        # Another implementation of the distribution, the other way round; both promise about eight digits far out.
        noncentrality = detectable_difference(2.0, 34) / 2.0 * math.sqrt(34)
        assert stats.nct.sf(stats.t.isf(0.025, 33), 33, noncentrality) == pytest.approx(0.8, abs=1e-6)
        assert signed / detectable_difference(1.0, 20) == pytest.approx(math.sqrt(math.pi / 3))
    assert detectable_difference(1.0, 5) == math.inf
    assert math.isfinite(detectable_difference(1.0, 6))
    assert math.isnan(detectable_difference(1.0, 1))
