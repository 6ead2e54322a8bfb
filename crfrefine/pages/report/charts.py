"""Charts of two methods on the same cases (paired lines, Bland-Altman, differences), and of the values of one method.

Better, worse and equal differ in color, mark shape and line style. With many cases, the marks of one kind become one path without
tooltips; with very many, only some are drawn, always including the extremes. The page stays small, and says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.pages.report.pairs import Pairs
from crfrefine.pages.report.svg import Plot, Scale, element, round_ticks, scale_over, short
from crfrefine.pages.report.wording import Wording
from crfrefine.statistics.paired import bootstrap_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_MARKS = 150
"""Largest number of cases with one mark and tooltip per case."""

MOST_DRAWN = 300
"""Largest number of cases that are all drawn."""

_KINDS = {1: "better", -1: "worse", 0: "equal"}


def drawn_cases(pairs: Pairs) -> NDArray[np.intp]:
    """Return the cases to draw, ordered by difference: all, or an evenly spaced subset with both ends."""
    order = np.argsort(pairs.differences, kind="stable")
    if len(order) <= MOST_DRAWN:
        return order
    return order[np.unique(np.linspace(0, len(order) - 1, MOST_DRAWN).round().astype(np.intp))]


def paired_plot(name: str, pairs: Pairs, wording: Wording, before: str, after: str) -> str:
    """Draw each case as a line from before to after."""
    earlier = pairs.before
    assert earlier is not None
    plot = Plot(name, f"{wording.metric.title}, each case from before to after", _count_text(pairs, after))
    left, right, top, bottom = plot.inner
    scale = scale_over([float(value) for values in (earlier, pairs.after) for value in values], bottom, top)
    plot.y_axis(scale, wording.axis)
    x_before, x_after = left + 0.2 * (right - left), left + 0.8 * (right - left)
    alone = len(pairs.cases) <= MOST_MARKS

    def draw(index: int, gain: int) -> tuple[str, str]:
        start, end = scale(float(earlier[index])), scale(float(pairs.after[index]))
        mark = (_mark(x_before, start, 0) if alone else "") + _mark(x_after, end, gain)
        return f"M{short(x_before)} {short(start)}L{short(x_after)} {short(end)}", mark

    _add_cases(plot, pairs, wording, draw)
    for x, values, where, method in ((x_before, earlier, -1, before), (x_after, pairs.after, 1, after)):
        mean = float(values.mean())
        tip = element("title", escape(f"mean {wording.quantity(mean)}"))
        plot.add(element("path", tip, d=f"M{short(x + 14 * where)} {short(scale(mean))}l{8 * where} -5v10z", class_="mean"))
        plot.text(x, bottom + 18, _clipped(method, 24), anchor="middle", class_="tick")
        plot.text(x, bottom + 34, f"mean {wording.number(mean)}", anchor="middle", class_="tick")
    return plot.markup()


def bland_altman_plot(name: str, pairs: Pairs, wording: Wording) -> str:
    """Draw each case's difference over the mean of its two values, with the mean difference and the limits of agreement.

    Source:
        Bland & Altman 1986, Lancet 327 (8476), 307-310.
    """
    assert pairs.before is not None
    factor = wording.metric.difference_factor
    differences = factor * pairs.differences
    means = (pairs.before + pairs.after) / 2
    bias = float(differences.mean())
    levels = {"mean": bias}
    if len(differences) > 1:
        spread = 1.96 * float(differences.std(ddof=1))
        levels |= {"+1.96 SD": bias + spread, "\u22121.96 SD": bias - spread}
    said = "; ".join(f"{label}: {wording.change_quantity(level / factor)}" for label, level in levels.items())
    plot = Plot(name, f"{wording.metric.title}, Bland-Altman: difference over mean", said, right=64)
    left, right, top, bottom = plot.inner
    x, y = scale_over(list(means), left, right), scale_over([*differences, *levels.values(), 0.0], bottom, top)
    plot.y_axis(y, wording.difference_axis)
    plot.x_axis(x, f"Mean of both ({wording.metric.unit})" if wording.metric.unit else "Mean of both")
    plot.add(element("path", d=f"M{short(left)} {short(y(0.0))}H{short(right)}", class_="zero"))
    _add_points(plot, pairs, wording, [x(float(value)) for value in means], [y(float(value)) for value in differences])
    for (label, level), place in zip(levels.items(), _apart([y(level) for level in levels.values()], 24), strict=True):
        class_ = "level" if label == "mean" else "level limit"
        plot.add(element("path", d=f"M{short(left)} {short(y(level))}H{short(right)}", class_=class_))
        plot.text(right + 4, place - 1, label, class_="tick")
        plot.text(right + 4, place + 11, wording.change(level / factor), class_="tick strong")
    return plot.markup()


def difference_plot(
    name: str, pairs: Pairs, wording: Wording, mean: float | None = None, interval: tuple[float, float] | None = None
) -> str:
    """Draw the distribution of the differences as stacked dots; without a baseline, of the values.

    Mean and interval are those of a comparison, by default of the values.
    """
    is_difference = pairs.before is not None
    factor = wording.metric.difference_factor if is_difference else 1.0
    number, quantity = (wording.change, wording.change_quantity) if is_difference else (wording.number, wording.quantity)
    values = pairs.differences
    mean = float(values.mean()) if mean is None else mean
    low, high = interval if interval is not None else bootstrap_interval(values)
    what = "differences" if is_difference else "values"
    said = f"mean {quantity(mean)}"
    has_interval = not np.isnan(low)
    if has_interval:
        said += f", 95 % CI {number(low)} to {number(high)}"
    plot = Plot(name, f"{wording.metric.title}, distribution of the {what}", said, left=36)
    left, right, top, bottom = plot.inner
    shown = [factor * float(value) for value in values] + [factor * mean] + [factor * end for end in (low, high) if has_interval]
    x = scale_over([*shown, 0.0] if is_difference else shown, left, right)
    plot.x_axis(x, wording.difference_axis if is_difference else wording.axis)
    if is_difference:
        plot.add(element("path", d=f"M{short(x(0.0))} {short(top + 40)}V{short(bottom)}", class_="zero"))
        plot.text(x(0.0), top + 36, "no change", anchor="middle", class_="tick")
    _add_stacks(plot, pairs, wording, x, factor)
    y = top + 14
    if has_interval:
        ends = x(factor * low), x(factor * high)
        plot.add(
            element(
                "path",
                element("title", escape(said)),
                d=f"M{short(ends[0])} {short(y - 5)}v10m0 -5H{short(ends[1])}m0 -5v10",
                class_="interval",
            )
        )
    plot.add(element("path", element("title", escape(said)), d=f"M{short(x(factor * mean))} {short(y - 6)}l6 6l-6 6l-6 -6z", class_="mean"))
    plot.text((left + right) / 2, top, said, anchor="middle", class_="tick strong")
    return plot.markup()


def _add_stacks(plot: Plot, pairs: Pairs, wording: Wording, x: Scale, factor: float) -> None:
    """Add one dot per case if they fit, else bars that count them."""
    left, right, top, bottom = plot.inner
    values = pairs.differences
    room = bottom - top - 48
    if len(values) <= MOST_MARKS:
        places = [x(factor * float(value)) for value in values]
        size = 9.0
        while (levels := _stacked(places, size)) and size * (max(levels) + 1) > room and size > 3:
            size *= 0.9
        _add_points(plot, pairs, wording, places, [bottom - size * (level + 0.5) for level in levels], size=size / 9.0)
        return
    metric = wording.metric
    number, unit = (wording.number, metric.unit) if pairs.before is None else (wording.change, metric.difference_unit)
    # Zero is an edge: no bar mixes gains and losses.
    step = round_ticks(x.low, x.high, 30)
    width_of_bin = step[1] - step[0]
    edges = np.arange(np.floor(x.low / width_of_bin), np.ceil(x.high / width_of_bin) + 1) * width_of_bin
    num_bins = len(edges) - 1
    bins = np.clip(np.searchsorted(edges, factor * values, side="right") - 1, 0, num_bins - 1)
    tallest = int(np.bincount(bins, minlength=num_bins).max())
    for place in range(num_bins):
        base = bottom
        start, end = (min(max(x(float(edge)), left), right) for edge in edges[place : place + 2])
        for gain in (1, 0, -1):
            count = int(((bins == place) & (pairs.gains == gain)).sum())
            if not count:
                continue
            height = room * count / tallest
            low, high = (number(float(edge) / factor) for edge in edges[place : place + 2])
            tip = f"{count} {'case' if count == 1 else 'cases'}, {low} to {high} {unit}".rstrip()
            title = element("title", escape(f"{tip}: {_KINDS[gain]}" if pairs.before is not None else tip))
            width = max(end - start - 1, 0.5)
            class_ = f"bar {_KINDS[gain]}"
            plot.add(element("rect", title, x=start + 0.5, y=base - height, width=width, height=height, class_=class_))
            base -= height


def _stacked(places: list[float], size: float) -> list[int]:
    """Return a level for each mark: the lowest one where it covers none of the earlier marks."""
    levels = [0] * len(places)
    last: list[float] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        level = next((level for level, end in enumerate(last) if places[index] - end >= size), len(last))
        last[level : level + 1] = [places[index]]
        levels[index] = level
    return levels


def _add_points(plot: Plot, pairs: Pairs, wording: Wording, x: list[float], y: list[float], size: float = 1.0) -> None:
    _add_cases(plot, pairs, wording, lambda index, gain: ("", _mark(x[index], y[index], gain, size)))


def _add_cases(plot: Plot, pairs: Pairs, wording: Wording, draw: Callable[[int, int], tuple[str, str]]) -> None:
    """Add the line and the mark that `draw` returns for a case and its gain: one element with a tooltip per case, or one for many."""
    drawn = [(int(pairs.gains[index]), int(index)) for index in drawn_cases(pairs)]
    for kind in (0, 1, -1):
        name = _KINDS[kind]
        cases = [(_case_tip(pairs, index, wording), *draw(index, gain)) for gain, index in drawn if gain == kind]
        if cases and len(pairs.cases) > MOST_MARKS:
            _, lines, marks = zip(*cases, strict=True)
            cases = [(f"{len(cases)} cases {name}", "".join(lines), "".join(marks))]
        for tip, line, mark in cases:
            shown = (element("path", d=line, class_="line") if line else "") + element("path", d=mark, class_="mark")
            plot.add(element("g", element("title", escape(tip)) + shown, class_=f"case {name}"))


def _mark(x: float, y: float, gain: int, size: float = 1.0) -> str:
    """Return a triangle up for better, down for worse, and a circle for neither."""
    radius = 4.2 * size
    if gain:
        tip = -radius * gain
        return f"M{short(x)} {short(y + tip)}l{short(radius)} {short(-1.7 * tip)}h{short(-2 * radius)}z"
    radius *= 0.75
    half = f"a{short(radius)} {short(radius)} 0 1 0 "
    return f"M{short(x - radius)} {short(y)}{half}{short(2 * radius)} 0{half}{short(-2 * radius)} 0z"


def _case_tip(pairs: Pairs, index: int, wording: Wording) -> str:
    after = float(pairs.after[index])
    if pairs.before is None:
        return f"{pairs.cases[index]}: {wording.quantity(after)}"
    before = float(pairs.before[index])
    return (
        f"{pairs.cases[index]}: {wording.number(before)} → {wording.quantity(after)}"
        f" ({wording.change_quantity(after - before)}), {_KINDS[int(pairs.gains[index])]}"
    )


def _count_text(pairs: Pairs, after: str) -> str:
    counts = {gain: int((pairs.gains == gain).sum()) for gain in _KINDS}
    return f"{after} is better in {counts[1]}, equal in {counts[0]} and worse in {counts[-1]} of {len(pairs.cases)} cases"


def _apart(places: list[float], distance: float) -> list[float]:
    """Move labels apart so that they do not overlap; their order stays."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for upper, lower in itertools.pairwise(order):
        moved[lower] = max(moved[lower], moved[upper] + distance)
    shift = sum(moved) / len(moved) - sum(places) / len(places)
    return [place - shift for place in moved]


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
