"""The report: `report.html`, one self-contained page on a method and its effect on each case.

`docs/reference/report.md` says how to read it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path

import jinja2
import numpy as np

from crfrefine.base.array_types import Array, Float32
from crfrefine.base.geometry import spacing_of
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.errors import BackendUnavailableError, CrfRefineError
from crfrefine.evaluate.evaluation import Evaluation, EvaluationObserver
from crfrefine.evaluate.lesion_totals import lesion_totals
from crfrefine.evaluate.predictions import read_masks
from crfrefine.evaluate.reference import Reference, read_reference
from crfrefine.evaluate.report.charts import draw_charts, draw_lesions
from crfrefine.evaluate.report.images import read_images
from crfrefine.evaluate.report.numbers import (
    ShownCase,
    dice_by_region,
    means_of,
    region_title,
    regions_of,
    rows_of,
    shown_cases,
    shown_lesions,
)
from crfrefine.evaluate.sentences import power_note, recovered_text
from crfrefine.io.writing import write_small_file
from crfrefine.metrics.registry import DICE, metric_named
from crfrefine.pictures.preview import draw_preview
from crfrefine.statistics.texts import HARM_COLUMN, describe_families, format_p, harm_text
from crfrefine.version import __version__

CaseArrays = tuple[Reference, list[Float32], list[str], list[Array]]

MAX_LESIONS = 20  # Most lost lesions with a picture.
Tell = Callable[[Note], None]


def write_report(
    path: Path,
    evaluation: Evaluation,
    observer: EvaluationObserver,
) -> None:
    """Write the page whole or not at all; a case whose volumes cannot be read is named on it.

    `observer` gets a note on each missing part, such as charts without matplotlib, and each case
    before it is drawn, with the numbers of cases done and to draw.
    """
    dice = dice_by_region(evaluation)
    charts = {}
    lesion_chart = b""
    problem = ""
    try:
        charts = draw_charts(evaluation, dice)
        if evaluation.options.lesions is not None:
            lesion_chart = draw_lesions(evaluation)
    except BackendUnavailableError as error:
        problem = str(error)

    # A case with several pictures is read once.
    read = lru_cache(maxsize=1)(partial(read_case, evaluation, observer.note))
    drawn_cases = []
    lost = shown_lesions(evaluation)
    chosen = shown_cases(evaluation, dice) + lost[:MAX_LESIONS]
    for number, shown in enumerate(chosen):
        observer.stage_changed(shown.case, "report", number, len(chosen))
        try:
            drawn = shown._replace(png=draw_case(evaluation, shown, read))
        except CrfRefineError as error:
            drawn = shown._replace(problem=str(error))
        drawn_cases.append(drawn)

    metrics = evaluation.table.metrics
    lead_of = {name: next(iter(regions_of(evaluation, name)), None) for name in metrics}
    by_size = [metric for metric in map(metric_named, metrics) if metric.better == "nearer_zero"]
    page = _PAGE.get_template("page.html").render(
        evaluation=evaluation,
        options=evaluation.options,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        families=describe_families(evaluation.summary),
        lead_of=lead_of,
        by_size=by_size,
        charts=charts,
        problem=problem,
        drawn_cases=drawn_cases,
        lost=lost,
        max_lesions=MAX_LESIONS,
        lesion_chart=lesion_chart,
    )
    page = page.translate(_SPELLED)
    write_small_file(path, page.encode("utf-8", "backslashreplace"))
    if problem:
        observer.note(NoteKind.NO_CHARTS(problem=problem))


# The pictures.


def read_case(evaluation: Evaluation, tell: Tell, case_id: str) -> CaseArrays:
    """Return the reference of a case, its modalities with their names, and compared label maps.

    An image that cannot be read is noted, and left out.
    """
    pair = next(pair for pair in evaluation.pairs if pair.case_id == case_id)
    reference = read_reference(pair, evaluation.measured)
    channels, names = read_images(pair, reference, tell)
    maps = []
    for method in evaluation.compared:
        masks = read_masks(method, pair.methods[method], reference)
        maps.append(np.atleast_3d(masks.label_map))
    return reference, channels, names, maps


def draw_case(evaluation: Evaluation, shown: ShownCase, read: Callable[[str], CaseArrays]) -> bytes:
    """Draw the changes by the judged method in a case, or its errors without a baseline."""
    reference, channels, names, maps = read(shown.case)
    image = np.stack(channels) if channels else None
    label_names = {}
    for region, labels in evaluation.regions.items():
        if len(labels) == 1:
            label_names[labels[0]] = region_title(evaluation, region)
    truth = np.atleast_3d(reference.volume.data)
    before = truth
    before_name = "reference"
    panel: Array | None = None
    if evaluation.verdict is not None:
        before = maps[0]
        before_name = evaluation.verdict.baseline
        panel = truth
    affine = reference.volume.affine
    subtitle = f"lost: {shown.place}"
    through: tuple[int, ...] | None = None
    if shown.lesion is None:
        # Such as "Dice 0.8123", or "Dice 0.8123 to 0.8311 (+1.88 points)".
        values = shown.values
        dice = " to ".join(map(DICE.value_text, values.tolist()))
        if len(values) > 1:
            difference = DICE.difference_text(values[1] - values[0])
            dice += f" ({difference} {DICE.difference_unit})"
        subtitle = f"{DICE.title} {_typeset(dice)}"
    else:
        # The center can lie outside, such as between parts that a dilation joins.
        center = np.linalg.solve(affine, [*shown.lesion.center_mm, 1.0])[:3]
        inside = np.argwhere(np.isin(truth, evaluation.regions[shown.lesion.region]))
        away = np.linalg.norm((inside - center) * spacing_of(affine), axis=1)
        through = tuple(inside[away.argmin()].tolist())

    return draw_preview(
        image,
        before,
        maps[-1],
        spacing_of(affine),
        affine=affine,
        title=printable(shown.case),
        subtitle=subtitle,
        label_names=label_names,
        modality_names=tuple(names),
        before_name=before_name,
        after_name=evaluation.options.name,
        reference=panel,
        shows_errors=evaluation.verdict is None,
        through=through,
    )


# The page.

# Letters that reverse the following text of a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELLED = {letter: f"\\u{letter:04x}" for letter in _DIRECTIONS}


def _typeset(text: str) -> str:
    """Return a number with a true minus, and a dash for an undefined one."""
    return text.replace("-", "\u2212") or "–"


_PAGE = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.PackageLoader("crfrefine.evaluate.report", "assets"),
)
_PAGE.filters.update(typeset=_typeset, base64=base64.b64encode)
# Names in the template beside the values of an evaluation.
_PAGE.globals.update(
    version=__version__,
    dice=DICE,
    metric_named=metric_named,
    format_p=format_p,
    harm_text=harm_text,
    harm_column=HARM_COLUMN.capitalize(),
    region_title=region_title,
    rows_of=rows_of,
    means_of=means_of,
    recovered_text=recovered_text,
    lesion_totals=lesion_totals,
    power_note=power_note,
)
