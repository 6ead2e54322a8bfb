"""The report: one self-contained page, `report.html`, with the effect of a method on each case (`docs/reference/report.md`)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import crfrefine
from crfrefine.base.geometry import spacing_of
from crfrefine.base.text import printable
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.evaluate.measuring import read_image, read_masks, read_reference
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.registry import DICE, Metric, metric_named
from crfrefine.runs.cases.dataset_description import read_descriptions
from crfrefine.runs.pictures.drawing import drawable
from crfrefine.runs.pictures.preview import draw_preview
from crfrefine.statistics.comparison import (
    HARM_COLUMN,
    MEAN,
    SummaryRow,
    describe_families,
    format_p,
    harm_text,
)
from crfrefine.statistics.paired import bootstrap_interval
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from crfrefine.base.array_types import Float32, Float64

Progress = Callable[[str, int, int], None]


class ShownCase(NamedTuple):
    """A case with a picture on the page."""

    case: str
    # "lowest", "median" or "highest", by the difference in Dice, or by Dice without a baseline.
    place: str
    values: Float64  # Its Dice with the baseline, if there is one, and with the judged method.


class Report(NamedTuple):
    """The numbers of an evaluation as the page shows them."""

    evaluation: Evaluation

    @property
    def baseline(self) -> str | None:
        """The method that the judged one is compared with.

        None if the page shows only the judged one.
        """
        if self.evaluation.verdict is None:
            return None
        return self.evaluation.options.baseline

    @property
    def compared(self) -> list[str]:
        """The baseline, if there is one, and the judged method."""
        return [*([] if self.baseline is None else [self.baseline]), self.evaluation.options.name]

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        if region == MEAN:
            return "mean over regions"
        return self.evaluation.titles.get(region, region)

    def regions_of(self, metric: str) -> tuple[str, ...]:
        """Return the regions with a value of a metric: first the mean over regions, or the only judged region."""
        table = self.evaluation.table
        means = self.evaluation.judged_regions
        if metric not in table.metrics:
            return ()
        measured = [
            r
            for r in table.regions
            if any(not np.isnan(table.values(method, r, metric)).all() for method in self.compared)
        ]
        if len(means) == 1:
            return tuple(sorted(measured, key=lambda region: region not in means))
        return (*((MEAN,) if set(means) & set(measured) else ()), *measured)

    def pairs(self, region: str) -> tuple[tuple[str, ...], Float64]:
        """Return (n) cases and (methods, n) Dice of the compared methods: cases that all have."""
        values = self.evaluation.table.compared(
            self.compared, region, ENDPOINT, self.evaluation.judged_regions
        )
        kept = np.flatnonzero(~np.isnan(values).any(axis=0))
        return tuple(self.evaluation.table.cases[index] for index in kept), values[:, kept]

    def shown_cases(self, num_each: int) -> list[ShownCase]:
        """Return the cases with the lowest, median and highest difference in Dice, or Dice without a baseline; each once."""
        regions = self.regions_of(ENDPOINT)
        if not regions:
            return []
        cases, values = self.pairs(regions[0])
        order = np.argsort(
            values[-1] if self.baseline is None else values[-1] - values[0], kind="stable"
        ).tolist()
        each = min(num_each, -(-len(order) // 3))
        middle = order[each:-each]
        first = max(0, (len(middle) - each) // 2)
        groups = {
            "lowest": order[:each],
            "median": middle[first : first + each],
            "highest": order[each:][: -each - 1 : -1],
        }
        return [
            ShownCase(cases[index], place, values[:, index])
            for place, indices in groups.items()
            for index in indices
        ]

    def summary_lines(
        self, method: str
    ) -> Iterator[tuple[SummaryRow, Metric, bool, float, float, int]]:
        """Yield row, metric, whether the region represents the metric, both means and the number of cases that both methods have."""
        rows = [
            row
            for row in self.evaluation.summary
            if row.method == method and (row.num_values or row.comparison is not None)
        ]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        leads = {metric: self.regions_of(metric)[:1] for metric in metrics}
        for row in sorted(
            rows, key=lambda row: (metrics.index(row.metric), (row.region,) != leads[row.metric])
        ):
            before = math.nan
            after = row.mean
            count = row.num_values
            if self.baseline is not None:
                values = self.evaluation.table.compared(
                    [self.baseline, method], row.region, row.metric, self.evaluation.judged_regions
                )
                values = values[:, ~np.isnan(values).any(axis=0)]
                count = values.shape[1]
                before, after = values.mean(axis=1).tolist() if count else (math.nan, row.mean)
            yield (
                row,
                metric_named(row.metric),
                (row.region,) == leads[row.metric],
                before,
                after,
                count,
            )


# The three charts, of the Dice of each case; matplotlib is imported when they are drawn.

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


# The page.


def write_report(
    path: Path,
    evaluation: Evaluation,
    note: Callable[[str], None],
    *,
    num_shown: int = 3,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the report atomically.

    `note` is called with a sentence about each missing part, such as charts without matplotlib.

    At most `num_shown` cases each are shown with the lowest, median and highest difference; before
    each is drawn, `progress` is called with its name, the number of cases done, and of those to
    draw. A case whose volumes cannot be read is named on the page.
    """
    report = Report(evaluation)
    options = evaluation.options
    texts: list[str] = []
    if options.images is None:
        description = None
    else:
        description = next(read_descriptions([options.images, options.labels], texts), None)
    for text in texts:
        if text not in evaluation.notes:
            note(text)
    charts = []
    problem = ""
    try:
        charts = draw_charts(report)
    except BackendUnavailableError as error:
        problem = str(error)
    pictures = []
    chosen = report.shown_cases(num_shown)
    for number, shown in enumerate(chosen):
        progress(shown.case, number, len(chosen))
        try:
            pictures.append(
                (
                    shown,
                    draw_case(
                        report,
                        shown,
                        () if description is None else description.channel_names,
                        note,
                    ),
                    "",
                )
            )
        except CrfRefineError as error:
            pictures.append((shown, b"", str(error)))
    write_small_file(
        path, _render(report, charts, problem, pictures).encode("utf-8", "backslashreplace")
    )
    if problem:
        note(problem)


