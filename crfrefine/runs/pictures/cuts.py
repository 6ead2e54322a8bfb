"""The planes of a preview: cut through a structure and the largest change, cropped, enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box, grown
from crfrefine.base.array_types import Array, Bool, Float32, Float64
from crfrefine.runs.pictures.planes import (
    CHANGE_WINDOW_MM,
    PLANES,
    Upright,
    Window,
    best_view,
    choose_modality,
    choose_point,
    choose_window,
    largest_change,
    planes_of,
)

# Half of the width and height of the part around the largest change that is enlarged, if it is at
# most so much of the plane.
_ZOOM_MM = (24.0, 16.0)
_ZOOM_SHARE = 0.25


class Plane(NamedTuple):
    """One cut through the volume, ready to show.

    Arrays are (rows, columns) with the first row at the top.
    """

    name: str  # such as "axial"
    # Letters of the patient's sides at the left, right, bottom and top; empty if unknown.
    edges: str
    size_mm: tuple[float, float]  # width and height
    image: NDArray[np.uint8]  # gray values
    # Labels of the network, "before", after refinement, "refined", and of the "reference" if it is
    # shown.
    maps: dict[str, Array]
    # Column and row of the largest change, and mm to the right and down to the frame around it.
    # None: there is no frame.
    frame: tuple[int, int, float, float] | None = None


def cut_planes(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    affine: Float64 | None,
    modality_names: Sequence[str] = (),
    reference: Array | None = None,
) -> tuple[list[Plane], str]:
    """Return the planes to show, upright if the orientation is known, and cropped.

    They go through the structure, and through the largest change if those do not show it. If the
    change is small beside its plane, the last one is enlarged. With them comes a line about the
    image. Arguments are those of `draw_preview`.
    """
    # Planes are chosen in the upright volume: of two equal planes, the same one must be shown
    # whatever the stored orientation.
    pose = Upright.of(affine, before.ndim)
    channels = image
    if channels is None:
        channels = np.zeros((1, *before.shape), np.float32)
    modalities = [pose.turn(channel) for channel in channels]
    maps = {"before": pose.turn(before), "refined": pose.turn(after)}
    if reference is not None:
        maps["reference"] = pose.turn(reference)
    steps = [float(spacing[axis]) for axis in pose.axis_order]
    structure = np.logical_or.reduce([labels > 0 for labels in maps.values()])
    refined = maps["refined"]
    changed = maps["before"] != refined
    point = choose_point([*maps.values()], changed)
    windows = [choose_window(modality, structure) for modality in modalities]
    contours = refined if refined.any() else maps["before"]
    chosen = choose_modality(modalities, windows, contours, steps)

    crop = _crop(structure, steps)
    volume = _Volume(pose, modalities[chosen], windows[chosen], maps, steps, crop)
    numbers = planes_of(refined.shape)
    planes = [volume.cut(plane, point) for plane in numbers]
    peak = largest_change(changed, steps)
    if peak is not None:
        plane, is_near = best_view(changed, peak, point, steps)
        zoomed = volume.zoom(plane, peak)
        reach = _ZOOM_MM if zoomed is not None else (CHANGE_WINDOW_MM, CHANGE_WINDOW_MM)
        framed = volume.cut_through_change(plane, peak, reach)
        if not is_near:
            planes.append(framed)
        elif zoomed is not None:
            nearest = numbers.index(plane)
            planes[nearest] = planes[nearest]._replace(frame=framed.frame)
        if zoomed is not None:
            planes.append(zoomed)
    if image is None:
        return planes, "no image"
    return planes, _describe_image(len(image), chosen, modality_names, windows[chosen])


def _crop(structure: Bool, steps: Sequence[float]) -> list[slice]:
    """Return the box of a structure with a margin, so that small structures are visible."""
    extent_mm = np.array(structure.shape) * steps
    margin_mm = 0.12 * float(extent_mm.max())
    box = bounding_box(structure)
    if box is None:
        return [slice(0, size) for size in structure.shape]
    return list(grown(box, [math.ceil(margin_mm / step) for step in steps], structure.shape))


@dataclass(frozen=True)
class _Volume:
    """The upright volume to cut: a modality and label maps."""

    pose: Upright
    image: Float32
    window: Window
    maps: Mapping[str, Array]
    steps: Sequence[float]  # mm between voxels along each axis
    crop: Sequence[slice]  # the part that is shown

    def cut(self, plane: int, point: Sequence[int]) -> Plane:
        """Return a plane, by its number in `PLANES`, through a voxel."""
        _, across, up, _ = PLANES[plane]
        index: list[int | slice] = [*point]
        index[across] = self.crop[across]
        index[up] = self.crop[up]
        shown = self.window.gray(_upwards(self.image[tuple(index)]))
        rows, columns = shown.shape
        size_mm = (columns * self.steps[across], rows * self.steps[up])
        maps = {}
        for kind, labels in self.maps.items():
            maps[kind] = _upwards(labels[tuple(index)])
        name, edges = self.pose.describe(plane)
        return Plane(name, edges, size_mm, shown, maps)

    def cut_through_change(
        self, plane: int, peak: Sequence[int], reach_mm: tuple[float, float]
    ) -> Plane:
        """Return a plane through the largest change, with a frame around it."""
        _, across, up, _ = PLANES[plane]
        column = peak[across] - self.crop[across].start
        row = self.crop[up].stop - 1 - peak[up]
        cut = self.cut(plane, peak)
        return cut._replace(name=f"change, {cut.name}", frame=(column, row, *reach_mm))

    def zoom(self, plane: int, peak: Sequence[int]) -> Plane | None:
        """Return the part of a plane around the largest change; None if it is most of the plane."""
        _, across, up, _ = PLANES[plane]
        crop = list(self.crop)
        share = 1.0
        for axis, reach_mm in zip((across, up), _ZOOM_MM, strict=True):
            reach = round(reach_mm / self.steps[axis])
            stop = min(peak[axis] + reach + 1, self.image.shape[axis])
            crop[axis] = slice(max(0, peak[axis] - reach), stop)
            extent = self.crop[axis].stop - self.crop[axis].start
            share *= (crop[axis].stop - crop[axis].start) / extent
        if share > _ZOOM_SHARE:
            return None
        cut = replace(self, crop=crop).cut(plane, peak)
        return cut._replace(name=f"enlarged, {cut.name}")


def _upwards(plane: Array) -> Array:
    """Return (rows, columns), the last row at the top, of a plane (across, up)."""
    return plane.T[::-1]


def _describe_image(
    num_modalities: int, chosen: int, modality_names: Sequence[str], window: Window
) -> str:
    """Return a line about the modality that is shown."""
    shown = "image"
    if num_modalities > 1:
        shown = f"modality {chosen + 1} of {num_modalities}"
    if len(modality_names) == num_modalities:
        shown += f": {modality_names[chosen]}"
    if num_modalities > 1:
        shown += ", with the highest contrast at the borders of the labels"
    shown += f"; black to white: {window}"
    if window.name:
        shown += f" HU ({window.name})"
    return shown
