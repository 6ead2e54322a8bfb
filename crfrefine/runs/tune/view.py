"""The pictures of the page: a plane of a case with contours, changes, strokes and a crosshair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array, Bool
from crfrefine.errors import InputError
from crfrefine.refinement.strokes import BACKGROUND
from crfrefine.runs.pictures import drawing
from crfrefine.runs.pictures.planes import PLANES, planes_of
from crfrefine.runs.tune.case import TuneCase

# Levels of gray.
_CROSSHAIR = drawing.gray_level(0.55)
_FRAME = drawing.gray_level(1.0)
_EDGE = drawing.gray_level(0.0)
# Pixels, two of them for each one of the page: the gap between the place and the lines of the
# crosshair, dashes, letters.
_GAP = 18
_DASH = 6
_LETTER = 24
_MIN_PIXELS = 8
_MAX_PIXELS = 4096


@dataclass(frozen=True)
class View:
    """A picture that the page asks for."""

    plane: int  # number in `PLANES`
    place: Sequence[int]  # the voxel of the upright grid under the crosshair
    modality: int  # number of the image
    size: Sequence[int]  # pixels across and down
    shown: Sequence[str]  # of "network", "refined", "reference", "changes" and "strokes"
    hidden: Sequence[int]  # labels without contours and changes


def describe_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes and size of each plane of a case that is worth showing."""
    grid = case.upright_grid
    steps = case.upright_spacing
    planes = []
    for number in planes_of(grid):
        _, across, up, through = PLANES[number]
        planes.append(
            {
                "number": number,
                "name": case.pose.describe(number)[0],
                "across": across,
                "up": up,
                "through": through if len(grid) == 3 else None,
                "mm": [grid[across] * steps[across], grid[up] * steps[up]],
            }
        )
    return planes


def draw_plane(
    case: TuneCase, refined: Array | None, box: Box | None, view: View, strokes: Array | None = None
) -> bytes:
    """Return a picture as PNG; raise InputError if the case has no such plane.

    The refined labels cover a box of the upright grid, or all of it (None). `strokes` are (*grid)
    values as in a file of strokes; None means that nothing is drawn.
    """
    panel = _Panel(case, view)
    panel.check()
    network = panel.cut(case.network_labels)
    labels = network
    frame = None
    covered = box or tuple(slice(0, extent) for extent in case.upright_grid)
    if refined is not None and panel.crosses(covered):
        labels = panel.cover(network, refined, covered)
        frame = panel.pixels_of(*panel.part_of(covered))

    image = case.windows[view.modality].gray(panel.cut(case.image[view.modality]))
    pixels = drawing.resize_gray(image, panel.size)
    network_pixels = panel.enlarge(network)
    label_pixels = panel.enlarge(labels)
    if "changes" in view.shown:
        is_changed = network_pixels != label_pixels
        pixels[is_changed] = drawing.label_levels(label_pixels[is_changed])
    if "strokes" in view.shown and strokes is not None:
        _draw_strokes(pixels, drawing.enlarge(panel.cut(strokes), panel.size))
    if "reference" in view.shown and case.labels is not None:
        reference = panel.enlarge(panel.cut(case.labels))
        pixels[drawing.outline(reference)] = drawing.WHITE
    is_refined = np.zeros(pixels.shape, bool)
    if "refined" in view.shown and frame is not None:
        is_refined[frame] = drawing.outline(label_pixels)[frame]
        pixels[is_refined] = drawing.label_levels(label_pixels[is_refined])
    if "network" in view.shown:
        _draw_dashed_contours(pixels, network_pixels, is_refined)
    panel.draw_crosshair(pixels)
    return panel.png(pixels, None if box is None else frame)


# Rows and columns of an array.
_Part = tuple[slice, slice]


