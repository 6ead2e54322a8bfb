"""Paired statistics against published tables, enumeration, scipy and simulation; the summary."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation_helpers import table_of
from scipy import stats

from crfrefine.errors import InputError
from crfrefine.statistics import paired
from crfrefine.statistics.comparison import (
    MEAN,
    Family,
    Measurement,
    ResultTable,
    correct,
    summarize,
)
from crfrefine.statistics.paired import (
    bootstrap_interval,
    compare_pairs,
    detectable_difference,
    holm,
    signed_rank,
    smallest_p_value,
)
from crfrefine.statistics.texts import describe_families, harm_text

# Exact distributions are sums of at most some thousand positive terms.
ROUNDING = 1e-12

# Darwin's maize, crossed minus self-fertilized, eighths of an inch (Fisher, The Design of
# Experiments, table 3).
DARWIN = np.array([49.0, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])


def test_without_ties_the_p_value_is_that_of_scipy():
    for num_pairs in (1, 5, 120):
        differences = np.random.default_rng(num_pairs).normal(0.2, 1.0, num_pairs)
        assert signed_rank(differences)[0] == pytest.approx(
            stats.wilcoxon(differences, method="exact").pvalue, rel=1e-9
        )


def test_with_ties_and_zeros_the_p_value_is_that_of_all_signs():
    """All 2^n assignments of signs to the mean ranks, one by one; zeros take no part."""
    differences = np.random.default_rng(1).integers(-3, 5, 11).astype(float)
    nonzero = differences[differences != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    seen = abs(ranks[nonzero > 0].sum() - ranks.sum() / 2)
    signs = np.array(list(itertools.product((0, 1), repeat=len(ranks))))
    extreme = np.abs(signs @ ranks - ranks.sum() / 2) >= seen - 1e-9
    assert signed_rank(differences)[0] == pytest.approx(np.mean(extreme), rel=ROUNDING)


def test_many_cases_take_the_normal_approximation():
    """With ties, zeros and the continuity correction, as scipy and R have it; fewer are counted."""
    differences = np.round(np.random.default_rng(8).normal(0.15, 1.0, 700), 1)
    expected = stats.wilcoxon(
        differences[differences != 0], correction=True, method="approx"
    ).pvalue
    assert signed_rank(differences)[0] == pytest.approx(expected, rel=1e-9)
    approximate = stats.wilcoxon(
        differences[:450][differences[:450] != 0], correction=True, method="approx"
    ).pvalue
    assert signed_rank(differences[:450])[0] not in (
        approximate,
        pytest.approx(approximate, rel=1e-9),
    )


def test_the_smallest_p_value_is_that_of_one_sign_and_nothing_to_test_gives_one():
    # A difference of cumulative probabilities, as in scipy, would end at 2e-16.
    for num_pairs in (1, 2, 6, 9, 120):
        assert signed_rank(np.arange(1.0, num_pairs + 1))[0] == pytest.approx(
            smallest_p_value(num_pairs), rel=ROUNDING
        )
    assert smallest_p_value(5) > 0.05 > smallest_p_value(6)
    assert smallest_p_value(0) == 1.0
    assert signed_rank(np.zeros(4)) == (1.0, 0.0)
    assert np.isnan(signed_rank(np.zeros(0))).all()


def test_holm_equals_published_examples():
    for p_values, adjusted in (
        # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        # The worked example of the method's encyclopedia article: reject at 0.05 the first and the
        # last alone.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.9, 0.8, math.nan], [1.0, 1.0, math.nan]),
        ([], []),
    ):
        assert holm(p_values) == pytest.approx(adjusted, rel=ROUNDING, nan_ok=True)


def test_a_large_loss_is_one_of_the_metrics_unit():
    """A point of a ratio or of a score of probabilities; of distances and volumes 1 mm and 1 ml."""
    losses = np.array([0.005, 0.02, 0.5, 0.9, 1.5])
    for metric, sign, expected in (
        ("dice", -1.0, 4),
        ("brier", 1.0, 4),
        ("hd95_mm", 1.0, 1),
        ("assd_mm", 1.0, 1),
        ("volume_difference_ml", 1.0, 1),
    ):
        rows = {("network", "1", metric): 2.0 + 0 * losses, ("crf", "1", metric): 2 + sign * losses}
        assert table_of(rows).compare("crf", "network", "1", metric).large_losses == expected


def test_a_comparison_in_all_its_numbers():
    """Darwin's maize on a baseline of 100; one more case is equal, and four lack a value."""
    values = [*(100 + DARWIN), math.nan, 3.0, 4.0, math.nan, 100.0]
    baseline = [100.0] * 15 + [5.0, math.nan, math.nan, math.nan, 100.0]
    names = [f"case {number:02d}" for number in range(20)]
    comparison = compare_pairs(values, baseline, cases=names)
    assert (
        comparison.num_pairs,
        comparison.num_only_method,
        comparison.num_only_baseline,
        comparison.num_neither,
    ) == (16, 2, 1, 1)
    differences = comparison.mean_difference, comparison.median_difference
    assert differences == pytest.approx((314 / 16, (23 + 24) / 2))
    assert (comparison.mean, comparison.median) == pytest.approx((100 + 314 / 16, 123.5))
    assert comparison.mean_baseline == comparison.median_baseline == 100.0
    ranks = comparison.p_value, comparison.effect_size
    assert ranks == pytest.approx((0.041259765625, (96 - 24) / 120), rel=ROUNDING)
    assert (comparison.wins, comparison.ties, comparison.losses) == (13, 1, 2)
    worst_cases, worst_differences = zip(*comparison.worst, strict=True)
    assert worst_cases == ("case 01", "case 14")
    assert worst_differences == pytest.approx((-67, -48))
    assert comparison.large_losses == 2
    few = compare_pairs(values, baseline, cases=names, large_loss=50.0)
    assert few == replace(comparison, large_losses=1)
    assert harm_text(comparison, with_name=True, minus="−") == "12.5% (case 01 −6700.00)"
    assert harm_text(comparison, "volume_difference_ml") == "-67.00"
    assert harm_text(compare_pairs([1.0, 0.51], [1.0, 0.515])) == "0% (-0.50)"
    assert (harm_text(compare_pairs([1.0], [0.5])), harm_text(compare_pairs([], []))) == (
        "none",
        "",
    )
    assert comparison.standard_deviation == pytest.approx(np.std([*DARWIN, 0.0], ddof=1))
    low, high = comparison.interval
    assert low < comparison.mean_difference < high


