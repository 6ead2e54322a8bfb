"""The table of methods, regions and metrics, its summary against a baseline, and its form for files and terminals."""

import itertools
import math

import numpy as np
import pytest

from crfrefine.errors import InputError
from crfrefine.statistics.comparison import MEAN, Family, Measurement, ResultTable, correct, describe_families, summarize
from crfrefine.statistics.paired import compare_pairs, holm

NAN = math.nan

# Dice of four cases: of each method in two regions. The fourth case has no core; "other" finds one all the same.
DICE = {
    ("network", "whole"): [0.80, 0.70, 0.60, 0.90],
    ("network", "core"): [0.50, 0.40, 0.30, NAN],
    ("crf", "whole"): [0.82, 0.73, 0.60, 0.91],
    ("crf", "core"): [0.54, 0.40, 0.33, NAN],
    ("other", "whole"): [0.70, 0.70, 0.70, 0.80],
    ("other", "core"): [0.50, 0.50, 0.20, 0.00],
}


def _table(values=DICE, metric="dice"):
    return ResultTable(
        Measurement(f"case_{number}", region, metric, value, method)
        for (method, region), row in values.items()
        for number, value in enumerate(row)
    )


def test_a_table_has_names_in_order_of_first_appearance_and_means_over_the_same_defined_regions():
    """The false alarm of "other" has no counterpart, so the fourth case counts with the other region alone in both."""
    table = _table()
    assert table.methods == ("network", "crf", "other")
    assert (table.regions, table.metrics) == (("whole", "core"), ("dice",))
    assert table.cases == ("case_0", "case_1", "case_2", "case_3")
    np.testing.assert_equal(table.values("crf", "core", "dice"), [0.54, 0.40, 0.33, NAN])
    assert [item.value for item in table][:4] == [0.80, 0.70, 0.60, 0.90]
    np.testing.assert_allclose(table.values("network", MEAN, "dice"), [0.65, 0.55, 0.45, 0.90])
    np.testing.assert_allclose(table.means("dice", ["other", "network"]), [[0.60, 0.60, 0.45, 0.80], [0.65, 0.55, 0.45, 0.90]])
    np.testing.assert_allclose(table.means("dice", ["other", "network"], ["core"]), [[0.50, 0.50, 0.20, NAN], [0.50, 0.40, 0.30, NAN]])
    fewer = ResultTable(item for item in table if (item.method, item.case) != ("crf", "case_1"))
    np.testing.assert_equal(fewer.values("crf", "whole", "dice"), [0.82, NAN, 0.60, 0.91])
    assert (fewer.missing_cases("crf"), fewer.missing_cases("network")) == (("case_1",), ())


def test_the_summary_holds_the_comparisons_with_holm_over_the_single_regions():
    rows = {(row.method, row.region): row for row in summarize(_table(), "network")}
    assert list(rows) == [(method, region) for method in ("network", "crf", "other") for region in ("whole", "core", MEAN)]
    assert all(rows["network", region].comparison is None for region in ("whole", "core", MEAN))
    assert rows["network", "core"].num_values == 3
    assert rows["network", "core"].num_undefined == 1
    assert rows["other", "core"].mean == pytest.approx(0.3)
    assert rows["other", "core"].median == pytest.approx(0.35)
    for method in ("crf", "other"):
        expected = {region: compare_pairs(DICE[method, region], DICE["network", region]) for region in ("whole", "core")}
        for region, comparison in expected.items():
            assert rows[method, region].comparison.p_value == comparison.p_value
            assert rows[method, region].comparison.interval == comparison.interval
        p_values = [comparison.p_value for comparison in expected.values()]
        assert [rows[method, region].p_adjusted for region in ("whole", "core")] == list(holm(p_values))
        assert {rows[method, region].family for region in ("whole", "core")} == {Family.SINGLE_REGIONS}
        assert rows[method, MEAN].p_adjusted == rows[method, MEAN].comparison.p_value
        assert (rows[method, MEAN].family, rows[method, MEAN].family_size) == (Family.ENDPOINT, 1)
    assert rows["other", "core"].comparison.num_only_method == 1
    assert rows["crf", MEAN].comparison.mean_difference == pytest.approx((0.03 + 0.015 + 0.015 + 0.01) / 4)
    some = summarize(_table(), "network", metrics=["dice"], regions=["core"])
    assert [(row.method, row.region) for row in some] == [("network", "core"), ("crf", "core"), ("other", "core")]
    assert some[1].p_adjusted == some[1].comparison.p_value


