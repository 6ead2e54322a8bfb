"""The preview of a case: a picture of image, contours before and after, and changed voxels.

It shows planes through the structure and the largest change, a row each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.array_types import Array, Float32, Float64, NamesOfLabels
from crfrefine.base.geometry import voxel_ml
from crfrefine.base.text import printable
from crfrefine.metrics.lesion_matching import changes_text
from crfrefine.pictures.colors import choose_colors, labels_nearby
from crfrefine.pictures.cuts import Plane, cut_planes
from crfrefine.pictures.drawing import FAINT_INK, GAP, MIN_HEIGHT, TEXT, TITLE, Canvas, wrap

if TYPE_CHECKING:
    from crfrefine.cases.case import Case
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.refinement.result import RefinementResult

_MAX_LEGEND_ENTRIES = 60
_MAX_VOLUMES = 6  # most labels whose volumes a picture has
# Pixels.
_PANEL_WIDTH = 320
_MAX_PANEL = 640
_MAX_HEIGHT = 1.6  # as a multiple of the width
_MARGIN = 14
_TITLE_LINE = 34
_TEXT_LINE = 22
_HEADING_LINE = 32
_LEGEND_LINE = 26
_LEGEND_WIDTH = 300  # of an entry, at least


def draw_preview(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    *,
    affine: Float64 | None = None,
    title: str = "",
    subtitle: str = "",
    label_names: NamesOfLabels | None = None,
    modality_names: Sequence[str] = (),
    before_name: str = "network",
    after_name: str = "refined",
    reference: Array | None = None,
    shows_errors: bool = False,
    through: Sequence[int] | None = None,
) -> bytes:
    """Draw the effect of the refinement on one case and return the picture as PNG.

    The image is (M, *grid), of which the modality with the highest contrast at the borders of
    labels is shown; None means black. Label maps are (*grid) integers; a reference has its own
    panel. With an affine the planes are upright. With `shows_errors`, `before` is the reference.
    Planes go through the voxel `through`, or show the structure and the largest change.
    """
    planes, shown = cut_planes(
        image, before, after, spacing, affine, modality_names, reference, through
    )
    headings = {
        "image": "image",
        "reference": "reference",
        "before": before_name,
        "refined": after_name,
        "changes": "errors" if shows_errors else "changed voxels",
    }
    if reference is None:
        del headings["reference"]
    largest = max(max(plane.image.shape) for plane in planes)
    width = int(np.clip(largest, _PANEL_WIDTH, _MAX_PANEL))
    room = len(headings) * (width + GAP) - GAP
    lines = wrap(subtitle, room) + wrap(shown, room)
    shown_maps = [labels for plane in planes for labels in plane.maps.values()]
    colors = choose_colors(labels_nearby(shown_maps))
    lost_text = "missed" if shows_errors else "changed to background"
    legend = _legend_entries(planes, list(colors), label_names or {}, lost_text)

    top = _MARGIN + _TITLE_LINE + len(lines) * _TEXT_LINE + _HEADING_LINE
    heights = []
    for plane in planes:
        height = max(width * plane.size_mm[1] / plane.size_mm[0], MIN_HEIGHT)
        heights.append(round(min(height, _MAX_HEIGHT * width)))
    columns = max(1, room // _LEGEND_WIDTH)
    bottom = top + sum(heights) + len(heights) * GAP
    height = bottom + math.ceil(len(legend) / columns) * _LEGEND_LINE + _MARGIN
    canvas = Canvas((room + 2 * _MARGIN, height))
    canvas.text((_MARGIN, _MARGIN), title, TITLE, width=room, is_bold=True)
    for number, line in enumerate(lines):
        place = (_MARGIN, _MARGIN + _TITLE_LINE + number * _TEXT_LINE)
        canvas.text(place, line, TEXT, level=FAINT_INK)
    for column, (panel, heading) in enumerate(headings.items()):
        left = _MARGIN + column * (width + GAP)
        canvas.text((left + width / 2, top - 9), heading, TEXT, anchor="md", width=width)
        row_top = top
        for plane, height in zip(planes, heights, strict=True):
            plane.draw(canvas, panel, (left, row_top), (width, height), colors)
            row_top += height + GAP
    for number, (label, text) in enumerate(legend):
        left = _MARGIN + number % columns * (room // columns)
        middle = bottom + number // columns * _LEGEND_LINE + _LEGEND_LINE // 2
        canvas.entry(label, text, (left, middle), room // columns, colors)
    return canvas.png()


def _legend_entries(
    planes: Sequence[Plane], labels: Sequence[int], names: NamesOfLabels, lost_text: str
) -> list[tuple[int | None, str]]:
    """Return label and text of each entry of the legend: the labels, and where one is lost.

    The label is 0 for changes to background, and None for plain text.
    """
    entries: list[tuple[int | None, str]] = []
    for label in labels[:_MAX_LEGEND_ENTRIES]:
        entries.append((label, names.get(label, f"label {label}")))
    if len(labels) > len(entries):
        entries.append((None, f"and {len(labels) - len(entries)} more labels"))
    lost = [(plane.maps["before"] > 0) & (plane.maps["refined"] == 0) for plane in planes]
    if any(map(np.any, lost)):
        entries.append((0, lost_text))
    return entries


def preview_of_case(case: Case, result: RefinementResult, reading: ReadingOptions) -> bytes:
    """Draw the preview of a case that is refined; its second line has the numbers."""
    num_changed = result.changes.voxels_changed
    num_voxels = result.label_map.size
    share = f"{num_changed / num_voxels:.2%}"
    parts = [
        f"{result.report.num_iterations} steps",
        f"{num_changed:,} of {num_voxels:,} voxels changed ({share})",
    ]
    titles = reading.titles
    volumes = []
    size_ml = voxel_ml(case.spacing)
    for label, before, after in result.changes.by_label():
        title = titles.get(label, f"label {label}")
        volumes.append(f"{title}: {before * size_ml:.3g} → {after * size_ml:.3g}")
    if 0 < len(volumes) <= _MAX_VOLUMES:
        # A line is not broken inside a part.
        unbroken = [volume.replace(" ", "\u00a0") for volume in volumes]
        parts.append("ml of " + ", ".join(unbroken))
    changes = result.component_changes.values()
    if changes:
        text = changes_text(change.counts for change in changes)
        largest = max(change.largest_vanished for change in changes) * size_ml
        if largest:
            text += f" (largest that vanished: {largest:.3g} ml)"
        parts.append(text)
    affine, spacing = case.like.geometry()
    return draw_preview(
        case.image,
        result.network_label_map,
        result.label_map,
        spacing,
        affine=affine,
        title=printable(case.case_id),
        subtitle="   ·   ".join(parts),
        label_names=titles,
        modality_names=reading.modality_names,
        before_name="input" if case.input_kind == "labels" else "network",
    )
