"""The preview of a case: image, network contour, refined contour and changed voxels, in planes through structure and largest change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.pages.pictures import drawing
from crfrefine.pages.pictures.planes import CHANGE_WINDOW_MM, PLANES, Places, Upright, choose_places, crop_around, planes_of
from crfrefine.pages.pictures.windows import choose_modality, choose_window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Float32, Float64

_PAPER, _INK, _FAINT_INK, _FRAME = (drawing.gray_level(share) for share in (0.065, 0.95, 0.68, 0.8))
_DIMMED = 0.55  # below changed voxels
_MAX_LEGEND_ENTRIES = 12
# Pixels.
_PANEL_WIDTH, _MAX_PANEL = 320, 640
_CORNER, _MARGIN, _GAP = 32, 14, 8
_TITLE, _TEXT, _SMALL = 21, 15, 13
_TITLE_LINE, _TEXT_LINE, _HEADING_LINE, _LEGEND_LINE = 34, 22, 32, 26


@dataclass(frozen=True)
class Plane:
    """One cut through the volume, ready to show: arrays are (rows, columns) with the first row at the top."""

    name: str  # Such as "axial".
    edges: str  # Letters of the patient's sides at the left, right, bottom and top; empty if unknown.
    size_mm: tuple[float, float]  # Width and height.
    image: NDArray[np.uint8]  # Gray values.
    before: Array  # Labels of the network.
    after: Array  # Labels after refinement.
    reference: Array | None = None  # Labels of the reference, if it is shown.
    # Columns and rows around the largest change, (left, top, right, bottom) in voxels, if the plane shows it.
    frame: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Cuts:
    """The planes of a case."""

    planes: tuple[Plane, ...]  # Those through the structure, then the one through the largest change if those do not show it.
    shown: str  # A line that says which modality and which gray values are shown.


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

    Args:
        image: (M, *grid) any intensity; the modality with the highest contrast at the borders of the labels is shown. None means black.
        before: (*grid) integer labels before refinement; 0 is background.
        after: (*grid) integer labels after refinement.
        spacing: mm, one per grid axis.
        affine: (4, 4) voxel to world RAS+; with it the planes are upright and the patient's sides are named.
        title: first line, such as the case's name.
        subtitle: second line, such as its numbers.
        label_names: names for the legend; labels without one are numbered.
        modality_names: names of the modalities, in order; without them they are numbered.
        before_name: source of the labels before refinement.
        after_name: source of the labels after refinement.
        reference: (*grid) integer labels with their own panel.
        shows_errors: `before` is the reference, so that the voxels in the last panel are errors.
    """
    cuts = cut_planes(image, before, after, spacing, affine, modality_names, reference)
    headings = {"image": "image", "reference": "reference", "before": before_name, "refined": after_name, "changes": "changed voxels"}
    if reference is None:
        del headings["reference"]
    if shows_errors:
        headings["changes"] = "errors"
    widest = max(max(plane.image.shape) for plane in cuts.planes)
    across = int(np.clip(widest, _PANEL_WIDTH, _MAX_PANEL))
    heights = [across * plane.size_mm[1] / plane.size_mm[0] for plane in cuts.planes]
    # Very flat and very tall planes get panels of bounded height.
    panels = [(across, round(float(np.clip(height, 0.5 * across, 1.6 * across)))) for height in heights]
    width = _CORNER + len(headings) * (panels[0][0] + _GAP) - _GAP + _MARGIN
    room = width - _CORNER - _MARGIN
    lines = [*drawing.wrap(subtitle, _TEXT, room), *drawing.wrap(cuts.shown, _TEXT, room)]
    legend = _lay_out_legend(
        _legend_entries(cuts.planes, label_names or {}, "missed" if shows_errors else "changed to background", room), room
    )
    top = _MARGIN + _TITLE_LINE + len(lines) * _TEXT_LINE + _HEADING_LINE
    height = top + sum(down + _GAP for _, down in panels) + len(legend) * _LEGEND_LINE + _MARGIN
    canvas = drawing.Canvas((width, height), _PAPER)
    canvas.text((_CORNER, _MARGIN), drawing.cut_off(title, _TITLE, room, is_bold=True), _TITLE, _INK, is_bold=True)
    for number, line in enumerate(lines):
        canvas.text((_CORNER, _MARGIN + _TITLE_LINE + number * _TEXT_LINE), line, _TEXT, _FAINT_INK)
    for row, (plane, size) in enumerate(zip(cuts.planes, panels, strict=True)):
        for column, (panel, heading) in enumerate(headings.items()):
            left = _CORNER + column * (size[0] + _GAP)
            if row == 0:
                heading = drawing.cut_off(heading, _TEXT, size[0])
                canvas.text((left + size[0] / 2, top - 9), heading, _TEXT, _INK, anchor="md")
            _draw_panel(canvas, plane, panel, (left, top), size)
        canvas.upward_text((_CORNER / 2, top + size[1] / 2), plane.name, _SMALL, _FAINT_INK)
        top += size[1] + _GAP
    for entries in legend:
        _draw_legend_line(canvas, entries, width, top + _LEGEND_LINE / 2)
        top += _LEGEND_LINE
    return canvas.png()


