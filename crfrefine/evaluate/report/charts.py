"""The charts of the page, of the Dice of each case; matplotlib is imported when they are drawn."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import BackendUnavailableError
from crfrefine.evaluate.report.numbers import Report
from crfrefine.metrics.registry import DICE
from crfrefine.runs.pictures.drawing import drawable
from crfrefine.statistics.paired import bootstrap_interval
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from crfrefine.base.array_types import Float64

MAX_REGIONS = 20  # In the chart of differences.
# Color, mark and line of better, equal and worse cases.
_STYLES = {1: ("#00649c", "^", "-"), 0: ("#5c656e", "o", ":"), -1: ("#a84300", "v", "--")}
_ZERO: dict[str, Any] = {"color": "#8a939c", "linestyle": ":", "linewidth": 1}


def draw_charts(report: Report) -> list[tuple[str, bytes]]:
    """Return title and PNG of each chart, without a baseline only that of the values.

    BackendUnavailableError without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"the report has no charts, which need matplotlib ({error}): pip install 'crfrefine[report]'"
        raise BackendUnavailableError(message) from error
    regions = [region for region in report.regions_of(ENDPOINT) if report.pairs(region)[0]]
    if not regions:
        return []
    values = report.pairs(regions[0])[1]
    if len(regions) <= MAX_REGIONS:
        last = "Each region"
    else:
        last = f"The first {MAX_REGIONS} of {len(regions)} regions"
    plots = {last: partial(_draw_regions, report=report, regions=regions[:MAX_REGIONS])}
    if report.baseline is not None:
        paired = partial(_draw_pairs, values=values, methods=report.compared)
        plots = {
            "Before and after": paired,
            "Agreement (Bland-Altman)": partial(_draw_agreement, values=values),
        } | plots
    charts = []
    with mpl.rc_context({"text.parse_math": False, "font.size": 9}):
        for title, plot in plots.items():
            height = max(3.4, 0.8 + 0.4 * min(len(regions), MAX_REGIONS)) if title == last else 3.4
            figure = Figure(figsize=(4.6, height), dpi=150, layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            plot(axes)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            charts.append((title, buffer.getvalue()))
    return charts


def _draw_pairs(axes: Axes, values: Float64, methods: list[str]) -> None:
    _add_cases(
        axes,
        np.repeat([[0.0], [1.0]], values.shape[1], axis=1),
        values,
        values[1] - values[0],
        has_lines=True,
    )
    axes.plot(
        [-0.06, 1.06], values.mean(axis=1), color="black", linestyle="", marker="D", markersize=6
    )
    axes.set_xticks([0, 1], [_short(method) for method in methods])
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylabel(DICE.title)


def _draw_agreement(axes: Axes, values: Float64) -> None:
    """Draw each case's difference over the mean of its two values (Bland & Altman 1986, Lancet 327 (8476), 307-310)."""
    differences = DICE.difference_factor * (values[1] - values[0])
    _add_cases(axes, values.mean(axis=0), differences, values[1] - values[0])
    axes.axhline(differences.mean(), color="black", linewidth=1)
    if len(differences) > 1:
        for limit in (-1.96, 1.96):
            axes.axhline(
                differences.mean() + limit * differences.std(ddof=1),
                color="black",
                linestyle="--",
                linewidth=1,
            )
    axes.axhline(0, **_ZERO)
    axes.set_xlabel(f"mean {DICE.title} of both")
    axes.set_ylabel(f"difference ({DICE.difference_unit})")


def _draw_regions(axes: Axes, report: Report, regions: list[str]) -> None:
    """Draw a row of marks per region, with the mean and its interval as in the summary."""
    judged = (report.compared[-1], ENDPOINT)
    comparisons = {
        row.region: row.comparison
        for row in report.evaluation.summary
        if (row.method, row.metric) == judged
    }
    is_paired = report.baseline is not None
    factor = DICE.difference_factor if is_paired else 1.0
    for row, region in enumerate(regions):
        values = report.pairs(region)[1]
        shown = values[1] - values[0] if is_paired else values[0]
        # The golden section puts neighbors far apart.
        spread = 0.55 * (np.arange(len(shown)) * 0.618 % 1 - 0.5)
        _add_cases(
            axes,
            factor * shown,
            np.asarray(row + spread, np.float64),
            shown if is_paired else 0 * shown,
        )
        comparison = comparisons.get(region)
        interval = bootstrap_interval(shown) if comparison is None else comparison.interval
        axes.plot(factor * np.array(interval), [row, row], color="black", linewidth=2)
        axes.plot([factor * shown.mean()], [row], color="black", marker="D", markersize=6)
    if is_paired:
        axes.axvline(0, **_ZERO)
    axes.set_yticks(
        range(len(regions)), [_short(report.region_title(region)) for region in regions]
    )
    axes.set_ylim(len(regions) - 0.5, -0.5)
    axes.set_xlabel(
        f"difference in {DICE.title} ({DICE.difference_unit})" if is_paired else DICE.title
    )


def _add_cases(
    axes: Axes, x: Float64, y: Float64, differences: Float64, *, has_lines: bool = False
) -> None:
    """Draw a mark, or a line between two marks, per case, in the style of better, equal or worse."""
    gains = np.sign(np.round(differences, 12))  # Smaller differences are rounding errors.
    for gain, (color, mark, line) in _STYLES.items():
        style: dict[str, Any] = {
            "color": color,
            "marker": mark,
            "linestyle": line if has_lines else "",
        }
        axes.plot(
            x[..., gains == gain],
            y[..., gains == gain],
            **style,
            linewidth=0.8,
            markersize=3.5,
            alpha=0.7,
        )


def _short(name: str) -> str:
    return drawable(name if len(name) <= 24 else f"{name[:23]}…")