class _Panel:
    """A plane of a case that fills a picture."""

    def __init__(self, case: TuneCase, view: View) -> None:
        self._case = case
        self._view = view
        self.size = (view.size[0], view.size[1])

    def check(self) -> None:
        """Raise InputError unless the case has the plane and the modality, and the size is sane."""
        has_plane = self._case.has_plane(self._view.plane, self._view.place)
        has_modality = 0 <= self._view.modality < len(self._case.image)
        has_size = all(_MIN_PIXELS <= pixels <= _MAX_PIXELS for pixels in self.size)
        if not (has_plane and has_modality and has_size):
            raise InputError("no such plane")

    @property
    def _axes(self) -> tuple[int, int]:
        """The axes of the upright grid from left to right, and from bottom to top."""
        _, across, up, _ = PLANES[self._view.plane]
        return across, up

    @property
    def _scale(self) -> tuple[float, float]:
        """Pixels per voxel across and up."""
        across, up = self._axes
        grid = self._case.upright_grid
        return self.size[0] / grid[across], self.size[1] / grid[up]

    def cut(self, array: Array, corner: Sequence[int] = (0, 0, 0)) -> Array:
        """Return the plane, (rows, columns), of an array that begins at a voxel of the grid."""
        place = [at - first for at, first in zip(self._view.place, corner, strict=False)]
        return self._case.plane(array, self._view.plane, place).T[::-1]

    def enlarge(self, labels: Array) -> Array:
        """Return the labels of pixels, without the hidden ones."""
        is_hidden = np.isin(labels, self._view.hidden)
        return drawing.enlarge(np.where(is_hidden, 0, labels), self.size)

    def crosses(self, box: Box) -> bool:
        """Return whether the plane goes through a box of the upright grid."""
        fixed = set(range(len(box))) - set(self._axes)
        place = self._view.place
        return all(box[axis].start <= place[axis] < box[axis].stop for axis in fixed)

    def part_of(self, box: Box) -> _Part:
        """Return the rows and columns of the plane that a box of the upright grid covers."""
        across, up = self._axes
        num_rows = self._case.upright_grid[up]
        return slice(num_rows - box[up].stop, num_rows - box[up].start), box[across]

    def cover(self, labels: Array, refined: Array, box: Box) -> Array:
        """Return a plane of labels with those that were refined in a box of the upright grid."""
        covered = labels.copy()
        covered[self.part_of(box)] = self.cut(refined, [part.start for part in box])
        return covered

    def pixels_of(self, rows: slice, columns: slice) -> _Part:
        """Return the rows and columns of pixels of a part of the plane."""
        across, up = self._scale
        return (
            slice(round(rows.start * up), round(rows.stop * up)),
            slice(round(columns.start * across), round(columns.stop * across)),
        )

    def draw_crosshair(self, pixels: Array) -> None:
        """Draw lines through the place, with a gap around it."""
        across, up = self._axes
        place = self._view.place
        x = int((place[across] + 0.5) * self._scale[0])
        y = int((self._case.upright_grid[up] - place[up] - 0.5) * self._scale[1])
        pixels[y, abs(np.arange(self.size[0]) - x) >= _GAP] = _CROSSHAIR
        pixels[abs(np.arange(self.size[1]) - y) >= _GAP, x] = _CROSSHAIR

    def png(self, pixels: Array, frame: _Part | None) -> bytes:
        """Return the picture with a frame, if any, and the letters of the sides of the body."""
        canvas = drawing.Canvas(self.size, _EDGE)
        canvas.paste(pixels, (0, 0))
        if frame is not None and frame[0].stop > 0:
            rows, columns = frame
            corners = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            canvas.frame(corners, _FRAME)
        letters = self._case.pose.describe(self._view.plane)[1]
        canvas.sides(letters, (0, 0), self.size, _LETTER, _FRAME, _EDGE)
        return canvas.png()


def _draw_strokes(pixels: Array, strokes: Array) -> None:
    """Color the pixels of strokes; background is white."""
    is_drawn = strokes > 0
    labels = np.where(strokes == BACKGROUND, 0, strokes)
    pixels[is_drawn] = drawing.label_levels(labels[is_drawn])


def _draw_dashed_contours(pixels: Array, network: Array, is_refined: Bool) -> None:
    """Draw the network's contours; they stay visible on the refined ones."""
    is_contour = drawing.outline(network)
    # Else dots would not be seen on the refined contour.
    pixels[is_refined & is_contour] = _EDGE
    height, width = pixels.shape
    down, right = np.ogrid[:height, :width]
    is_contour &= (down // _DASH + right // _DASH) % 2 == 0
    pixels[is_contour] = drawing.label_levels(network[is_contour])
