"""The preview of a case: image, network contour, refined contour and changed voxels, in planes through structure and largest change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box, foreground_labels
from crfrefine.base.array_types import Array, Float32, Float64
from crfrefine.runs.pictures import drawing
from crfrefine.runs.pictures.planes import (
    CHANGE_WINDOW_MM,
    PLANES,
    Upright,
    choose_modality,
    choose_places,
    choose_window,
    planes_of,
)

_PAPER, _INK, _FAINT_INK, _FRAME = (drawing.gray_level(share) for share in (0.065, 0.95, 0.68, 0.8))
_DIMMED = 0.55  # below changed voxels
_MAX_LEGEND_ENTRIES = 12
# Pixels.
_PANEL_WIDTH = 320
_MAX_PANEL = 640
# The letters of the sides of a plane and its name have room in a square so large.
_MIN_HEIGHT = 60
_MAX_HEIGHT = 1.6  # of the width
_MARGIN = 14
_GAP = 8
_TITLE = 21
_TEXT = 15
_SMALL = 13
_TITLE_LINE = 34
_TEXT_LINE = 22
_HEADING_LINE = 32
_LEGEND_LINE = 26
# at least of an entry, and of its sample with the gap
_LEGEND_WIDTH = 300
_SAMPLE = 34


class Plane(NamedTuple):
    """One cut through the volume, ready to show: arrays are (rows, columns) with the first row at the top."""

    name: str  # such as "axial"
    # letters of the patient's sides at the left, right, bottom and top; empty if unknown
    edges: str
    size_mm: tuple[float, float]  # width and height
    image: NDArray[np.uint8]  # gray values
    # labels of the network, "before", after refinement, "refined", and of the "reference" if it is
    # shown
    maps: dict[str, Array]
    # column and row of the largest change, if the plane was chosen to show it
    peak: tuple[int, int] | None


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
    headings = {"image": "image"} | ({} if reference is None else {"reference": "reference"})
    headings |= {
        "before": before_name,
        "refined": after_name,
        "changes": "errors" if shows_errors else "changed voxels",
    }
    across = int(np.clip(max(max(plane.image.shape) for plane in planes), _PANEL_WIDTH, _MAX_PANEL))
    heights = [_panel_height(plane, across) for plane in planes]
    room = len(headings) * (across + _GAP) - _GAP
    lines = [*drawing.wrap(subtitle, _TEXT, room), *drawing.wrap(shown, _TEXT, room)]
    legend = _legend_entries(
        planes, label_names or {}, "missed" if shows_errors else "changed to background"
    )
    columns = max(1, room // _LEGEND_WIDTH)
    top = _MARGIN + _TITLE_LINE + len(lines) * _TEXT_LINE + _HEADING_LINE
    height = (
        top
        + sum(down + _GAP for down in heights)
        + -(-len(legend) // columns) * _LEGEND_LINE
        + _MARGIN
    )
    canvas = drawing.Canvas((room + 2 * _MARGIN, height), _PAPER)
    canvas.text(
        (_MARGIN, _MARGIN),
        drawing.cut_off(title, _TITLE, room, is_bold=True),
        _TITLE,
        _INK,
        is_bold=True,
    )
    for number, line in enumerate(lines):
        canvas.text((_MARGIN, _MARGIN + _TITLE_LINE + number * _TEXT_LINE), line, _TEXT, _FAINT_INK)
    for column, heading in enumerate(headings.values()):
        middle = _MARGIN + column * (across + _GAP) + across / 2
        canvas.text(
            (middle, top - 9), drawing.cut_off(heading, _TEXT, across), _TEXT, _INK, anchor="md"
        )
    for plane, down in zip(planes, heights, strict=True):
        for column, panel in enumerate(headings):
            _draw_panel(
                canvas, plane, panel, (_MARGIN + column * (across + _GAP), top), (across, down)
            )
        top += down + _GAP
    for number, (label, text) in enumerate(legend):
        left = _MARGIN + number % columns * (room // columns)
        middle = top + number // columns * _LEGEND_LINE + _LEGEND_LINE // 2
        sample = np.full((12 if label == 0 else 3, _SAMPLE - 8), label)
        pixels = np.where(
            drawing.is_dashed_on(sample, *np.indices(sample.shape)),
            drawing.label_levels(sample),
            np.uint8(_PAPER),
        )
        canvas.paste(pixels, (left, middle - len(sample) // 2))
        text = drawing.cut_off(text, _SMALL, room // columns - _SAMPLE - _GAP)
        canvas.text((left + _SAMPLE, middle), text, _SMALL, _INK, anchor="lm")
    return canvas.png()


def _panel_height(plane: Plane, width: int) -> int:
    """Return the height of a plane's row in pixels: that of the plane, unless it is very flat or very tall."""
    width_mm, height_mm = plane.size_mm
    return round(float(np.clip(width * height_mm / width_mm, _MIN_HEIGHT, _MAX_HEIGHT * width)))


