"""The charts: marks where the numbers are, shapes that tell better from worse, and no more of them than a page can carry."""

import re

import numpy as np
import pytest
from report_helpers import make_report, make_table

from crfrefine.pages.report import charts
from crfrefine.pages.report.pairs import Pairs, pairs_of
from crfrefine.pages.report.svg import Plot, round_ticks, scale_over, tick_text
from crfrefine.pages.report.wording import wording_of
from crfrefine.statistics.paired import compare_pairs

DICE = wording_of("dice")


def make_pairs(before, after, *, better=1):
    before, after = np.asarray(before, float), np.asarray(after, float)
    names = tuple(f"case {number}" for number in range(len(before)))
    return Pairs(names, before, after, (better * np.sign(after - before)).astype(np.int64))


def test_ticks_are_round_and_lie_between_the_ends():
    assert round_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_ticks(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert round_ticks(81.3, 81.9) == pytest.approx([81.4, 81.6, 81.8])
    assert round_ticks(5, 5) == [5]
    ticks = round_ticks(-0.06, 0.07, 7)
    assert [tick_text(tick, ticks) for tick in ticks] == ["\u22120.06", "\u22120.04", "\u22120.02", "0.00", "0.02", "0.04", "0.06"]
    ticks = round_ticks(0, 12, 5)
    assert [tick_text(tick, ticks) for tick in ticks] == ["0.0", "2.5", "5.0", "7.5", "10.0"]


def test_each_case_is_a_line_from_before_to_after_named_with_its_change():
    drawn = charts.paired_plot("p", make_pairs([0.5, 0.7, 0.6], [0.6, 0.65, 0.6]), DICE, "network", "crf")
    lines = re.findall(r'class="case (\w+)"><title>case (\d)[^<]*</title><path d="M([\d.]+) [\d.]+L([\d.]+) ', drawn)
    assert {(kind, int(number)) for kind, number, *_ in lines} == {("better", 0), ("worse", 1), ("equal", 2)}
    assert all(float(start) < float(end) for *_, start, end in lines)
    assert "case 0: 0.5000 → 0.6000 (+10.00 points), better" in drawn
    assert "crf is better in 1, equal in 1 and worse in 1 of 3 cases" in drawn


def axis_of(drawn, axis):
    """The numbers that the ticks of an axis give to coordinates, as a function; and how much a unit of the drawing is."""
    at_bottom = Plot("", "", "").inner[3] + 17
    pattern = {
        "x": rf'<text x="([\d.]+)" y="{at_bottom:.0f}" text-anchor="middle"',
        "y": r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end"',
    }
    ticks = re.findall(pattern[axis] + r' class="tick">([^<]+)<', drawn)
    places, numbers = np.array([(float(place), float(text.replace("\u2212", "-"))) for place, text in ticks]).T
    slope, start = np.polyfit(places - {"x": 0, "y": 4}[axis], numbers, 1)  # the middle of a line of text lies above its foot
    return lambda place: slope * np.asarray(place, float) + start, abs(slope)


def test_every_mark_lies_where_the_axes_say():
    """Read off the drawing as a reader does, with a ruler; coordinates are written to a tenth of a unit."""
    rng = np.random.default_rng(6)
    before = rng.uniform(0.5, 0.8, 12)
    pairs = make_pairs(before, before + rng.normal(0.01, 0.03, 12))
    means, differences = (pairs.before + pairs.after) / 2, 100 * pairs.differences
    tip = r'class="case (?:better|worse)"><title>case (\d+)[^<]*</title>'

    drawn = charts.paired_plot("p", pairs, DICE, "network", "crf")
    value, unit = axis_of(drawn, "y")
    for number, start, end in re.findall(tip + r'<path d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', drawn):
        assert value([start, end]) == pytest.approx([pairs.before[int(number)], pairs.after[int(number)]], abs=0.3 * unit)
    arrows = {float(x): value(y) for x, y in re.findall(r'd="M([\d.]+) ([\d.]+)l-?8 -5v10z" class="mean"', drawn)}
    assert [arrows[x] for x in sorted(arrows)] == pytest.approx([pairs.before.mean(), pairs.after.mean()], abs=0.3 * unit)

    drawn = charts.bland_altman_plot("b", pairs, DICE)
    (value, unit), (across, unit_across) = axis_of(drawn, "y"), axis_of(drawn, "x")
    marks = re.findall(tip + r'<path d="M([\d.]+) ([\d.]+)l4.2 (-?)', drawn)
    assert len(marks) == 12
    for number, x, y, minus in marks:
        middle = float(y) - 4.2 if minus else float(y) + 4.2  # a path begins at the tip of its triangle, which is below where it is worse
        assert across(x) == pytest.approx(means[int(number)], abs=0.3 * unit_across)
        assert value(middle) == pytest.approx(differences[int(number)], abs=0.3 * unit)
    levels = value(re.findall(r'd="M[\d.]+ ([\d.]+)H[\d.]+" class="level', drawn))
    spread = 1.96 * differences.std(ddof=1)
    expected = differences.mean() + np.array([0, spread, -spread])
    assert levels == pytest.approx(expected, abs=0.3 * unit)
    said = "mean: {:+.2f} points; +1.96 SD: {:+.2f} points; -1.96 SD: {:+.2f} points".format(*expected)
    assert said.replace("-", "\u2212") in drawn

    comparison = compare_pairs(pairs.after, pairs.before)
    drawn = charts.difference_plot("d", pairs, DICE, comparison.mean_difference, comparison.interval)
    across, unit = axis_of(drawn, "x")
    for number, x in re.findall(tip + r'<path d="M([\d.]+) ', drawn):
        assert across(x) == pytest.approx(differences[int(number)], abs=0.3 * unit)
    (diamond,) = re.findall(r'd="M([\d.]+) [\d.]+l6 6l-6 6l-6 -6z" class="mean"', drawn)
    assert across(diamond) == pytest.approx(differences.mean(), abs=0.3 * unit)
    (ends,) = re.findall(r'd="M([\d.]+) [\d.]+v10m0 -5H([\d.]+)m0 -5v10"', drawn)
    assert across(ends) == pytest.approx(100 * np.array(comparison.interval), abs=0.3 * unit)


def test_the_distribution_shows_mean_and_interval_of_the_comparison_and_no_mark_covers_another():
    rng = np.random.default_rng(1)
    before = rng.uniform(0.5, 0.8, 40)
    pairs = make_pairs(before, before + rng.normal(0.01, 0.02, 40))
    comparison = compare_pairs(pairs.after, pairs.before)
    drawn = charts.difference_plot("d", pairs, DICE, comparison.mean_difference, comparison.interval)
    low, high = (100 * end for end in comparison.interval)
    expected = f"mean {100 * comparison.mean_difference:+.2f} points, 95 % CI {low:+.2f} to {high:+.2f}".replace("-", "\u2212")
    assert expected in drawn
    assert charts.difference_plot("d", pairs, DICE) == drawn, "the bootstrap is that of the comparison"
    marks = re.findall(r'd="M([\d.]+) ([\d.]+)l4.2 (-?)7.1h-8.4z" class="mark"', drawn)
    assert len(marks) == 40
    middles = np.array([(float(x), float(y) + (-3.55 if minus else 3.55)) for x, y, minus in marks])
    across, up = np.abs(middles[:, None] - middles).T
    assert ((across > 8.3) | (up > 7.0))[np.triu_indices(40, 1)].all()


def test_bars_count_every_case_and_none_crosses_zero():
    rng = np.random.default_rng(4)
    before = rng.uniform(0.5, 0.8, 1000)
    pairs = make_pairs(before, before + rng.normal(0.003, 0.02, 1000))
    drawn = charts.difference_plot("d", pairs, DICE)
    bars = re.findall(r"<title>(\d+) cases?, ([+\u2212]?[\d.]+) to ([+\u2212]?[\d.]+) points: (\w+)</title>", drawn)
    assert sum(int(count) for count, *_ in bars) == 1000
    spans = [tuple(map(float, span)) for span in re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', drawn)]
    assert len(spans) == len(bars)
    bottom = max(y + height for y, height in spans)
    assert all(y > 0 and any(abs(y + height - end) < 0.11 for end in (bottom, *(other for other, _ in spans))) for y, height in spans)
    for _, low, high, kind in bars:
        low, high = (float(end.replace("\u2212", "-")) for end in (low, high))
        assert (low >= 0) if kind == "better" else (high <= 0)


def test_many_cases_become_few_elements_with_the_extremes_among_them():
    report = make_report(3, table=make_table(1500))
    pairs = pairs_of(report, "1", "dice")
    shown = charts.drawn_cases(pairs)
    assert len(shown) <= charts.MOST_DRAWN
    assert {int(np.argmin(pairs.differences)), int(np.argmax(pairs.differences))} <= set(shown.tolist())
    for drawn in (charts.paired_plot("p", pairs, DICE, "a", "b"), charts.bland_altman_plot("b", pairs, DICE)):
        assert len(re.findall(r'class="case', drawn)) <= 3
        assert len(drawn) < 30_000


def test_one_case_without_a_difference():
    pairs = make_pairs([0.5], [0.5])
    for drawn in (
        charts.paired_plot("p", pairs, DICE, "a", "b"),
        charts.bland_altman_plot("b", pairs, DICE),
        charts.difference_plot("d", pairs, DICE),
    ):
        assert "nan" not in drawn
        assert "inf" not in drawn
        assert 'class="case equal"' in drawn


def test_numbers_are_written_with_their_unit_and_a_true_minus():
    assert DICE.quantity(0.8671) == "0.8671"
    assert DICE.change_quantity(-0.0123) == "\u22121.23 points"
    assert DICE.change(-0.000001) == "0.00"
    assert DICE.change_quantity(0.0123) == "+1.23 points"
    assert DICE.quantity(float("nan")) == "–"
    assert wording_of("hd95_mm").axis == "HD95 (mm)"
    assert wording_of("volume_difference_ml").difference_axis == "Difference (ml)"
    assert wording_of("num_components").quantity(3) == "3.0"
    assert wording_of("ece").number(0.01234) == "0.01234"


def test_values_that_differ_by_rounding_alone_are_drawn_as_one():
    for values in ([0.3, 0.1 + 0.2], [0.0, 5e-17], [-1e-18, 1e-18], [61.25, 61.25 * (1 + 1e-15)]):
        scale = scale_over(values, 0.0, 100.0)
        ticks = round_ticks(scale.low, scale.high)
        assert abs(scale(values[0]) - scale(values[1])) < 1e-6  # of a unit of 100
        assert len(ticks) > 1
        assert all(len(tick_text(tick, ticks)) < 8 for tick in ticks)
    near = scale_over([0.3, 0.3001], 0.0, 100.0)
    assert near(0.3001) - near(0.3) > 80
