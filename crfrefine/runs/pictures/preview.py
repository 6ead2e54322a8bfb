"""The preview of a case: a picture of image, contours before and after, and changed voxels.

It shows planes through the structure and the largest change, a row each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.array_types import Array, Float32, Float64
from crfrefine.runs.pictures import drawing
from crfrefine.runs.pictures.cuts import Plane, cut_planes

_PAPER = drawing.gray_level(0.065)
_INK = drawing.gray_level(0.95)
_FAINT_INK = drawing.gray_level(0.68)
_FRAME = drawing.gray_level(0.8)
_DIMMED = 0.55  # share of the image's brightness below changed voxels
_MAX_LEGEND_ENTRIES = 60
# Pixels.
_PANEL_WIDTH = 320
_MAX_PANEL = 640
# The letters of the sides of a plane and its name have room in a square so large, above and below
# a plane of a few slices.
_MIN_HEIGHT = 100
_MAX_HEIGHT = 1.6  # as a multiple of the width
_MARGIN = 14
_GAP = 8
_TITLE = 21
_TEXT = 15
_SMALL = 13
_TITLE_LINE = 34
_TEXT_LINE = 22
_HEADING_LINE = 32
_LEGEND_LINE = 26
_LEGEND_WIDTH = 300  # of an entry, at least
_SAMPLE = 34  # width of an entry's line or bar, with the gap


Size = tuple[int, int]  # pixels to the right and down
# Label and text; the label is 0 for changes to background, and None for a text alone.
LegendEntry = tuple[int | None, str]
Colors = Mapping[int, int]  # of each label, as of `drawing.choose_colors`


def draw_preview(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    *,
    affine: Float64 | None = None,
    title: str = "",
    subtitle: str = "",
    label_names: Mapping[int, str] | None = None,
    modality_names: Sequence[str] = (),
    before_name: str = "network",
    after_name: str = "refined",
    reference: Array | None = None,
    shows_errors: bool = False,
) -> bytes:
    """Draw the effect of the refinement on one case and return the picture as PNG.

    The image is (M, *grid), of which the modality with the highest contrast at the borders of
    labels is shown; None means black. Label maps are (*grid) integers; a reference has its own
    panel. With an affine the planes are upright. With `shows_errors`, `before` is the reference.
    """
    planes, shown = cut_planes(image, before, after, spacing, affine, modality_names, reference)
    headings = {"image": "image"}
    if reference is not None:
        headings["reference"] = "reference"
    headings["before"] = before_name
    headings["refined"] = after_name
    headings["changes"] = "changed voxels"
    lost_text = "changed to background"
    if shows_errors:
        headings["changes"] = "errors"
        lost_text = "missed"
    legend = _legend_entries(planes, label_names or {}, lost_text)
    colors = drawing.choose_colors([labels for plane in planes for labels in plane.maps.values()])

    largest = max(max(plane.image.shape) for plane in planes)
    panel_width = int(np.clip(largest, _PANEL_WIDTH, _MAX_PANEL))
    sizes = []
    for plane in planes:
        width_mm, height_mm = plane.size_mm
        height = max(panel_width * height_mm / width_mm, _MIN_HEIGHT)
        sizes.append((panel_width, round(min(height, _MAX_HEIGHT * panel_width))))
    room = len(headings) * (panel_width + _GAP) - _GAP
    lines = drawing.wrap(subtitle, _TEXT, room)
    lines += drawing.wrap(shown, _TEXT, room)
    top = _MARGIN + _TITLE_LINE + len(lines) * _TEXT_LINE + _HEADING_LINE
    bottom = top + sum(height + _GAP for _, height in sizes)
    columns = max(1, room // _LEGEND_WIDTH)
    legend_lines = math.ceil(len(legend) / columns)
    height = bottom + legend_lines * _LEGEND_LINE + _MARGIN

    canvas = drawing.Canvas((room + 2 * _MARGIN, height), _PAPER)
    _write_title(canvas, title, lines, room)
    for column, heading in enumerate(headings.values()):
        middle = _MARGIN + column * (panel_width + _GAP) + panel_width / 2
        text = drawing.cut_off(heading, _TEXT, panel_width)
        canvas.text((middle, top - 9), text, _TEXT, _INK, anchor="md")
    for plane, size in zip(planes, sizes, strict=True):
        for column, panel in enumerate(headings):
            left = _MARGIN + column * (panel_width + _GAP)
            _draw_panel(canvas, plane, panel, (left, top), size, colors)
        top += size[1] + _GAP
    for number, entry in enumerate(legend):
        left = _MARGIN + number % columns * (room // columns)
        middle_of_line = bottom + number // columns * _LEGEND_LINE + _LEGEND_LINE // 2
        _draw_legend_entry(canvas, entry, (left, middle_of_line), room // columns, colors)
    return canvas.png()


def _write_title(canvas: drawing.Canvas, title: str, lines: Sequence[str], room: int) -> None:
    """Write the title and the lines below it."""
    title = drawing.cut_off(title, _TITLE, room, is_bold=True)
    canvas.text((_MARGIN, _MARGIN), title, _TITLE, _INK, is_bold=True)
    for number, line in enumerate(lines):
        top = _MARGIN + _TITLE_LINE + number * _TEXT_LINE
        canvas.text((_MARGIN, top), line, _TEXT, _FAINT_INK)


def _draw_legend_entry(
    canvas: drawing.Canvas, entry: LegendEntry, place: tuple[int, int], width: int, colors: Colors
) -> None:
    """Draw an entry of the legend, whose left end in the middle is at the place."""
    label, text = entry
    left, middle = place
    if label is not None:
        height = 12 if label == 0 else 3
        sample = np.full((height, _SAMPLE - 8), label)
        is_drawn = drawing.is_dashed_on(sample, *np.indices(sample.shape))
        pixels = np.where(is_drawn, drawing.label_levels(sample, colors), np.uint8(_PAPER))
        canvas.paste(pixels, (left, middle - height // 2))
    text = drawing.cut_off(text, _SMALL, width - _SAMPLE - _GAP)
    canvas.text((left + _SAMPLE, middle), text, _SMALL, _INK, anchor="lm")


def _draw_panel(
    canvas: drawing.Canvas,
    plane: Plane,
    panel: str,
    corner: tuple[int, int],
    size: Size,
    colors: Colors,
) -> None:
    """Draw a plane in the middle of its panel, in true proportions.

    It is the image, with contours or changes in the labels' colors. The image and the changes have
    a frame around the largest change, if the plane has one.
    """
    width_mm, height_mm = plane.size_mm
    scale = min(size[0] / width_mm, size[1] / height_mm)
    width = max(1, round(width_mm * scale))
    height = max(1, round(height_mm * scale))
    left = corner[0] + (size[0] - width) // 2
    top = corner[1] + (size[1] - height) // 2
    if panel == "changes":
        before = drawing.enlarge(plane.maps["before"], (width, height))
        after = drawing.enlarge(plane.maps["refined"], (width, height))
        gray = drawing.resize_gray(plane.image, (width, height), _DIMMED)
        # Changed voxels have the color of the new label; white is background.
        pixels = np.where(before != after, drawing.label_levels(after, colors), gray)
    else:
        pixels = drawing.resize_gray(plane.image, (width, height))
    if panel in plane.maps:
        labels = drawing.enlarge(plane.maps[panel], (width, height))
        is_line = drawing.outline(labels)
        pixels[is_line] = drawing.label_levels(labels[is_line], colors)
    canvas.paste(pixels, (left, top))
    if plane.frame is not None and panel in ("image", "changes"):
        column, row, across_mm, down_mm = plane.frame
        across = round(across_mm * scale)
        down = round(down_mm * scale)
        rows, columns = plane.image.shape
        x = round((column + 0.5) * width / columns)
        y = round((row + 0.5) * height / rows)
        first = (left + max(0, x - across), top + max(0, y - down))
        last = (left + min(x + across, width - 1), top + min(y + down, height - 1))
        canvas.frame((*first, *last), _FRAME)
    if panel == "image":
        # The letters of the sides are beside a plane that is too narrow for them.
        room = (max(width, _MIN_HEIGHT), max(height, _MIN_HEIGHT))
        place = (left - (room[0] - width) // 2, top - (room[1] - height) // 2)
        canvas.sides(plane.edges, place, room, _SMALL, _INK, _PAPER)
        place = (corner[0] + 5, corner[1] + size[1] - 4)
        canvas.text(place, plane.name, _SMALL, _INK, anchor="ld", edge=_PAPER)


def _legend_entries(
    planes: Sequence[Plane], names: Mapping[int, str], lost_text: str
) -> list[LegendEntry]:
    """Return an entry for each label, and one for changes to background where there are some.

    `lost_text` is the text of the latter.
    """
    seen: set[int] = set()
    has_lost = False
    for plane in planes:
        for labels in plane.maps.values():
            seen.update(foreground_labels(labels))
        before = plane.maps["before"]
        refined = plane.maps["refined"]
        if ((before != refined) & (refined == 0)).any():
            has_lost = True

    shown = sorted(seen)[:_MAX_LEGEND_ENTRIES]
    entries: list[LegendEntry] = []
    for label in shown:
        entries.append((label, names.get(label, f"label {label}")))
    num_left_out = len(seen) - len(shown)
    if num_left_out:
        entries.append((None, f"and {num_left_out} more labels"))
    if has_lost:
        entries.append((0, lost_text))
    return entries
