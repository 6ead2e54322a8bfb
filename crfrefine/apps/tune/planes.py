"""The planes of the page, drawn as PNG: gray values, contours, changed voxels, the refined box and the crosshair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError
from crfrefine.pages.pictures import drawing
from crfrefine.pages.pictures.planes import PLANES, planes_of

if TYPE_CHECKING:
    from crfrefine.apps.tune.case import TuneCase
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array

_CROSSHAIR, _FRAME, _EDGE = (drawing.gray_level(share) for share in (0.55, 1.0, 0.0))
# Pixels; the page shows two of them as one.
_GAP = 18  # Between the place and the lines of the crosshair.
_DASH = 6
_LETTER = 24
_MAX_PIXELS = 4096


@dataclass(frozen=True)
class View:
    """A picture that the page asks for."""

    plane: int  # Number in `PLANES`.
    place: Sequence[int]  # The voxel of the upright grid under the crosshair.
    modality: int  # Number of the image.
    size: Sequence[int]  # Pixels across and down.
    shown: Sequence[str]  # Of "network", "refined", "reference" and "changes".
    hidden: Sequence[int]  # Labels without contours and changes.


def describe_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes and size of each plane of a case that is worth showing."""
    grid, steps = case.upright_grid, case.upright_spacing
    planes = []
    for number in planes_of(grid):
        name, across, up = PLANES[number]
        planes.append(
            {
                "number": number,
                "name": name if case.pose.sides else "image" if len(grid) == 2 else f"axes {across + 1} and {up + 1}",
                "across": across,
                "up": up,
                "through": 3 - across - up if len(grid) == 3 else None,
                "mm": [grid[across] * steps[across], grid[up] * steps[up]],
            }
        )
    return planes


def draw_plane(case: TuneCase, refined: Array | None, box: Box | None, view: View) -> bytes:
    """Return a picture as PNG; the refined labels cover a box, or the whole grid (None)."""
    grid, place, size = case.upright_grid, view.place, (view.size[0], view.size[1])
    is_there = len(place) == len(grid) and all(0 <= at < extent for at, extent in zip(place, grid, strict=True))
    is_there = is_there and view.plane in planes_of(grid) and 0 <= view.modality < len(case.image)
    if not is_there or not all(8 <= pixels <= _MAX_PIXELS for pixels in size):
        raise InputError("no such plane")
    _, across, up = PLANES[view.plane]
    where = tuple(slice(None) if axis in (across, up) else at for axis, at in enumerate(place))

    def cut(array: Array) -> Array:
        plane: Array = case.pose.turn(array)[where].T[::-1]
        return plane

    def enlarge(plane: Array) -> Array:
        labels = drawing.enlarge(plane, size)
        return np.where(np.isin(labels, view.hidden), 0, labels) if view.hidden else labels

    # Pixels per voxel; left, top, right and bottom of the box in pixels.
    scale = size[0] / grid[across], size[1] / grid[up]
    frame = (0, 0, *size)
    before = cut(case.network_labels)
    after = before if refined is None else cut(refined) if box is None else before.copy()
    if refined is not None and box is not None:
        part = case.upright_box(box)
        inside = [at - axis.start for at, axis in zip(place, part, strict=True)]
        if all(axis in (across, up) or 0 <= inside[axis] < part[axis].stop - part[axis].start for axis in range(len(grid))):
            local = tuple(slice(None) if axis in (across, up) else at for axis, at in enumerate(inside))
            top, bottom = grid[up] - part[up].stop, grid[up] - part[up].start
            after[top:bottom, part[across]] = case.pose.turn(refined)[local].T[::-1]
            left, right = part[across].start, part[across].stop
            frame = (round(left * scale[0]), round(top * scale[1]), round(right * scale[0]), round(bottom * scale[1]))
        else:
            frame = (0, 0, 0, 0)
    gray = case.windows[view.modality].gray(cut(case.image[view.modality]))
    pixels = (drawing.resize_gray(gray, size) * (drawing.WHITE / 255)).astype(np.uint8)
    network, labels = enlarge(before), enlarge(after)
    if "changes" in view.shown:
        pixels = np.where(network != labels, drawing.label_levels(labels), pixels)
    if "reference" in view.shown and case.labels is not None:
        pixels[drawing.outline(enlarge(cut(case.labels)))] = drawing.WHITE
    is_refined = np.zeros(pixels.shape, bool)
    if "refined" in view.shown and refined is not None:
        window = (slice(frame[1], frame[3]), slice(frame[0], frame[2]))
        is_refined[window] = drawing.outline(labels)[window]
        pixels[is_refined] = drawing.label_levels(labels[is_refined])
    if "network" in view.shown:
        is_network = drawing.outline(network)
        rows, columns = np.nonzero(is_network)
        is_dot = (rows // _DASH + columns // _DASH) % 2 == 0
        pixels[is_refined & is_network] = _EDGE  # Else dots would not be seen on the refined contour.
        rows, columns = rows[is_dot], columns[is_dot]
        pixels[rows, columns] = drawing.label_levels(network[rows, columns])
    x, y = int((place[across] + 0.5) * scale[0]), int((grid[up] - place[up] - 0.5) * scale[1])
    for line in (pixels[y, : max(0, x - _GAP)], pixels[y, x + _GAP :], pixels[: max(0, y - _GAP), x], pixels[y + _GAP :, x]):
        line[:] = _CROSSHAIR
    canvas = drawing.Canvas(size, _EDGE)
    canvas.paste(pixels, (0, 0))
    if box is not None and frame[2]:
        canvas.frame((frame[0], frame[1], frame[2] - 1, frame[3] - 1), _FRAME)
    if case.pose.sides:
        canvas.sides(case.pose.sides[across] + case.pose.sides[up], (0, 0), size, _LETTER, _FRAME, _EDGE)
    return canvas.png()