def test_a_comparison_has_one_p_value_in_the_family_that_its_row_names():
    """Dice of the only judged region and the likelihood are tested alone, what follows from Dice is not, and the rest has two families."""
    rng = np.random.default_rng(5)
    masks, scores = ("dice", "iou", "precision", "assd_mm"), ("ece", "nll")
    table = ResultTable(
        Measurement(f"c{number}", region, metric, 1.0 + step, method)
        for metric, region in (*itertools.product(masks, "12"), *((metric, "all") for metric in scores))
        for number in range(9)
        for method, step in (("network", 0.0), ("crf", 0.02 + 0.1 * rng.standard_normal()))
    )
    rows = summarize(table, "network", metrics=masks, regions=("1", "2"))
    rows += summarize(table, "network", metrics=scores, regions=("all",))
    found = {(row.metric, row.region): row for row in correct(rows, ["1"]) if row.method == "crf"}
    raw = {key: row.comparison.p_value for key, row in found.items()}
    assert found["dice", "1"].p_adjusted == raw["dice", "1"]
    assert found["nll", "all"].p_adjusted == raw["nll", "all"]
    rest = ("dice", "precision", "assd_mm")
    single = [(metric, "2") for metric in rest] + [(metric, MEAN) for metric in rest] + [("ece", "all")]
    for family, keys in ((Family.OTHER_METRICS, [("precision", "1"), ("assd_mm", "1")]), (Family.SINGLE_REGIONS, single)):
        assert {key for key, row in found.items() if row.family == family} == set(keys)
        assert {found[key].family_size for key in keys} == {len(keys)}
        assert [found[key].p_adjusted for key in keys] == pytest.approx(holm([raw[key] for key in keys]))
    for region in ("1", "2", MEAN):
        assert found["iou", region].family is None
        assert math.isnan(found["iou", region].p_adjusted)
    told = describe_families(found.values())
    assert told.endswith("endpoint (1 test), probabilities (1 test), other metrics (2 tests), single regions (7 tests)")


def test_volumes_are_described_and_their_differences_compared_by_magnitude():
    """Too much in one region does not make up for too little in another: the mean over regions is of magnitudes as well."""
    values = {("a", "x"): [1.0, -1.0], ("a", "y"): [-1.0, 1.0], ("b", "x"): [0.5, 0.5], ("b", "y"): [0.25, 0.0]}
    rows = summarize(_table(values, "volume_difference_ml"), "a")
    comparison = next(row.comparison for row in rows if (row.method, row.region) == ("b", MEAN))
    assert comparison.mean_difference == pytest.approx((0.375 + 0.25) / 2 - 1.0)
    assert comparison.wins == 2
    signed = _table({("a", "x"): [0.0, 0.0], ("b", "x"): [3.0, 0.0]}, "volume_difference_ml")
    table = ResultTable([Measurement("case_1", "x", "dice", 0.5, "a"), *signed])
    assert table.compare("b", "a", MEAN, "volume_difference_ml").worst == (("case_0", 3.0),), "in any order of the cases"
    described = summarize(_table(values, "volume_ml"), "a")
    assert [row.region for row in described] == ["x", "y", MEAN] * 2
    assert all(row.comparison is None for row in described)
    assert described[-1].mean == (0.5 + 0.25 + 0.5 + 0.0) / 4
    with pytest.raises(InputError, match="volume_ml has no better values"):
        _table(values, "volume_ml").compare("b", "a", "x", "volume_ml")