def cut_planes(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    affine: Float64 | None,
    modality_names: Sequence[str] = (),
    reference: Array | None = None,
) -> Cuts:
    """Cut the volume through its labels and their largest change, upright if the orientation is known, and cropped around the labels.

    Arguments are those of `draw_preview`.
    """
    keep = min(3, before.ndim)
    pose = Upright.of(affine, keep)
    # In the upright volume: of two equal planes, the same one must be shown whatever the stored orientation.
    modalities = [pose.turn(channel) for channel in (np.zeros((1, *before.shape), np.float32) if image is None else image)]
    maps = [pose.turn(labels) for labels in (before, after, reference) if labels is not None]
    steps = [float(spacing[axis]) for axis in pose.axis_order]
    if before.ndim > keep:  # Further axes (time) are fixed where most changes.
        moment = choose_places(maps, maps[0] != maps[1], [*steps, *(float(step) for step in spacing[keep:])]).structure[keep:]
        when: Any = (..., *moment)
        modalities = [channel[when] for channel in modalities]
        maps = [labels[when] for labels in maps]
    network, refined, *references = maps
    structure = np.logical_or.reduce([labels > 0 for labels in maps])
    places = choose_places(maps, network != refined, steps)
    windows = [choose_window(channel, structure) for channel in modalities]
    chosen = choose_modality(modalities, windows, refined if refined.any() else network, steps)
    window = windows[chosen]
    crop = crop_around(structure, steps)

    def cut(plane: int, point: Sequence[int], *, is_change: bool = False) -> Plane:
        name, across, up = PLANES[plane]
        index = tuple(crop[axis] if axis in (across, up) else point[axis] for axis in range(keep))
        labels = refined[index].T[::-1]
        if not pose.sides:
            name = f"axes {across}, {up}"
        return Plane(
            name=f"largest change, {name}" if is_change else name,
            edges=pose.sides[across] + pose.sides[up] if pose.sides else "",
            size_mm=(labels.shape[1] * steps[across], labels.shape[0] * steps[up]),
            image=window.gray(modalities[chosen][index]).T[::-1],
            before=network[index].T[::-1],
            after=labels,
            reference=references[0][index].T[::-1] if references else None,
            frame=_frame_of(places, (across, up), crop, steps) if is_change else None,
        )

    planes = [cut(plane, places.structure) for plane in planes_of(refined.shape)]
    if places.change is not None:
        planes.append(cut(places.change_plane, places.change, is_change=True))
    shown = "no image" if image is None else _describe_image(chosen, len(image), modality_names, str(window), window.name)
    return Cuts(tuple(planes), shown)


def _frame_of(places: Places, axes: tuple[int, int], crop: Sequence[slice], steps: Sequence[float]) -> tuple[int, int, int, int]:
    """Return the voxels around the largest change in a plane: left, top, right and bottom, exclusive, of the cropped plane."""
    assert places.change is not None
    (left, right), (low, high) = (
        (max(0, place - reach - crop[axis].start), min(crop[axis].stop, place + reach + 1) - crop[axis].start)
        for axis in axes
        for place, reach in [(places.change[axis], round(CHANGE_WINDOW_MM / steps[axis]))]
    )
    rows = crop[axes[1]].stop - crop[axes[1]].start
    return left, rows - high, right, rows - low


