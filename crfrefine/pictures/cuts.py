"""The planes of a preview: cut through a structure and the largest change, cropped, enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, grown
from crfrefine.base.array_types import Array, Float32, Float64, Range
from crfrefine.pictures.drawing import (
    SMALL,
    Canvas,
    Colors,
    Levels,
    Pixels,
    enlarge,
    label_levels,
    outline,
    resize_gray,
)
from crfrefine.pictures.planes import (
    CHANGE_WINDOW_MM,
    PLANES,
    Voxel,
    best_view,
    box_of,
    choose_modality,
    choose_point,
    choose_window,
    describe_plane,
    largest_change,
    planes_of,
    upright_axes,
)

# Half of the width and height of the part around the largest change that is enlarged, if it is at
# most so much of the plane.
_REACH_MM = 40.0  # shown on each side of a voxel that is given
_ZOOM_MM = (24.0, 16.0)
_ZOOM_SHARE = 0.25
_MARGIN_SHARE = 0.12  # of the largest extent, around the structure
_DIMMED = 0.55  # share of the image's brightness below changed voxels


class Plane(NamedTuple):
    """One cut through the volume, ready to show.

    Arrays are (rows, columns) with the first row at the top.
    """

    name: str  # such as "axial"
    # Letters of the patient's sides at the left, right, bottom and top; empty if unknown.
    edges: str
    size_mm: Range  # width and height
    image: Levels  # gray values
    # Labels of the network, "before", after refinement, "refined", and of the "reference" if it is
    # shown.
    maps: dict[str, Array]
    # Column and row of the largest change, and mm to the right and down to the frame around it.
    # None means no frame.
    frame: tuple[int, int, float, float] | None = None

    def draw(
        self,
        canvas: Canvas,
        panel: str,
        corner: Pixels,
        size: Pixels,
        colors: Colors,
    ) -> None:
        """Draw the plane in the middle of a panel, in true proportions.

        Args:
            canvas: the picture.
            panel: "image", the name of a map in `maps`, whose contours are drawn, or "changes". The
                image and the changes have the frame.
            corner: the left upper one of the panel.
            size: of the panel, in pixels to the right and down.
            colors: those of the labels.
        """
        width_mm, height_mm = self.size_mm
        scale = min(size[0] / width_mm, size[1] / height_mm)
        width = max(1, round(width_mm * scale))
        height = max(1, round(height_mm * scale))
        left = corner[0] + (size[0] - width) // 2
        top = corner[1] + (size[1] - height) // 2
        share = _DIMMED if panel == "changes" else 1.0
        pixels = resize_gray(self.image, (width, height), share)
        if panel in self.maps:
            labels = enlarge(self.maps[panel], (width, height))
            is_line = outline(labels)
            pixels[is_line] = label_levels(labels[is_line], colors)
        elif panel == "changes":
            before = enlarge(self.maps["before"], (width, height))
            after = enlarge(self.maps["refined"], (width, height))
            # Changed voxels have the color of the new label; white is background.
            np.copyto(pixels, label_levels(after, colors), where=before != after)
        canvas.paste(pixels, (left, top))
        if self.frame is not None and panel in ("image", "changes"):
            column, row, across_mm, down_mm = self.frame
            rows, columns = self.image.shape
            x = round((column + 0.5) * width / columns)
            y = round((row + 0.5) * height / rows)
            across = round(across_mm * scale)
            down = round(down_mm * scale)
            first = (left + max(0, x - across), top + max(0, y - down))
            last = (left + min(x + across, width - 1), top + min(y + down, height - 1))
            canvas.frame((*first, *last))
        if panel == "image":
            canvas.sides(self.edges, (left, top), (width, height))
            place = (corner[0] + 5, corner[1] + size[1] - 4)
            canvas.text(place, self.name, SMALL, anchor="ld", has_edge=True)


def cut_planes(
    image: Float32 | None,
    before: Array,
    after: Array,
    spacing: Sequence[float],
    affine: Float64 | None,
    modality_names: Sequence[str] = (),
    reference: Array | None = None,
    through: Sequence[int] | None = None,
) -> tuple[list[Plane], str]:
    """Return the planes to show, upright if the orientation is known, and cropped.

    They go through a voxel that is given, or else through the structure, and through the largest
    change if those do not show it. If the change is small beside its plane, the last one is
    enlarged. With them comes a line about the image. Arguments are those of `draw_preview`.
    """
    maps = {"before": before, "refined": after}
    if reference is not None:
        maps["reference"] = reference
    volume = _Volume(image, maps, spacing, affine)
    changed = volume.maps["before"] != volume.maps["refined"]
    point = choose_point([*volume.maps.values()], changed)
    numbers = planes_of(changed.shape)
    framed: dict[int, Voxel] = {}  # the voxel that has a frame in a plane
    frame_mm = (CHANGE_WINDOW_MM, CHANGE_WINDOW_MM)
    further = []  # planes through the largest change
    peak = largest_change(changed, volume.steps)
    if through is not None:
        point = volume.crop_around(through, before.shape)
        framed = dict.fromkeys(numbers, point)
    elif peak is not None:
        view, is_near = best_view(changed, peak, point, volume.steps)
        zoomed = volume.zoom(view, peak)
        if zoomed is not None:
            frame_mm = _ZOOM_MM
            framed[view] = peak
        if not is_near:
            cut = volume.cut(view, peak, volume.crop, peak, frame_mm)
            further.append(cut._replace(name=f"change, {cut.name}"))
            framed = {}
        if zoomed is not None:
            further.append(zoomed)
    planes = []
    for number in numbers:
        planes.append(volume.cut(number, point, volume.crop, framed.get(number), frame_mm))
    planes += further
    if image is None:
        return planes, "no image"
    shown = "image"
    if len(image) > 1:
        shown = f"modality {volume.modality + 1} of {len(image)}"
    if len(modality_names) == len(image):
        shown += f": {modality_names[volume.modality]}"
    if len(image) > 1:
        shown += ", with the highest contrast at the borders of the labels"
    return planes, f"{shown}; black to white: {volume.window}"


class _Volume:
    """The upright volume to cut: the modality that shows most, and label maps."""

    def __init__(
        self,
        image: Float32 | None,
        maps: Mapping[str, Array],
        spacing: Sequence[float],
        affine: Float64 | None,
    ) -> None:
        """Turn the arrays upright, and choose the shown part.

        It is chosen in the upright volume: of two equal planes, the same one must be shown whatever
        the stored orientation.
        """
        num_dims = maps["before"].ndim
        self.upright = upright = upright_axes(affine, num_dims)
        self._is_upright = affine is not None and num_dims == 3
        self.maps = {kind: upright.apply(labels) for kind, labels in maps.items()}
        self.steps = [float(step) for step in upright.along(spacing)]
        before = self.maps["before"]
        modalities = [np.zeros(before.shape, np.float32)]
        if image is not None:
            modalities = [upright.apply(channel) for channel in image]
        structure = np.logical_or.reduce([labels > 0 for labels in self.maps.values()])
        windows = [choose_window(modality, structure) for modality in modalities]
        contours = self.maps["refined"] if self.maps["refined"].any() else before
        self.modality = choose_modality(modalities, windows, contours, self.steps)  # its number
        self._image = modalities[self.modality]
        self.window = windows[self.modality]
        # The part that is shown: the structure with a margin, so that small ones are visible.
        self.crop = tuple(slice(0, size) for size in structure.shape)
        box = bounding_box(structure)
        if box is not None:
            margin_mm = _MARGIN_SHARE * float(np.multiply(structure.shape, self.steps).max())
            margins = [math.ceil(margin_mm / step) for step in self.steps]
            self.crop = grown(box, margins, structure.shape)

    def crop_around(self, voxel: Sequence[int], shape: Sequence[int]) -> Voxel:
        """Show the surroundings of a voxel of the stored grid; return its upright voxel."""
        upright_box = self.upright.inverse.find_box(box_of(voxel), shape)
        margins = [round(_REACH_MM / step) for step in self.steps]
        self.crop = grown(upright_box, margins, self._image.shape)
        return tuple(part.start for part in upright_box)

    def cut(
        self,
        plane: int,
        point: Voxel,
        crop: Sequence[slice],
        framed: Voxel | None = None,
        frame_mm: Range = (0.0, 0.0),
    ) -> Plane:
        """Return a part of a plane, by its number in `PLANES`, through a voxel.

        A frame of a size is around another voxel, if that is given.
        """
        _, across, up, _ = PLANES[plane]
        index: list[int | slice] = [*point]
        index[across] = crop[across]
        index[up] = crop[up]
        shown = self.window.gray(_upwards(self._image[tuple(index)]))
        rows, columns = shown.shape
        size_mm = (columns * self.steps[across], rows * self.steps[up])
        maps = {kind: _upwards(labels[tuple(index)]) for kind, labels in self.maps.items()}
        name, edges = describe_plane(plane, is_upright=self._is_upright)
        frame = None
        if framed is not None:
            frame = (framed[across] - crop[across].start, crop[up].stop - 1 - framed[up], *frame_mm)
        return Plane(name, edges, size_mm, shown, maps, frame)

    def zoom(self, plane: int, peak: Voxel) -> Plane | None:
        """Return the part of a plane around the largest change; None if it is most of the plane."""
        _, across, up, _ = PLANES[plane]
        reach_mm = dict(zip((across, up), _ZOOM_MM, strict=True))
        margins = [round(reach_mm.get(axis, 0.0) / step) for axis, step in enumerate(self.steps)]
        enlarged = self.cut(plane, peak, grown(box_of(peak), margins, self._image.shape))
        if enlarged.image.size > _ZOOM_SHARE * self.cut(plane, peak, self.crop).image.size:
            return None
        return enlarged._replace(name=f"enlarged, {enlarged.name}")


def _upwards(plane: Array) -> Array:
    """Return (rows, columns), the last row at the top, of a plane (across, up)."""
    return plane.T[::-1]
