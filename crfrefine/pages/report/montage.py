"""Cuts through a case's structure and its largest change, as SVG panels: image, reference, before, after, changes.

Contours are sharp at any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.pages.pictures.display import SIDES, label_color
from crfrefine.pages.pictures.planes import PLANES, planes_of
from crfrefine.pages.report.cutting import CHANGE_COLORS, GAINED, LOST, RELABELED, UprightCase
from crfrefine.pages.report.encoding import gray_png
from crfrefine.pages.report.svg import element

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool

CHANGE_KINDS = {GAINED: "gained", LOST: "lost", RELABELED: "relabeled"}


@dataclass(frozen=True)
class Cut:
    """One plane of a case: its name, its position, and its panels, each a caption and a picture."""

    name: str
    place: str
    panels: tuple[tuple[str, str], ...]


def cuts_of(name: str, case: UprightCase, before: str, after: str, titles: Mapping[int, str] | None = None) -> list[Cut]:
    """Cut a case in three planes through the structure, and in a fourth one through the largest change if those do not show it.

    Planes that are only a line, as with a single slice, are left out. The name is unique in the page: a prefix of ids.
    """
    planes = [PLANES[number] for number in planes_of(case.after.shape)]
    draw = partial(_cut, case, (before, after), titles or {})
    cuts = [draw(f"{name}-{plane}", plane, axes, case.point) for plane, *axes in planes]
    if case.change is not None:
        plane, *axes = PLANES[case.change_plane]
        cuts.append(draw(f"{name}-change", f"largest change, {plane}", axes, case.change))
    return cuts


def _cut(
    case: UprightCase, methods: tuple[str, str], titles: Mapping[int, str], name: str, plane: str, axes: Sequence[int], point: Sequence[int]
) -> Cut:
    (before, after), (across, up) = methods, axes
    through = 3 - across - up
    index: tuple[Any, ...] = tuple(point[axis] if axis == through else slice(None) for axis in range(3))

    def slice_of(volume: Array) -> Array:
        cut: Array = volume[index].T[::-1]  # (rows from top to bottom, columns)
        return cut

    steps = case.steps[across], case.steps[up]
    reference = slice_of(case.reference)
    rows, columns = reference.shape
    width, height = columns * steps[0], rows * steps[1]
    picture = element("rect", width="100%", height="100%", class_="nothing")
    heading = "Image"
    if case.images is not None:
        window = case.windows[case.modality]
        if len(case.images) > 1:
            heading = f"Image: {case.modality_names[case.modality]}"
        gray = gray_png(window.gray(slice_of(case.images[case.modality])))
        picture = element("image", href=gray, width=width, height=height, preserveAspectRatio="none", class_="voxels")
    changes = slice_of(case.changes)
    filled = _changes(name, changes, steps, max(width, height) / 80)
    reference_line = contour_path(reference > 0, steps)
    changed = filled + (element("path", d=reference_line, class_="contour reference-line") if reference_line else "")
    contents = [(heading, ""), ("Reference", _contours(reference, steps, titles))]
    if case.before is not None:
        contents += [(before, _contours(slice_of(case.before), steps, titles))]
    contents += [
        (after, _contours(slice_of(case.after), steps, titles)),
        ("Changed voxels" if case.before is not None else "Errors", changed),
    ]
    base = f"{name}-image"
    panels = []
    for number, (heading, drawn) in enumerate(contents):
        shared = element("g", picture, id=base) if number == 0 else element("use", href=f"#{base}")
        label = f"{case.case}, {plane} plane: {heading}"
        content = element("title", escape(label)) + shared + drawn + _letters(SIDES[across] + SIDES[up], width, height)
        panels.append((heading, element("svg", content, viewBox=f"0 0 {width:.6g} {height:.6g}", role="img", class_="cut")))
    return Cut(plane, case.axes[through].place(point[through]), tuple(panels))


def _changes(name: str, changes: Array, steps: Sequence[float], pitch: float) -> str:
    """Return the changed voxels, each kind with its color and pattern; the pitch of the patterns is in mm."""
    unit = f"{pitch:.4g}"
    fills = {GAINED: CHANGE_COLORS[GAINED], LOST: f"url(#{name}-hatched)", RELABELED: f"url(#{name}-dotted)"}
    square = element("rect", width=unit, height=unit, fill=CHANGE_COLORS[LOST])
    stripe = element("rect", width=f"{0.4 * pitch:.4g}", height=unit, fill_opacity="0.5")
    dot = element("circle", cx=f"{0.5 * pitch:.4g}", cy=f"{0.5 * pitch:.4g}", r=f"{0.28 * pitch:.4g}", fill_opacity="0.6")
    options = {"width": unit, "height": unit, "patternUnits": "userSpaceOnUse"}
    patterns = element("pattern", square + stripe, id=f"{name}-hatched", patternTransform="rotate(45)", **options)
    patterns += element("pattern", square.replace(CHANGE_COLORS[LOST], CHANGE_COLORS[RELABELED]) + dot, id=f"{name}-dotted", **options)
    filled = "".join(
        element("path", element("title", kind), d=filled_path(changes == number, steps), class_=f"change {kind}", fill=fills[number])
        for number, kind in CHANGE_KINDS.items()
        if (changes == number).any()
    )
    return element("defs", patterns) + filled if filled else ""


def contour_path(mask: Bool, steps: Sequence[float]) -> str:
    """Return the outline of a mask, (rows, columns), along the edges of its voxels as an SVG path in mm; `steps` of columns and rows."""
    padded = np.pad(mask, 1)
    parts = []
    for row, column, length in _runs(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        parts.append(f"M{_mm(column * steps[0])} {_mm(row * steps[1])}h{_mm(length * steps[0])}")
    for column, row, length in _runs((padded[1:-1, 1:] != padded[1:-1, :-1]).T):
        parts.append(f"M{_mm(column * steps[0])} {_mm(row * steps[1])}v{_mm(length * steps[1])}")
    return "".join(parts)


def filled_path(mask: Bool, steps: Sequence[float]) -> str:
    """Return the voxels of a mask as rows of rectangles; arguments as in `contour_path`."""
    return "".join(
        f"M{_mm(column * steps[0])} {_mm(row * steps[1])}h{_mm(length * steps[0])}v{_mm(steps[1])}h{_mm(-length * steps[0])}z"
        for row, column, length in _runs(mask)
    )


def _runs(mask: Bool) -> list[tuple[int, int, int]]:
    """Return row, first column and length of each run of True in a row."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return [(int(row), int(start), int(end - start)) for row, start, end in zip(rows, starts, ends, strict=True)]


def _contours(labels: Array, steps: Sequence[float], titles: Mapping[int, str]) -> str:
    drawn = []
    for label in foreground_labels(labels):
        path = contour_path(labels == label, steps)
        title = element("title", escape(titles.get(label, f"label {label}")))
        drawn.append(element("path", title, d=path, class_="contour", style=f"stroke:{label_color(label)}"))
    return "".join(drawn)


def _letters(edges: str, width: float, height: float) -> str:
    size = 0.075 * max(min(width, height), 0.6 * max(width, height))
    middle, gap = height / 2 + 0.35 * size, 0.3 * size
    places = ((gap, middle, "start"), (width - gap, middle, "end"), (width / 2, height - gap, "middle"), (width / 2, size, "middle"))
    return "".join(
        element("text", letter, x=f"{x:.4g}", y=f"{y:.4g}", text_anchor=anchor, font_size=f"{size:.4g}", class_="side")
        for letter, (x, y, anchor) in zip(edges, places, strict=True)
    )


def _mm(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