def _describe_image(chosen: int, num_modalities: int, names: Sequence[str], levels: str, window: str) -> str:
    is_named = len(names) == num_modalities
    if num_modalities > 1:
        name = f": {names[chosen]}" if is_named else ""
        text = f"modality {chosen + 1} of {num_modalities}{name}, with the highest contrast at the borders of the labels"
    else:
        text = f"image{f': {names[0]}' if is_named else ''}"
    return f"{text}; black to white: {levels}{f' HU ({window})' if window else ''}"


def _draw_panel(canvas: drawing.Canvas, plane: Plane, panel: str, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw a plane in the middle of its panel, in true proportions."""
    scale = min(pixels / mm for pixels, mm in zip(size, plane.size_mm, strict=True))
    inner = (max(1, round(plane.size_mm[0] * scale)), max(1, round(plane.size_mm[1] * scale)))
    left, top = (first + (outer - pixels) // 2 for first, outer, pixels in zip(corner, size, inner, strict=True))
    pixels = drawing.resize_gray(plane.image, inner, _DIMMED if panel == "changes" else 1.0)
    outlined = {"reference": plane.reference, "before": plane.before, "refined": plane.after}.get(panel)
    if outlined is not None:
        labels = drawing.enlarge(outlined, inner)
        is_line = drawing.outline(labels)
        pixels[is_line] = drawing.label_levels(labels[is_line])
    elif panel == "changes":
        before, after = drawing.enlarge(plane.before, inner), drawing.enlarge(plane.after, inner)
        pixels = np.where(before != after, drawing.label_levels(after), pixels)  # In the color of the new label; white is background.
    canvas.paste(pixels, (left, top))
    if plane.frame is not None and panel in ("image", "changes"):
        across, down = inner[0] / plane.image.shape[1], inner[1] / plane.image.shape[0]
        first, above, last, below = plane.frame
        canvas.frame(
            (left + round(first * across), top + round(above * down), left + round(last * across) - 1, top + round(below * down) - 1),
            _FRAME,
        )
    if panel == "image" and plane.edges:
        canvas.sides(plane.edges, (left, top), inner, _SMALL, _INK, _PAPER)


def _legend_entries(planes: Sequence[Plane], names: Mapping[int, str], lost: str, room: float) -> list[tuple[int | None, str]]:
    """Return label and text of each entry; the label is 0 for changes to background, and None for a text without a label."""
    shown = [labels for plane in planes for labels in (plane.before, plane.after, plane.reference) if labels is not None]
    seen = sorted({label for labels in shown for label in foreground_labels(labels)})
    entries: list[tuple[int | None, str]] = [(label, names.get(label, f"label {label}")) for label in seen[:_MAX_LEGEND_ENTRIES]]
    if len(seen) > _MAX_LEGEND_ENTRIES:
        entries.append((None, f"and {len(seen) - _MAX_LEGEND_ENTRIES} more"))
    if any(((plane.before != plane.after) & (plane.after == 0)).any() for plane in planes):
        entries.append((0, lost))
    return [(label, drawing.cut_off(text, _SMALL, room / 3)) for label, text in entries]


_SAMPLE, _SPACE = 34, 26  # pixels: length of a line sample with its gap, and space between entries


def _lay_out_legend(entries: Sequence[tuple[int | None, str]], room: float) -> list[list[tuple[int | None, str]]]:
    """Return the entries in lines no wider than allowed."""
    lines: list[list[tuple[int | None, str]]] = []
    for entry in entries:
        if lines and sum(map(_entry_width, [*lines[-1], entry])) - _SPACE <= room:
            lines[-1].append(entry)
        else:
            lines.append([entry])
    return lines


def _entry_width(entry: tuple[int | None, str]) -> float:
    return (0 if entry[0] is None else _SAMPLE) + drawing.text_width(entry[1], _SMALL) + _SPACE


def _draw_legend_line(canvas: drawing.Canvas, entries: Sequence[tuple[int | None, str]], width: int, middle: float) -> None:
    left = (width - sum(map(_entry_width, entries)) + _SPACE) / 2
    for label, text in entries:
        start = left
        if label is not None:
            sample = np.full((12 if label == 0 else 3, _SAMPLE - 8), label)
            pixels = np.where(drawing.is_dashed_on(sample), drawing.label_levels(sample), np.uint8(_PAPER))
            canvas.paste(pixels, (round(left), round(middle - len(sample) / 2)))
            start += _SAMPLE
        canvas.text((start, middle), text, _SMALL, _INK, anchor="lm")
        left += _entry_width((label, text))
