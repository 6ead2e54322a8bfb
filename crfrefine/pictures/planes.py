"""The choice of the content of a picture of a case, upright: planes, modality, and gray values.

Planes go through the structure and the largest change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label, maximum_filter, minimum_filter, uniform_filter

from crfrefine.arrays.label_maps import Box, bounding_box, grown
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
from crfrefine.base.axes import Axes
from crfrefine.base.geometry import orientation_codes

SIDES = ("RL", "PA", "IS")  # letters at the low and the high end of each axis of an upright volume
# Name and axes of each plane of an upright volume: across the picture, up the picture, and through
# it.
PLANES = (("axial", 0, 1, 2), ("coronal", 0, 2, 1), ("sagittal", 1, 2, 0))
CHANGE_WINDOW_MM = 12.0  # edge of the box in which changed voxels are counted
# Planes with this share of the largest cross-section show the structure equally well; the plane
# that changed most among them is shown.
_LARGE_SECTION = 0.8
# Images with a smaller value are taken for CT in Hounsfield units: air is -1000, and no other
# modality has such numbers.
LOWEST_WITHOUT_AIR = -500.0
_BORDER_MM = 3.0
_MAX_SAMPLES = 1_000_000
_BACKGROUND_SHARE = 0.1


def planes_of(grid: Sequence[int]) -> list[int]:
    """Return the numbers of the planes that are more than a line, unlike those across one slice.

    A 2-D grid, and one without such planes, has the first plane only.
    """
    if len(grid) != 3:
        return [0]
    planes = []
    for number, (_, across, up, _) in enumerate(PLANES):
        if grid[across] > 1 and grid[up] > 1:
            planes.append(number)
    return planes or [0]


def upright_axes(affine: Float64 | None, num_dims: int) -> Axes:
    """Return how to turn an array on a grid upright, as nearly as its axes allow.

    Its axes then go from right to left, posterior to anterior, inferior to superior. The patient's
    right is shown at the left, as in radiology. Grids without an affine and grids that are not 3-D
    are not turned.
    """
    if affine is None or num_dims != 3:
        return Axes(tuple(range(num_dims)))
    return Axes.toward("LAS", orientation_codes(affine))


def describe_plane(plane: int, *, is_upright: bool) -> tuple[str, str]:
    """Return the name of a plane of `PLANES`, and the letters of its sides.

    These are at its left, right, bottom and top; none unless it is of an upright volume.
    """
    name, across, up, _ = PLANES[plane]
    if is_upright:
        return (name, SIDES[across] + SIDES[up])
    return (f"axes {across + 1}, {up + 1}", "")


Voxel = tuple[int, ...]  # an index per axis


def choose_point(maps: Sequence[Array], changed: Bool) -> Voxel:
    """Choose where planes go through the structure of a case; they need not meet inside it.

    The structure is the largest connected part of what most maps have in common. Along each axis,
    planes with a large cross-section of it qualify, and the one with the most changes is taken; if
    several have as many, that with the largest section, and the middle one of equals. Without
    foreground, and so without a change, the planes go through the middle.

    Args:
        maps: label maps, (*grid), where 0 is background.
        changed: (*grid), where two of them differ.
    """
    votes = np.add.reduce([labels > 0 for labels in maps], dtype=np.uint8)
    box = bounding_box(votes > 0)
    if box is None:
        return tuple(size // 2 for size in changed.shape)
    # Parts are connected only over faces, so that fewer bridges lead to the surroundings.
    parts, _ = label(votes[box] == votes.max())
    sizes = np.bincount(parts.ravel(order="K"))
    sizes[0] = 0
    structure = np.zeros(votes.shape, bool)
    structure[box] = parts == sizes.argmax()
    point = []
    for axis in range(changed.ndim):
        others = tuple(other for other in range(changed.ndim) if other != axis)
        sections = structure.sum(axis=others)
        changes = changed.sum(axis=others)
        changes[sections < _LARGE_SECTION * sections.max()] = -1
        ranks = list(zip(changes.tolist(), sections.tolist(), strict=True))
        best = [index for index, rank in enumerate(ranks) if rank == max(ranks)]
        point.append(best[len(best) // 2])
    return tuple(point)


def largest_change(changed: Bool, steps: Sequence[float]) -> Voxel | None:
    """Return the changed voxel with the most changed voxels around it; None without changes."""
    box = bounding_box(changed)
    if box is None:
        return None
    inside = changed[box]
    reaches = zip(_change_reaches(steps), inside.shape, strict=True)
    size = [2 * min(reach, extent - 1) + 1 for reach, extent in reaches]
    # Only changed voxels qualify: a plane next to the change would show nothing.
    density = uniform_filter(inside.astype(np.float32), size, mode="constant")
    density[~inside] = -1
    densest = np.unravel_index(int(density.argmax()), density.shape)
    return tuple(int(index) + part.start for index, part in zip(densest, box, strict=True))


def _change_reaches(steps: Sequence[float]) -> list[int]:
    """Return half of the box in which changed voxels are counted, in voxels along each axis."""
    return [round(CHANGE_WINDOW_MM / 2 / step) for step in steps]


def box_of(voxel: Sequence[int]) -> Box:
    """Return the box of a single voxel."""
    return tuple(slice(index, index + 1) for index in voxel)


def best_view(changed: Bool, peak: Voxel, point: Voxel, steps: Sequence[float]) -> tuple[int, bool]:
    """Return the plane that shows most changed voxels around the largest change, by its number.

    Planes count that go through the structure near enough to show the change; else all, and then
    the second value is False.
    """
    if changed.ndim != 3:
        return 0, True
    planes = planes_of(changed.shape)
    near = []
    for plane in planes:
        through = PLANES[plane][-1]
        if abs(peak[through] - point[through]) * steps[through] <= CHANGE_WINDOW_MM / 2:
            near.append(plane)
    around = grown(box_of(peak), _change_reaches(steps), changed.shape)

    def num_changed(plane: int) -> int:
        through = PLANES[plane][-1]
        cut: list[int | slice] = [*around]
        cut[through] = peak[through]
        return int(np.count_nonzero(changed[tuple(cut)]))

    return max(near or planes, key=num_changed), bool(near)


@dataclass(frozen=True)
class Window:
    """The intensities that become black and white."""

    low: float  # black
    high: float  # white, above `low`
    name: str = ""  # such as "lung"; empty if it comes from the image's percentiles

    def gray(self, image: Float32) -> Labels:
        """Return gray values from 0 to 255.

        NaN is black, as some programs write it outside of the brain.
        """
        values = image.astype(np.float32)
        values = np.nan_to_num(values, nan=self.low, posinf=self.high, neginf=self.low)
        levels = (values - self.low) * (255 / (self.high - self.low))
        return np.clip(levels, 0, 255).round().astype(np.uint8)

    def __str__(self) -> str:
        text = f"{self.low:.4g} to {self.high:.4g}".replace("-", "\u2212")
        if self.name:
            text += f" HU ({self.name})"
        return text


# Usual windows of CT, in Hounsfield units.
SOFT_TISSUE = Window(-160, 240, "soft tissue")
LUNG = Window(-1350, 150, "lung")
BONE = Window(-450, 1050, "bone")


def choose_window(image: Float32, structure: Bool) -> Window:
    """Return the window of a modality.

    CT has a usual one, by the median of the structure. Other modalities have one by the percentiles
    of image and structure.
    """
    inside = image[structure]
    inside = inside[np.isfinite(inside)]
    step = max(1, int((image.size / _MAX_SAMPLES) ** (1 / image.ndim)))
    sample = image[(slice(None, None, step),) * image.ndim]
    if np.any((sample < LOWEST_WITHOUT_AIR) & (sample > -np.inf)):
        median = float(np.median(inside)) if inside.size else 0.0
        if median < -400:
            return LUNG
        if median > 200:
            return BONE
        return SOFT_TISSUE

    sample = sample[_is_tissue(sample)]
    if sample.size < 2:
        return Window(0.0, 1.0)
    low, high = np.percentile(sample, (0.5, 99.5)).tolist()
    if inside.size:
        low_inside, high_inside = np.percentile(inside, (2, 98)).tolist()
        low = min(low, low_inside)
        high = max(high, high_inside)
    if high > low:
        return Window(low, high)
    return Window(low - 0.5, low + 0.5)


def choose_modality(
    modalities: Sequence[Float32], windows: Sequence[Window], labels: Array, steps: Sequence[float]
) -> int:
    """Return the number of the modality that shows the borders of the labels best.

    The mean intensities of the labels explain most of its variance within 3 mm of a border (the
    correlation ratio); the first one of equals counts.

    Args:
        modalities: (*grid) each.
        windows: the window of each modality.
        labels: (*grid), unsigned.
        steps: mm between voxels along each axis.
    """
    occupied = bounding_box(labels != 0)
    if len(modalities) == 1 or occupied is None:
        return 0
    # A border is no wider than the grid, however close its voxels are.
    extents = zip(steps, labels.shape, strict=True)
    reaches = [min(max(1, round(_BORDER_MM / step)), extent - 1) for step, extent in extents]
    size = [2 * reach + 1 for reach in reaches]
    box = grown(occupied, reaches, labels.shape)
    labels = labels[box]
    highest = maximum_filter(labels, size, mode="nearest")
    is_near = highest != minimum_filter(labels, size, mode="nearest")

    shares = []
    for modality, window in zip(modalities, windows, strict=True):
        values = modality[box]
        counted = is_near & _is_tissue(values)
        if not counted.any():
            shares.append(0.0)
            continue
        clipped = np.clip(values[counted], window.low, window.high).astype(np.float64)
        groups = labels[counted].astype(np.intp)
        means = np.bincount(groups, clipped) / np.maximum(np.bincount(groups), 1)
        # A spread of rounding errors explains nothing.
        smallest = 1e-12 * (window.high - window.low) ** 2
        shares.append(float(means[groups].var() / max(clipped.var(), smallest)))
    return int(np.argmax(shares))


def _is_tissue(image: Float32) -> Bool:
    """Return where an image shows tissue: it is finite and no background.

    Background is exactly zero, or the smallest value if a tenth of the voxels have it.
    """
    is_tissue = np.isfinite(image) & (image != 0)
    if is_tissue.any():
        is_lowest = image == image[is_tissue].min()
        num_lowest = np.count_nonzero(is_lowest)
        if _BACKGROUND_SHARE * image.size <= num_lowest < np.count_nonzero(is_tissue):
            is_tissue &= ~is_lowest
    return is_tissue