@pytest.mark.parametrize(
    ("values", "baseline", "better", "counts", "mean"),
    [
        ([1.0, 2.0, 9.0, 4.0], [2.0, 3.0, 5.0, 4.0], "lower", (2, 1, 1), 0.5),
        # Compared by magnitude.
        ([-1.0, 2.0, 0.0], [3.0, -2.0, -4.0], "nearer_zero", (2, 1, 0), -2.0),
        # Rounding is no win.
        ([0.1 + 0.2, 0.5, 0.7, 0.9], [0.3, 0.4, 0.6, 1.0], "higher", (2, 1, 1), 0.025),
    ],
)
def test_the_direction_decides_on_wins(values, baseline, better, counts, mean):
    comparison = compare_pairs(values, baseline, better=better)
    assert (comparison.wins, comparison.ties, comparison.losses) == counts
    assert comparison.mean_difference == pytest.approx(mean)
    if better == "lower":
        assert comparison.worst == (("2", pytest.approx(4.0)),)
    if better == "higher":
        # Three equal magnitudes of which one is negative: 2 x (1 + 3) / 8; rounding is no rank.
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
    """The formula of Efron 1987 on other resamples, twenty times as many.

    The uncorrected percentiles lie clearly lower.
    """
    differences = np.random.default_rng(13).exponential(size=25)
    mean = differences.mean()
    resampled = np.random.default_rng(14).choice(differences, (200_000, 25)).mean(axis=1)
    bias = stats.norm.ppf(np.mean(resampled < mean))
    acceleration = ((differences - mean) ** 3).sum() / (
        6 * ((differences - mean) ** 2).sum() ** 1.5
    )
    reach = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(resampled, stats.norm.cdf(bias + reach / (1 - acceleration * reach)))
    # Ends of 9999 resamples scatter by about a hundredth of the width of the interval, 0.7.
    assert bootstrap_interval(differences) == pytest.approx(expected, abs=0.02)
    assert (expected - np.quantile(resampled, [0.025, 0.975]) > 0.025).all()
    assert (
        bootstrap_interval(DARWIN, seed=1)
        == bootstrap_interval(DARWIN, seed=1)
        != bootstrap_interval(DARWIN, seed=2)
    )
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_detectable_difference_asks_for_the_usual_numbers_of_cases(monkeypatch):
    """Small, medium and large effects after Cohen, two-sided at 0.05 with a power of 80 %.

    The numbers are those of G*Power and pwr.t.test (paired). The signed-rank test needs a twentieth
    more cases, and at least six.
    """
    signed = detectable_difference(1.0, 20)
    with monkeypatch.context() as patch:
        patch.setattr(paired, "_EFFICIENCY", 1.0)  # of the t-test itself
        for effect, num_pairs in ((0.2, 199), (0.5, 34), (0.8, 15)):
            assert (
                detectable_difference(1.0, num_pairs)
                <= effect
                < detectable_difference(1.0, num_pairs - 1)
            )
        # Another implementation of the distribution, the other way round; both promise about eight
        # digits far out.
        noncentrality = detectable_difference(2.0, 34) / 2.0 * math.sqrt(34)
        assert stats.nct.sf(stats.t.isf(0.025, 33), 33, noncentrality) == pytest.approx(
            0.8, abs=1e-6
        )
        assert signed / detectable_difference(1.0, 20) == pytest.approx(math.sqrt(math.pi / 3))
    assert detectable_difference(1.0, 5) == math.inf
    assert math.isfinite(detectable_difference(1.0, 6))
    assert math.isnan(detectable_difference(1.0, 1))


