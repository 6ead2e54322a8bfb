"""The charts of the page, of the Dice of each case; matplotlib is imported when they are drawn."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.colors import OUTCOME_COLORS
from crfrefine.errors import BackendUnavailableError
from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.evaluate.report.numbers import region_title
from crfrefine.metrics.registry import DICE
from crfrefine.pictures.drawing import drawable
from crfrefine.statistics.paired import bootstrap_interval
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from crfrefine.base.array_types import Float64

MAX_REGIONS = 20  # Most regions in a chart.
MAX_LETTERS = 24  # Most letters of a name beside an axis.
_HEIGHT = 3.4  # Height of a chart in inches.

# How better, equal and worse cases are drawn, by the sign of their gain.
_MARKERS = {1: "^", 0: "o", -1: "v"}
_LINES = {1: "-", 0: ":", -1: "--"}
_ZERO_LINE: dict[str, Any] = {"color": "#8a939c", "linestyle": ":", "linewidth": 1}
_MEAN_MARK: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 6}


def draw_charts(
    evaluation: Evaluation, dice: Mapping[str, tuple[Sequence[str], Float64]]
) -> dict[str, bytes]:
    """Return the charts by title, as PNG: of both methods, of their agreement, of each region.

    `dice` is that of `dice_by_region`. Without a verdict, only the last is drawn. Raise
    BackendUnavailableError without matplotlib.
    """
    regions = {region: values for region, (cases, values) in dice.items() if cases}
    charts: dict[str, bytes] = {}
    if not regions:
        return charts
    if evaluation.verdict is not None:
        values = next(iter(regions.values()))
        with _chart(charts, "Before and after") as axes:
            x = np.repeat([[0.0], [1.0]], values.shape[1], axis=1)
            _add_cases(axes, x, values, values[1] - values[0], has_lines=True)
            axes.plot([-0.06, 1.06], values.mean(axis=1), linestyle="", **_MEAN_MARK)
            axes.set_xticks([0, 1], [_short(method) for method in evaluation.compared])
            axes.set_xlim(-0.3, 1.3)
            axes.set_ylabel(DICE.title)
        with _chart(charts, "Agreement (Bland-Altman)") as axes:
            _draw_agreement(axes, values)
    shown = dict(itertools.islice(regions.items(), MAX_REGIONS))
    title = "Each region"
    if len(shown) < len(regions):
        title = f"The first {MAX_REGIONS} of {len(regions)} regions"
    with _chart(charts, title, max(_HEIGHT, 0.8 + 0.4 * len(shown))) as axes:
        _draw_regions(axes, evaluation, shown)
    return charts


@contextmanager
def _chart(charts: dict[str, bytes], title: str, height: float = _HEIGHT) -> Generator[Axes]:
    """Add a chart to others, as the contents of a PNG file: what is drawn on the axes.

    Raise BackendUnavailableError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"matplotlib is missing ({error}): pip install 'crfrefine[report]'"
        ) from error
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(4.6, height), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    charts[title] = buffer.getvalue()


def draw_lesions(evaluation: Evaluation) -> bytes:
    """Return a chart of the lesions of the judged regions by their volume, as PNG.

    It has the number of lesions that each compared method finds, and of its false ones. Raise
    BackendUnavailableError without matplotlib.
    """
    volumes: dict[tuple[str, str], list[float]] = {}
    for result in evaluation.results:
        if result.case_id not in evaluation.table.cases:
            continue
        for method in evaluation.compared:
            for lesion in result.lesions.get(method, ()):
                if lesion.region in evaluation.judged_regions:
                    volumes.setdefault((method, lesion.outcome), []).append(lesion.volume_ml)
    # Two classes of volumes for each power of ten.
    halves = 2 * np.log10([*itertools.chain(*volumes.values())] or [1.0])
    edges = 10.0 ** (np.arange(math.floor(halves.min()), math.floor(halves.max()) + 2) / 2)
    chart: dict[str, bytes] = {}
    with _chart(chart, "") as axes:
        for method in evaluation.compared:
            style: dict[str, Any] = {"color": OUTCOME_COLORS[0], "linewidth": 2.5, "alpha": 0.6}
            if method == evaluation.options.name:
                style = {"color": OUTCOME_COLORS[1], "linewidth": 1.2}
            for outcome, line in (("found", "-"), ("false", "--")):
                label = _short(f"{outcome}, {method}")
                shown = np.clip(volumes.get((method, outcome), []), edges[0], edges[-1])
                axes.hist(
                    shown, edges.tolist(), histtype="step", linestyle=line, label=label, **style
                )
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("volume (ml)")
        axes.set_ylabel("number of lesions")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return chart[""]


