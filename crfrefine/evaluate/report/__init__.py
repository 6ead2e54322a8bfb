"""The report: `report.html`, one self-contained page on a method and its effect on each case.

`docs/reference/report.md` says how to read it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.geometry import spacing_of
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.evaluate.pairing import CasePair
from crfrefine.evaluate.reading import Reference, read_image, read_masks, read_reference
from crfrefine.evaluate.report.charts import Chart, draw_charts
from crfrefine.evaluate.report.numbers import Report, ShownCase
from crfrefine.evaluate.results import Evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.registry import DICE, metric_named
from crfrefine.runs.pictures.preview import draw_preview
from crfrefine.statistics.comparison import HARM_COLUMN, describe_families, format_p, harm_text
from crfrefine.version import __version__

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32

Tell = Callable[[Note], None]
Progress = Callable[[str, int, int], None]


def write_report(
    path: Path,
    evaluation: Evaluation,
    tell: Tell,
    *,
    num_shown: int = 3,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the page whole or not at all; a case whose volumes cannot be read is named on it.

    `tell` is called with a note on each missing part, such as charts without matplotlib. At
    most `num_shown` cases each are shown with the lowest, median and highest difference. Before a
    case is drawn, `progress` gets its name and the numbers of cases done and to draw.
    """
    report = Report(evaluation)
    modalities = _modality_names(evaluation, tell)

    charts: list[Chart] = []
    problem = ""
    try:
        charts = draw_charts(report)
    except BackendUnavailableError as error:
        problem = str(error)

    drawn_cases = []
    shown_cases = report.shown_cases(num_shown)
    for number, shown in enumerate(shown_cases):
        progress(shown.case, number, len(shown_cases))
        try:
            drawn = shown._replace(png=draw_case(report, shown, modalities, tell))
        except CrfRefineError as error:
            drawn = shown._replace(problem=str(error))
        drawn_cases.append(drawn)

    page = _render(report, charts, problem, drawn_cases)
    write_small_file(path, page.encode("utf-8", "backslashreplace"))
    if problem:
        tell(Note.of(NoteKind.NO_CHARTS, problem=problem))


# The pictures.


def draw_case(report: Report, shown: ShownCase, modalities: Sequence[str], tell: Tell) -> bytes:
    """Read a case and draw the changes by the judged method, or its errors without a baseline.

    An image that cannot be read is noted, and left out.
    """
    evaluation = report.evaluation
    pair = next(pair for pair in evaluation.pairs if pair.case_id == shown.case)
    reference = read_reference(pair, evaluation.measured, [], [])
    channels, names = _read_images(pair, reference, pair.reference.modalities or modalities, tell)
    image = np.stack(channels) if channels else None
    maps = []
    for method in report.compared:
        masks = read_masks(method, pair.methods[method], reference, [])
        maps.append(np.atleast_3d(masks.label_map))

    label_names = {}
    for region, labels in evaluation.regions.items():
        if len(labels) == 1:
            label_names[labels[0]] = report.region_title(region)
    truth = np.atleast_3d(reference.volume.data)
    before = truth
    before_name = "reference"
    panel: Array | None = None
    if report.baseline is not None:
        before = maps[0]
        before_name = report.baseline
        panel = truth

    return draw_preview(
        image,
        before,
        maps[-1],
        spacing_of(reference.volume.affine),
        affine=reference.volume.affine,
        title=printable(shown.case),
        subtitle=f"{DICE.title} {_typeset(_dice_text(shown))}",
        label_names=label_names,
        modality_names=tuple(names),
        before_name=before_name,
        after_name=report.compared[-1],
        reference=panel,
        shows_errors=report.baseline is None,
    )


def _modality_names(evaluation: Evaluation, tell: Tell) -> tuple[str, ...]:
    """Return the names of the modalities in a `dataset.json` beside the images or the reference."""
    options = evaluation.options
    if options.images is None:
        return ()
    problems: list[Note] = []
    descriptions = read_descriptions([options.images, options.labels], problems)
    description = next(descriptions, DatasetDescription(options.images))
    for problem in problems:
        if problem not in evaluation.notes:
            tell(problem)
    return description.channel_names


def _read_images(
    pair: CasePair, reference: Reference, modalities: Sequence[str], tell: Tell
) -> tuple[list[Float32], list[str]]:
    """Return the modalities of a case, each (x, y, z), and their names."""
    channels: list[Float32] = []
    names: list[str] = []
    for number, path in enumerate(pair.reference.images):
        try:
            image = read_image(path, reference)
        except (CrfRefineError, OSError) as error:
            missing = "its image" if len(pair.reference.images) == 1 else path.name
            problem = str(error)
            kind = NoteKind.SHOWN_WITHOUT
            tell(Note.of(kind, case=pair.case_id, missing=missing, problem=problem))
            continue
        # A single file may hold all modalities.
        for modality, channel in enumerate(image, start=number):
            channels.append(np.atleast_3d(channel))
            name = f"modality {modality + 1}"
            if modality < len(modalities):
                name = modalities[modality]
            names.append(name)
    return channels, names


def _dice_text(shown: ShownCase) -> str:
    """Return the Dice of a case, such as "0.8123", or "0.8123 to 0.8311 (+1.88 points)"."""
    text = " to ".join(map(DICE.value_text, shown.values.tolist()))
    if len(shown.values) == 1:
        return text
    difference = DICE.difference_text(shown.values[1] - shown.values[0])
    return f"{text} ({difference} {DICE.difference_unit})"


# The page.

# Letters that reverse the following text of a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELLED = {letter: f"\\u{letter:04x}" for letter in _DIRECTIONS}


def _render(
    report: Report, charts: Sequence[Chart], problem: str, drawn_cases: Sequence[ShownCase]
) -> str:
    """Fill the page template, which escapes everything; `problem` says why there are no charts."""
    import jinja2

    evaluation = report.evaluation
    method = report.compared[-1]
    others = [name for name in evaluation.table.methods if name not in report.compared]
    lead = report.lead_region
    unsigned = []  # titles of the metrics that are compared by size, without their sign
    for metric in map(metric_named, evaluation.table.metrics):
        if metric.better == "nearer_zero":
            unsigned.append(metric.title)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_spell_directions,
        loader=jinja2.PackageLoader("crfrefine.evaluate.report", "assets"),
    )
    environment.filters["typeset"] = _typeset
    return environment.get_template("page.html").render(
        version=__version__,
        dice=DICE,
        metric_named=metric_named,
        format_p=format_p,
        harm_text=harm_text,
        harm_column=HARM_COLUMN.capitalize(),
        url=_data_url,
        report=report,
        evaluation=evaluation,
        options=evaluation.options,
        method=method,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        families=describe_families(evaluation.summary),
        unsigned=unsigned,
        lines={name: report.summary_lines(name) for name in (method, *others)},
        charts=charts,
        problem=problem,
        drawn_cases=drawn_cases,
        lead="" if lead is None else report.region_title(lead),
    )


def _spell_directions(value: object) -> object:
    """Return a text with its letters of direction spelled out, and any other value as it is."""
    if type(value) is str:  # Finished markup is a subclass.
        return value.translate(_SPELLED)
    return value


def _typeset(text: str) -> str:
    """Return a number with a true minus, and a dash for an undefined one."""
    return text.replace("-", "\u2212") or "–"


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