NAN = math.nan

# Dice of four cases: of each method in two regions. The fourth case has no core; "other" finds one
# all the same.
DICE = {
    ("network", "whole"): [0.80, 0.70, 0.60, 0.90],
    ("network", "core"): [0.50, 0.40, 0.30, NAN],
    ("crf", "whole"): [0.82, 0.73, 0.60, 0.91],
    ("crf", "core"): [0.54, 0.40, 0.33, NAN],
    ("other", "whole"): [0.70, 0.70, 0.70, 0.80],
    ("other", "core"): [0.50, 0.50, 0.20, 0.00],
}


def test_a_table_has_names_in_order_of_first_appearance_and_means_over_the_same_defined_regions():
    """The false alarm of "other" has no counterpart.

    The fourth case therefore counts with the other region alone in both.
    """
    table = table_of(DICE)
    assert table.methods == ("network", "crf", "other")
    assert (table.regions, table.metrics) == (("whole", "core"), ("dice",))
    assert table.cases == ("case_0", "case_1", "case_2", "case_3")
    np.testing.assert_equal(table.values("crf", "core", "dice"), [0.54, 0.40, 0.33, NAN])
    assert [item.value for item in table][:4] == [0.80, 0.70, 0.60, 0.90]
    np.testing.assert_allclose(table.values("network", MEAN, "dice"), [0.65, 0.55, 0.45, 0.90])
    np.testing.assert_allclose(
        table.means("dice", ["other", "network"]),
        [[0.60, 0.60, 0.45, 0.80], [0.65, 0.55, 0.45, 0.90]],
    )
    np.testing.assert_allclose(
        table.means("dice", ["other", "network"], ["core"]),
        [[0.50, 0.50, 0.20, NAN], [0.50, 0.40, 0.30, NAN]],
    )
    fewer = ResultTable(item for item in table if (item.method, item.case) != ("crf", "case_1"))
    np.testing.assert_equal(fewer.values("crf", "whole", "dice"), [0.82, NAN, 0.60, 0.91])
    assert (fewer.missing_cases("crf"), fewer.missing_cases("network")) == (("case_1",), ())


def test_the_summary_holds_the_comparisons_with_holm_over_the_single_regions():
    rows = {(row.method, row.region): row for row in summarize(table_of(DICE), "network")}
    assert list(rows) == list(
        itertools.product(("network", "crf", "other"), ("whole", "core", MEAN))
    )
    for region in ("whole", "core", MEAN):
        assert rows["network", region].comparison is None
    assert rows["network", "core"].num_values == 3
    assert rows["network", "core"].num_undefined == 1
    assert rows["other", "core"].mean == pytest.approx(0.3)
    assert rows["other", "core"].median == pytest.approx(0.35)
    for method in ("crf", "other"):
        p_values = []
        for region in ("whole", "core"):
            expected = compare_pairs(DICE[method, region], DICE["network", region])
            assert rows[method, region].comparison.p_value == expected.p_value
            assert rows[method, region].comparison.interval == expected.interval
            assert rows[method, region].family == Family.SINGLE_REGIONS
            p_values.append(expected.p_value)
        adjusted = rows[method, "whole"].p_adjusted, rows[method, "core"].p_adjusted
        assert adjusted == holm(p_values)
        assert rows[method, MEAN].p_adjusted == rows[method, MEAN].comparison.p_value
        assert (rows[method, MEAN].family, rows[method, MEAN].family_size) == (Family.ENDPOINT, 1)
    assert rows["other", "core"].comparison.num_only_method == 1
    assert rows["crf", MEAN].comparison.mean_difference == pytest.approx(
        (0.03 + 0.015 + 0.015 + 0.01) / 4
    )
    some = summarize(table_of(DICE), "network", metrics=["dice"], regions=["core"])
    assert [(row.method, row.region) for row in some] == [
        ("network", "core"),
        ("crf", "core"),
        ("other", "core"),
    ]
    assert some[1].p_adjusted == some[1].comparison.p_value