def _draw_agreement(axes: Axes, values: Float64) -> None:
    """Draw the difference of each case over the mean of its two values.

    Source: Bland & Altman 1986, Lancet 327 (8476), 307-310.
    """
    differences = DICE.difference_factor * (values[1] - values[0])
    _add_cases(axes, values.mean(axis=0), differences, values[1] - values[0])
    mean = differences.mean()
    axes.axhline(mean, color="black", linewidth=1)
    if len(differences) > 1:
        reach = 1.96 * differences.std(ddof=1)
        axes.axhline(mean - reach, color="black", linestyle="--", linewidth=1)
        axes.axhline(mean + reach, color="black", linestyle="--", linewidth=1)
    axes.axhline(0, **_ZERO_LINE)
    axes.set_xlabel(f"mean {DICE.title} of both")
    axes.set_ylabel(f"difference ({DICE.difference_unit})")


def _draw_regions(axes: Axes, evaluation: Evaluation, regions: Mapping[str, Float64]) -> None:
    """Draw a row per region: the difference of each case, or its value without a baseline.

    Each row has the mean and its interval, as in the summary.
    """
    is_paired = evaluation.verdict is not None
    factor = DICE.difference_factor if is_paired else 1.0
    summarized = {}
    judged = evaluation.options.name
    for line in evaluation.summary:
        if (line.method, line.metric) == (judged, ENDPOINT) and line.comparison is not None:
            summarized[line.region] = line.comparison.interval

    for row, (region, dice) in enumerate(regions.items()):
        if is_paired:
            values = dice[1] - dice[0]
            gains = values
        else:
            values = dice[0]
            gains = np.zeros_like(values)
        # The golden section puts the marks of neighbors far apart.
        heights = 0.55 * (np.arange(len(values), dtype=np.float64) * 0.618 % 1 - 0.5)
        _add_cases(axes, factor * values, row + heights, gains)
        interval = summarized.get(region)
        if interval is None:
            interval = bootstrap_interval(values)
        axes.plot(factor * np.array(interval), [row, row], color="black", linewidth=2)
        axes.plot([factor * values.mean()], [row], **_MEAN_MARK)

    axes.set_xlabel(DICE.title)
    if is_paired:
        axes.axvline(0, **_ZERO_LINE)
        axes.set_xlabel(f"difference in {DICE.title} ({DICE.difference_unit})")
    titles = [_short(region_title(evaluation, region)) for region in regions]
    axes.set_yticks(range(len(regions)), titles)
    axes.set_ylim(len(regions) - 0.5, -0.5)


def _add_cases(
    axes: Axes, x: Float64, y: Float64, gains: Float64, *, has_lines: bool = False
) -> None:
    """Draw each case as a mark, or as a line between two marks: better, equal or worse."""
    signs = np.sign(np.round(gains, 12))  # Smaller differences are rounding errors.
    for sign in OUTCOME_COLORS:
        chosen = signs == sign
        axes.plot(
            x[..., chosen],
            y[..., chosen],
            color=OUTCOME_COLORS[sign],
            marker=_MARKERS[sign],
            linestyle=_LINES[sign] if has_lines else "",
            linewidth=0.8,
            markersize=3.5,
            alpha=0.7,
        )


def _short(name: str) -> str:
    """Return a name that has room beside an axis."""
    if len(name) > MAX_LETTERS:
        name = f"{name[: MAX_LETTERS - 1]}…"
    return drawable(name)
