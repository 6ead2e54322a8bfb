"""The planes of the page, drawn as PNG: gray values, contours, changed voxels, the refined box and the crosshair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError
from crfrefine.runs.pictures import drawing
from crfrefine.runs.pictures.planes import PLANES, planes_of

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array
    from crfrefine.runs.tune.case import TuneCase

_CROSSHAIR, _FRAME, _EDGE = (drawing.gray_level(share) for share in (0.55, 1.0, 0.0))
# Pixels, of which the page shows two as one: the gap between the place and the lines of the crosshair, dashes, letters.
_GAP, _DASH, _LETTER = 18, 6, 24
_MAX_PIXELS = 4096


@dataclass(frozen=True)
class View:
    """A picture that the page asks for."""

    plane: int  # number in `PLANES`
    place: Sequence[int]  # the voxel of the upright grid under the crosshair
    modality: int  # number of the image
    size: Sequence[int]  # pixels across and down
    shown: Sequence[str]  # of "network", "refined", "reference" and "changes"
    hidden: Sequence[int]  # labels without contours and changes


def describe_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes and size of each plane of a case that is worth showing."""
    grid, steps, planes = case.upright_grid, case.upright_spacing, []
    for number in planes_of(grid):
        _, across, up, through = PLANES[number]
        axes = {"across": across, "up": up, "through": through if len(grid) == 3 else None}
        size = [grid[across] * steps[across], grid[up] * steps[up]]
        planes.append({"number": number, "name": case.pose.describe(number)[0], **axes, "mm": size})
    return planes


def draw_plane(case: TuneCase, refined: Array | None, box: Box | None, view: View) -> bytes:
    """Return a picture as PNG; the refined labels cover a box of the upright grid, or all of it (None)."""
    grid, place, size = case.upright_grid, view.place, (view.size[0], view.size[1])
    is_there = case.has_voxel(place) and view.plane in planes_of(grid) and 0 <= view.modality < len(case.image)
    if not is_there or not all(8 <= pixels <= _MAX_PIXELS for pixels in size):
        raise InputError("no such plane")
    _, across, up, _ = PLANES[view.plane]
    covered = box or tuple(slice(0, extent) for extent in grid)

    def cut(array: Array, corner: Sequence[int] = (0, 0, 0)) -> Array:
        """Return the plane of an array that begins at a voxel of the upright grid."""
        where = tuple(slice(None) if axis in (across, up) else at - corner[axis] for axis, at in enumerate(place))
        plane: Array = case.pose.turn(array)[where].T[::-1]
        return plane

    def enlarge(labels: Array) -> Array:
        return drawing.enlarge(np.where(np.isin(labels, view.hidden), 0, labels), size)

    before = after = cut(case.network_labels)
    scale = size[0] / grid[across], size[1] / grid[up]  # pixels per voxel
    frame: tuple[slice, ...] = (slice(0), slice(0))  # rows and columns of the refined pixels
    crossed = (covered[axis].start <= at < covered[axis].stop for axis, at in enumerate(place) if axis not in (across, up))
    if refined is not None and all(crossed):
        rows, columns = slice(grid[up] - covered[up].stop, grid[up] - covered[up].start), covered[across]
        after = before.copy()
        after[rows, columns] = cut(refined, [part.start for part in covered])
        frame = tuple(slice(round(part.start * step), round(part.stop * step)) for part, step in ((rows, scale[1]), (columns, scale[0])))
    pixels = drawing.resize_gray(case.windows[view.modality].gray(cut(case.image[view.modality])), size)
    network, labels = enlarge(before), enlarge(after)
    if "changes" in view.shown:
        pixels = np.where(network != labels, drawing.label_levels(labels), pixels)
    if "reference" in view.shown and case.labels is not None:
        pixels[drawing.outline(enlarge(cut(case.labels)))] = drawing.WHITE
    is_refined = np.zeros(pixels.shape, bool)
    if "refined" in view.shown:
        is_refined[frame] = drawing.outline(labels)[frame]
        pixels[is_refined] = drawing.label_levels(labels[is_refined])
    if "network" in view.shown:
        is_network = drawing.outline(network)
        pixels[is_refined & is_network] = _EDGE  # Else dots would not be seen on the refined contour.
        down, right = np.ogrid[: size[1], : size[0]]
        is_network &= (down // _DASH + right // _DASH) % 2 == 0
        pixels[is_network] = drawing.label_levels(network[is_network])
    x, y = int((place[across] + 0.5) * scale[0]), int((grid[up] - place[up] - 0.5) * scale[1])
    pixels[y, abs(np.arange(size[0]) - x) >= _GAP] = _CROSSHAIR
    pixels[abs(np.arange(size[1]) - y) >= _GAP, x] = _CROSSHAIR
    canvas = drawing.Canvas(size, _EDGE)
    canvas.paste(pixels, (0, 0))
    if box is not None and frame[0].stop:
        canvas.frame((frame[1].start, frame[0].start, frame[1].stop - 1, frame[0].stop - 1), _FRAME)
    canvas.sides(case.pose.describe(view.plane)[1], (0, 0), size, _LETTER, _FRAME, _EDGE)
    return canvas.png()
