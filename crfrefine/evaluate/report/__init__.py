"""The report: `report.html`, one self-contained page on a method and its effect on each case.

`docs/reference/report.md` says how to read it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import crfrefine
from crfrefine.base.geometry import spacing_of
from crfrefine.base.text import printable
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.evaluate.measuring import read_image, read_masks, read_reference
from crfrefine.evaluate.report.charts import draw_charts
from crfrefine.evaluate.report.numbers import Report, ShownCase
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.registry import DICE, metric_named
from crfrefine.runs.cases.dataset_description import read_descriptions
from crfrefine.runs.pictures.preview import draw_preview
from crfrefine.statistics.comparison import HARM_COLUMN, describe_families, format_p, harm_text
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from crfrefine.base.array_types import Float32

Progress = Callable[[str, int, int], None]


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
