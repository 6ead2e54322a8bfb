"""The picture of one case: image, network contour, refined contour and changed voxels, in planes through the largest change.

Matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.pictures.display import LABEL_COLORS, PLANES, Upright, crop_around, display_range, find_largest_change, label_color

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

LineStyle = Literal["solid", "dashed", "dotted"]

_LINE_STYLES: tuple[LineStyle, ...] = ("solid", "dashed", "dotted")  # the next seven labels repeat the colors with another line
_NOW_BACKGROUND = "#FFFFFF"
_PAPER, _INK, _FAINT_INK = "#101114", "#F2F2F2", "#9AA0A6"
_MAX_LEGEND_ENTRIES = 12
_FINER = 5  # how much finer than voxels contours are drawn
_PANEL_WIDTH = 2.9  # inches
_TOP, _LEGEND, _MARGIN, _GAP, _CORNER = 1.0, 0.5, 0.12, 0.08, 0.28  # inches; the corner holds the names of the planes
_COLUMNS = ("image", "network", "refined", "changed voxels")


@dataclass(frozen=True)
class _Plane:
    """One cut through the volume, ready to show: arrays are (rows, columns) with the first row at the bottom."""

    name: str
    edges: tuple[str, str, str, str]  # letters of the patient's sides at the left, right, bottom and top
    size_mm: tuple[float, float]  # width, height
    image: NDArray[np.float32]
    before: NDArray[Any]
    after: NDArray[Any]


def draw_preview(
    image: NDArray[np.float32],
    before: NDArray[Any],
    after: NDArray[Any],
    spacing: Sequence[float],
    *,
    affine: NDArray[np.float64] | None = None,
    title: str = "",
    subtitle: str = "",
) -> bytes:
    """Draw the effect of the refinement on one case and return the picture as PNG.

    Args:
        image: (M, *grid) any intensity; the first modality is shown.
        before: (*grid) integer labels of the network's argmax; 0 is background.
        after: (*grid) integer labels after refinement.
        spacing: mm, one per grid axis.
        affine: (4, 4) voxel to world RAS+; with it the planes are upright and the patient's sides are named.
        title: first line, such as the case's name.
        subtitle: second line, such as its numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    planes = _cut_planes(image, before, after, spacing, affine)
    heights = [
        float(np.clip(_PANEL_WIDTH * plane.size_mm[1] / plane.size_mm[0], 0.5 * _PANEL_WIDTH, 1.6 * _PANEL_WIDTH)) for plane in planes
    ]
    width = _CORNER + len(_COLUMNS) * (_PANEL_WIDTH + _GAP) + _MARGIN
    height = _TOP + sum(heights) + len(planes) * _GAP + _LEGEND
    figure = Figure(figsize=(width, height), dpi=110, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    top = height - _TOP
    for row, (plane, panel_height) in enumerate(zip(planes, heights, strict=True)):
        for column, heading in enumerate(_COLUMNS):
            left = _CORNER + column * (_PANEL_WIDTH + _GAP)
            axes = figure.add_axes((left / width, (top - panel_height) / height, _PANEL_WIDTH / width, panel_height / height))
            _draw_panel(axes, plane, column)
            if row == 0:
                axes.set_title(heading, color=_INK, fontsize=11, pad=6)
        figure.text(
            _CORNER / 2 / width,
            (top - panel_height / 2) / height,
            plane.name,
            color=_FAINT_INK,
            fontsize=10,
            rotation=90,
            ha="center",
            va="center",
        )
        top -= panel_height + _GAP
    for text, below, color, size, weight in ((title, 0.18, _INK, 14, "bold"), (subtitle, 0.46, _FAINT_INK, 10, "normal")):
        # A $ in a case's name does not begin a formula.
        figure.text(
            _CORNER / width, 1 - below / height, _drawable(text), color=color, fontsize=size, fontweight=weight, va="top", parse_math=False
        )
    _draw_legend(figure, planes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=_PAPER, metadata={"Software": None})  # no version: equal input, equal bytes
    return buffer.getvalue()


def _cut_planes(
    image: NDArray[np.float32], before: NDArray[Any], after: NDArray[Any], spacing: Sequence[float], affine: NDArray[np.float64] | None
) -> list[_Plane]:
    """Cut the volume through its largest change, upright if the affine gives the orientation, and cropped around the labels."""
    keep = min(3, before.ndim)
    pose = Upright.of(affine, keep)
    sides = pose.sides
    shown, network, refined = pose.turn(image[0]), pose.turn(before), pose.turn(after)
    steps = [float(spacing[axis]) for axis in pose.axis_order]
    # Searched in the upright volume: of two equal changes, the same one must be shown whatever the stored orientation.
    point = find_largest_change(network, refined, [*steps, *(float(step) for step in spacing[keep:])])
    for moment in reversed(point[keep:]):  # further axes (time) are fixed at the change
        shown, network, refined = shown[..., moment], network[..., moment], refined[..., moment]
    crop = crop_around((network > 0) | (refined > 0), steps)
    window = display_range(shown)
    planes = []
    for name, across, up in PLANES[: 1 if keep == 2 else 3]:
        index = tuple(crop[axis] if axis in (across, up) else point[axis] for axis in range(keep))
        cut = shown[index].T.astype(np.float32)
        planes.append(
            _Plane(
                name=name if sides else f"axes {across}, {up}",
                edges=(sides[across][0], sides[across][1], sides[up][0], sides[up][1]) if sides else ("", "", "", ""),
                size_mm=(cut.shape[1] * steps[across], cut.shape[0] * steps[up]),
                image=(np.clip(cut, *window) - window[0]) / (window[1] - window[0]),
                before=network[index].T,
                after=refined[index].T,
            )
        )
    return planes


def _draw_panel(axes: Axes, plane: _Plane, column: int) -> None:
    from matplotlib.patheffects import withStroke

    width, height = plane.size_mm
    extent = (0.0, width, 0.0, height)
    dimmed = 0.55 if _COLUMNS[column] == "changed voxels" else 1.0
    axes.imshow(plane.image * dimmed, cmap="gray", vmin=0, vmax=1, origin="lower", extent=extent, interpolation="nearest", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor(_PAPER)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if _COLUMNS[column] == "network":
        _draw_contours(axes, plane.before, plane.size_mm)
    elif _COLUMNS[column] == "refined":
        _draw_contours(axes, plane.after, plane.size_mm)
    elif _COLUMNS[column] == "changed voxels":
        axes.imshow(_paint_changes(plane.before, plane.after), origin="lower", extent=extent, interpolation="nearest", aspect="equal")
    else:
        for letter, x, y, ha, va in zip(
            plane.edges,
            (0.01, 0.99, 0.5, 0.5),
            (0.5, 0.5, 0.01, 0.99),
            ("left", "right", "center", "center"),
            ("center", "center", "bottom", "top"),
            strict=True,
        ):
            outline = [withStroke(linewidth=2, foreground=_PAPER)]
            axes.text(x, y, letter, transform=axes.transAxes, color=_INK, fontsize=8, ha=ha, va=va, path_effects=outline)


def _draw_contours(axes: Axes, labels: NDArray[Any], size_mm: tuple[float, float]) -> None:
    """Draw the border of each label along the edges of its voxels."""
    steps = size_mm[0] / labels.shape[1], size_mm[1] / labels.shape[0]
    for label in foreground_labels(labels):
        inside = labels == label
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        first_row, first_column = int(rows[0]), int(columns[0])
        inside = inside[first_row : rows[-1] + 1, first_column : columns[-1] + 1]
        # A contour cuts corners; with finer pixels it cuts off so little that the voxels stay visible.
        fine = np.pad(inside.repeat(_FINER, axis=0).repeat(_FINER, axis=1).astype(np.float32), 1)
        x = ((np.arange(fine.shape[1]) - 0.5) / _FINER + first_column) * steps[0]
        y = ((np.arange(fine.shape[0]) - 0.5) / _FINER + first_row) * steps[1]
        axes.contour(x, y, fine, levels=[0.5], colors=[label_color(label)], linewidths=1.3, linestyles=[_line_style(label)])
    axes.set_xlim(0, size_mm[0])
    axes.set_ylim(0, size_mm[1])


def _paint_changes(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float32]:
    """Return (rows, columns, 4) RGBA: each changed voxel in the color of its new label, the others transparent."""
    from matplotlib.colors import to_rgba

    painted = np.zeros((*after.shape, 4), np.float32)
    changed = before != after
    for label in np.unique(after[changed]):
        painted[changed & (after == label)] = to_rgba(_NOW_BACKGROUND if label == 0 else label_color(int(label)), 0.95)
    return painted


def _draw_legend(figure: Figure, planes: Sequence[_Plane]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = sorted({label for plane in planes for labels in (plane.before, plane.after) for label in foreground_labels(labels)})
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=label_color(label), linewidth=2.5, linestyle=_line_style(label), label=f"label {label}")
        for label in seen[:_MAX_LEGEND_ENTRIES]
    ]
    if len(seen) > _MAX_LEGEND_ENTRIES:
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(seen) - _MAX_LEGEND_ENTRIES} more"))
    if any((plane.before != plane.after).any() for plane in planes):
        handles.append(Patch(facecolor=_NOW_BACKGROUND, label="changed to background"))
    if handles:
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=min(len(handles), 7), frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.0)
        )
        for text in legend.get_texts():
            text.set_color(_INK)


def _drawable(text: str) -> str:
    """Replace characters that the font lacks with question marks; they would be drawn as boxes, with a warning."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in text)


def _line_style(label: int) -> LineStyle:
    return _LINE_STYLES[(label - 1) // len(LABEL_COLORS) % len(_LINE_STYLES)]