def cut_planes(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    affine: Float64 | None,
    modality_names: Sequence[str] = (),
    reference: Array | None = None,
) -> tuple[list[Plane], str]:
    """Return the planes through the structure, and through the largest change if those do not show it; and a line about the image."""
    # They are upright if the orientation is known, and cropped. Arguments are those of
    # `draw_preview`.
    pose = Upright.of(affine, before.ndim)
    # In the upright volume: of two equal planes, the same one must be shown whatever the stored
    # orientation.
    modalities = [
        pose.turn(channel)
        for channel in (np.zeros((1, *before.shape), np.float32) if image is None else image)
    ]
    given = {"before": before, "refined": after, "reference": reference}
    maps = {name: pose.turn(labels) for name, labels in given.items() if labels is not None}
    steps = [float(spacing[axis]) for axis in pose.axis_order]
    network = maps["before"]
    refined = maps["refined"]
    structure = np.logical_or.reduce([labels > 0 for labels in maps.values()])
    middle, change = choose_places([*maps.values()], network != refined, steps)
    windows = [choose_window(channel, structure) for channel in modalities]
    chosen = choose_modality(modalities, windows, refined if refined.any() else network, steps)
    # A margin around the labels: small structures become visible.
    margin_mm = 0.12 * max(size * step for size, step in zip(structure.shape, steps, strict=True))
    crop = [slice(0, size) for size in structure.shape]
    for axis, part in enumerate(bounding_box(structure) or ()):
        margin = int(np.ceil(margin_mm / steps[axis]))
        crop[axis] = slice(max(0, part.start - margin), min(crop[axis].stop, part.stop + margin))

    def cut(plane: int, point: Sequence[int], prefix: str = "") -> Plane:
        _, across, up, _ = PLANES[plane]
        index = tuple(
            crop[axis] if axis in (across, up) else point[axis] for axis in range(before.ndim)
        )
        shown = windows[chosen].gray(modalities[chosen][index]).T[::-1]
        size_mm = (shown.shape[1] * steps[across], shown.shape[0] * steps[up])
        if prefix:
            peak = (point[across] - crop[across].start, crop[up].stop - 1 - point[up])
        else:
            peak = None
        name, edges = pose.describe(plane)
        return Plane(
            prefix + name,
            edges,
            size_mm,
            shown,
            {name: labels[index].T[::-1] for name, labels in maps.items()},
            peak,
        )

    planes = [cut(plane, middle) for plane in planes_of(refined.shape)]
    if change is not None:
        planes.append(cut(change[1], change[0], "change, "))
    if image is None:
        return planes, "no image"
    window = windows[chosen]
    shown = "image" if len(image) == 1 else f"modality {chosen + 1} of {len(image)}"
    shown += f": {modality_names[chosen]}" if len(modality_names) == len(image) else ""
    shown += ", with the highest contrast at the borders of the labels" if len(image) > 1 else ""
    return (
        planes,
        f"{shown}; black to white: {window}{f' HU ({window.name})' if window.name else ''}",
    )


def _draw_panel(
    canvas: drawing.Canvas, plane: Plane, panel: str, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    """Draw a plane in the middle of its panel, in true proportions."""
    scale = min(pixels / mm for pixels, mm in zip(size, plane.size_mm, strict=True))
    inner = (max(1, round(plane.size_mm[0] * scale)), max(1, round(plane.size_mm[1] * scale)))
    left, top = (
        first + (outer - pixels) // 2
        for first, outer, pixels in zip(corner, size, inner, strict=True)
    )
    pixels = drawing.resize_gray(plane.image, inner, _DIMMED if panel == "changes" else 1.0)
    if panel in plane.maps:
        labels = drawing.enlarge(plane.maps[panel], inner)
        is_line = drawing.outline(labels)
        pixels[is_line] = drawing.label_levels(labels[is_line])
    elif panel == "changes":
        before, after = (drawing.enlarge(plane.maps[name], inner) for name in ("before", "refined"))
        # In the color of the new label; white is background.
        pixels = np.where(before != after, drawing.label_levels(after), pixels)
    canvas.paste(pixels, (left, top))
    if plane.peak is not None and panel in ("image", "changes"):
        x, y = (
            round((at + 0.5) * n / voxels)
            for at, n, voxels in zip(plane.peak, inner, plane.image.shape[::-1], strict=True)
        )
        reach = round(CHANGE_WINDOW_MM * scale)
        right = min(x + reach, inner[0] - 1)
        bottom = min(y + reach, inner[1] - 1)
        canvas.frame(
            (left + max(0, x - reach), top + max(0, y - reach), left + right, top + bottom), _FRAME
        )
    if panel == "image":
        _write_sides(canvas, plane.edges, (left, top), inner)
        canvas.text(
            (corner[0] + 5, corner[1] + size[1] - 4),
            plane.name,
            _SMALL,
            _INK,
            anchor="ld",
            edge=_PAPER,
        )


def _write_sides(
    canvas: drawing.Canvas, letters: str, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    """Write the letters of a plane's sides at its edges, or beside it where it is too narrow for them."""
    left, top = corner
    width, height = size
    room = (max(width, _MIN_HEIGHT), max(height, _MIN_HEIGHT))
    start = (left - (room[0] - width) // 2, top - (room[1] - height) // 2)
    canvas.sides(letters, start, room, _SMALL, _INK, _PAPER)


def _legend_entries(
    planes: Sequence[Plane], names: Mapping[int, str], lost: str
) -> list[tuple[int, str]]:
    """Return label and text of each entry; the label is 0 for changes to background."""
    seen = sorted(
        {
            label
            for plane in planes
            for labels in plane.maps.values()
            for label in foreground_labels(labels)
        }
    )
    entries = [(label, names.get(label, f"label {label}")) for label in seen[:_MAX_LEGEND_ENTRIES]]
    if len(seen) > _MAX_LEGEND_ENTRIES:
        last, text = entries[-1]
        entries[-1] = last, f"{text} … and {len(seen) - _MAX_LEGEND_ENTRIES} more"
    if any(
        ((plane.maps["before"] != plane.maps["refined"]) & (plane.maps["refined"] == 0)).any()
        for plane in planes
    ):
        entries.append((0, lost))
    return entries