def draw_case(
    report: Report, shown: ShownCase, modalities: Sequence[str], note: Callable[[str], None]
) -> bytes:
    """Read and draw a case; without a baseline, its errors.

    An image that cannot be read is noted, and left out.
    """
    evaluation = report.evaluation
    settings = report.evaluation.settings
    pair = next(pair for pair in evaluation.pairs if pair.case_id == shown.case)
    reference = read_reference(pair, settings, [])
    channels: list[Float32] = []
    names: list[str] = []
    for number, path in enumerate(pair.images):
        try:
            image = read_image(path, reference)
        except (CrfRefineError, OSError) as error:
            note(
                f"case {shown.case!r}: shown without {'its image' if len(pair.images) == 1 else path.name}: {error}"
            )
            continue
        first = len(channels) if len(pair.images) == 1 else number
        names += [
            modalities[place] if place < len(modalities) else f"modality {place + 1}"
            for place in range(first, first + len(image))
        ]
        channels += [np.atleast_3d(channel) for channel in image]
    affine = reference.volume.affine
    truth = np.atleast_3d(reference.volume.data)
    maps = [
        np.atleast_3d(read_masks(pair.methods[name], reference, settings.channels[name], [])[0])
        for name in report.compared
    ]
    text = " to ".join(map(DICE.value_text, shown.values.tolist()))
    if report.baseline is not None:
        text += (
            f" ({DICE.difference_text(shown.values[1] - shown.values[0])} {DICE.difference_unit})"
        )
    return draw_preview(
        np.stack(channels) if channels else None,
        truth if report.baseline is None else maps[0],
        maps[-1],
        spacing_of(affine),
        affine=affine,
        title=printable(shown.case),
        subtitle=f"{DICE.title} {_typeset(text)}",
        label_names={
            labels[0]: report.region_title(region)
            for region, labels in evaluation.regions.items()
            if len(labels) == 1
        },
        modality_names=tuple(names),
        before_name=report.baseline or "reference",
        after_name=report.compared[-1],
        reference=None if report.baseline is None else truth,
        shows_errors=report.baseline is None,
    )


# Letters that reverse the following text of a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = {
    letter: f"\\u{letter:04x}"
    for letter in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def _render(
    report: Report,
    charts: Sequence[tuple[str, bytes]],
    problem: str,
    pictures: Sequence[tuple[ShownCase, bytes, str]],
) -> str:
    """Fill the page template, which escapes everything.

    `problem` is why there are no charts, a case has a PNG or the reason why not.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(_DIRECTIONS) if type(value) is str else value,
        loader=jinja2.FunctionLoader(
            lambda name: (files("crfrefine.evaluate.report") / "assets" / name).read_text(
                encoding="utf-8"
            )
        ),
    )
    environment.filters["typeset"] = _typeset
    evaluation = report.evaluation
    method = report.compared[-1]
    methods = [method, *(name for name in evaluation.table.methods if name not in report.compared)]
    return environment.get_template("page.html").render(
        report=report,
        evaluation=evaluation,
        options=evaluation.options,
        method=method,
        version=crfrefine.__version__,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        families=describe_families(evaluation.summary),
        unsigned=[
            metric.title
            for metric in map(metric_named, evaluation.table.metrics)
            if metric.better == "nearer_zero"
        ],
        lines={name: list(report.summary_lines(name)) for name in methods},
        charts=charts,
        problem=problem,
        pictures=pictures,
        lead="".join(map(report.region_title, report.regions_of(ENDPOINT)[:1])),
        dice=DICE,
        metric_named=metric_named,
        format_p=format_p,
        harm_text=harm_text,
        harm_column=HARM_COLUMN.capitalize(),
        url=lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
    )


def _typeset(text: str) -> str:
    """Return a number with a true minus, and a dash for an undefined one."""
    return text.replace("-", "\u2212") or "–"