def test_a_comparison_has_one_p_value_in_the_family_that_its_row_names():
    """Dice of the only judged region and the likelihood are tested alone.

    What follows from Dice is not tested, and the rest has two families.
    """
    rng = np.random.default_rng(5)
    masks = ("dice", "iou", "precision", "assd_mm")
    scores = ("ece", "nll")
    measurements = []
    for metric, region in [*itertools.product(masks, "12"), ("ece", "all"), ("nll", "all")]:
        for number in range(9):
            case = f"c{number}"
            value = 1.0 + 0.02 + 0.1 * rng.standard_normal()
            measurements.append(Measurement(case, region, metric, 1.0, "network"))
            measurements.append(Measurement(case, region, metric, value, "crf"))
    table = ResultTable(measurements)
    rows = summarize(table, "network", metrics=masks, regions=("1", "2"))
    rows += summarize(table, "network", metrics=scores, regions=("all",))
    found = {(row.metric, row.region): row for row in correct(rows, ["1"]) if row.method == "crf"}
    raw = {key: row.comparison.p_value for key, row in found.items()}
    assert found["dice", "1"].p_adjusted == raw["dice", "1"]
    assert found["nll", "all"].p_adjusted == raw["nll", "all"]
    single = [*itertools.product(("dice", "precision", "assd_mm"), ("2", MEAN)), ("ece", "all")]
    for family, keys in (
        (Family.OTHER_METRICS, [("precision", "1"), ("assd_mm", "1")]),
        (Family.SINGLE_REGIONS, single),
    ):
        assert {key for key, row in found.items() if row.family == family} == set(keys)
        adjusted = holm([raw[key] for key in keys])
        for key, p_value in zip(keys, adjusted, strict=True):
            assert found[key].family_size == len(keys)
            assert found[key].p_adjusted == pytest.approx(p_value)
    for region in ("1", "2", MEAN):
        assert found["iou", region].family is None
        assert math.isnan(found["iou", region].p_adjusted)
    told = describe_families(found.values())
    assert told.endswith(
        "endpoint (1 test), probabilities (1 test), other metrics (2 tests), "
        "single regions (7 tests)"
    )


def test_volumes_are_described_and_their_differences_compared_by_magnitude():
    """Too much in one region does not make up for too little in another.

    The mean over regions is of magnitudes as well.
    """
    values = {
        ("a", "x"): [1.0, -1.0],
        ("a", "y"): [-1.0, 1.0],
        ("b", "x"): [0.5, 0.5],
        ("b", "y"): [0.25, 0.0],
    }
    rows = summarize(table_of(values, "volume_difference_ml"), "a")
    comparison = next(row.comparison for row in rows if (row.method, row.region) == ("b", MEAN))
    assert comparison.mean_difference == pytest.approx((0.375 + 0.25) / 2 - 1.0)
    assert comparison.wins == 2
    signed = table_of({("a", "x"): [0.0, 0.0], ("b", "x"): [3.0, 0.0]}, "volume_difference_ml")
    table = ResultTable([Measurement("case_1", "x", "dice", 0.5, "a"), *signed])
    assert table.compare("b", "a", MEAN, "volume_difference_ml").worst == (("case_0", 3.0),), (
        "in any order of the cases"
    )
    described = summarize(table_of(values, "volume_ml"), "a")
    assert [row.region for row in described] == ["x", "y", MEAN] * 2
    for row in described:
        assert row.comparison is None
    assert described[-1].mean == (0.5 + 0.25 + 0.5 + 0.0) / 4
    with pytest.raises(InputError, match="volume_ml has no better values"):
        table_of(values, "volume_ml").compare("b", "a", "x", "volume_ml")
