"""What to show of a case, upright: planes through the structure and the largest change, its modality, and the gray values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label, maximum_filter, minimum_filter, uniform_filter

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.array_types import Array, Bool, Float32, Float64
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
    """Return the numbers of the planes that are more than a line, as with a single slice.

    Of a 2-D grid, or without one, the first.
    """
    return [
        number
        for number, (_, across, up, _) in enumerate(PLANES)
        if len(grid) == 3 and grid[across] > 1 and grid[up] > 1
    ] or [0]


@dataclass(frozen=True)
class Upright:
    """How to turn an array to (right to left, posterior to anterior, inferior to superior), as nearly as its axes allow.

    The patient's right is shown at the left, as in radiology.
    """

    axis_order: tuple[int, ...]  # the axis of the array that becomes each axis of the upright one
    flips: tuple[bool, ...]  # whether each of these axes is reversed
    # the letters of both ends of each upright axis, such as "RL"; empty if the orientation is
    # unknown
    sides: tuple[str, ...]

    @classmethod
    def of(cls, affine: Float64 | None, num_dims: int) -> Upright:
        """Return how to turn an array on a grid.

        Grids without an affine and grids that are not 3-D are not turned.
        """
        if affine is None or num_dims != 3:
            return cls(tuple(range(num_dims)), (False,) * num_dims, ())
        codes = orientation_codes(affine)
        axis_order = tuple(next(axis for axis in range(3) if codes[axis] in pair) for pair in SIDES)
        return cls(
            axis_order,
            tuple(codes[axis] == pair[0] for axis, pair in zip(axis_order, SIDES, strict=True)),
            SIDES,
        )

    def describe(self, plane: int) -> tuple[str, str]:
        """Return the name of a plane of `PLANES`, and the letters at its left, right, bottom and top; of an unknown orientation, none."""
        name, across, up, _ = PLANES[plane]
        if self.sides:
            return (name, self.sides[across] + self.sides[up])
        return (f"axes {across + 1}, {up + 1}", "")

    def turn(self, array: Array) -> Array:
        """Return the array upright, a view; further axes stay in place."""
        array = array.transpose(*self.axis_order, *range(len(self.axis_order), array.ndim))
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


# Where to cut a volume. One index per axis: the planes through the structure, which need not meet
# inside it. The voxel of the largest change, and the number of the plane of `PLANES` that shows
# most of it; None means that a plane through the structure passes by it.
Places = tuple[tuple[int, ...], tuple[tuple[int, ...], int] | None]


def choose_places(maps: Sequence[Array], changed: Bool, steps: Sequence[float]) -> Places:
    """Choose the planes that show a case: label maps (0 is background), where they changed, and mm per grid axis.

    The structure is the largest connected part of what most maps have in common. Along each axis,
    of the planes with a large cross-section of it, the one with the most changed voxels is taken.
    Without foreground the planes go through the largest change, or the middle.
    """
    peak = _largest_change(changed, steps)
    votes = np.add.reduce([labels > 0 for labels in maps], dtype=np.uint8)
    box = bounding_box(votes > 0)
    if box is None:
        return peak or tuple(size // 2 for size in changed.shape), None
    # connected over faces: fewer bridges to its surroundings
    parts, _ = label(votes[box] == votes.max())
    sizes = np.bincount(parts.ravel(order="K"))
    sizes[0] = 0
    structure = np.zeros(votes.shape, bool)
    structure[box] = parts == sizes.argmax()
    point = tuple(_best_plane(structure, changed, axis) for axis in range(changed.ndim))
    if peak is None or changed.ndim != 3:
        return point, None
    shown = planes_of(changed.shape)
    if any(
        abs(peak[axis] - point[axis]) * steps[axis] <= CHANGE_WINDOW_MM / 2
        for axis in [PLANES[plane][-1] for plane in shown]
    ):
        return point, None
    reach = [round(CHANGE_WINDOW_MM / 2 / step) for step in steps]
    around = [
        slice(max(0, place - most), place + most + 1)
        for place, most in zip(peak, reach, strict=True)
    ]
    cuts = {
        plane: tuple(peak[axis] if axis == PLANES[plane][-1] else around[axis] for axis in range(3))
        for plane in shown
    }
    return point, (peak, max(shown, key=lambda plane: np.count_nonzero(changed[cuts[plane]])))


def _largest_change(changed: Bool, steps: Sequence[float]) -> tuple[int, ...] | None:
    """Return the changed voxel with the most changed voxels around it; None without changes."""
    box = bounding_box(changed)
    if box is None:
        return None
    inside = changed[box]
    size = [
        2 * min(round(CHANGE_WINDOW_MM / 2 / step), extent - 1) + 1
        for step, extent in zip(steps, inside.shape, strict=True)
    ]
    # Only changed voxels qualify: a plane next to the change would show nothing.
    density = np.where(inside, uniform_filter(inside.astype(np.float32), size, mode="constant"), -1)
    densest = np.unravel_index(int(density.argmax()), density.shape)
    return tuple(int(index) + part.start for index, part in zip(densest, box, strict=True))


def _best_plane(structure: Bool, changed: Bool, axis: int) -> int:
    """Return the place along an axis: of those with a large cross-section the one with the most changes, of equal ones the middle one."""
    others = tuple(other for other in range(structure.ndim) if other != axis)
    sections = structure.sum(axis=others)
    changes = changed.sum(axis=others)
    changes = np.where(sections >= _LARGE_SECTION * sections.max(), changes, -1)
    candidates = np.flatnonzero(changes == changes.max())
    largest = candidates[sections[candidates] == sections[candidates].max()]
    return int(largest[len(largest) // 2])


@dataclass(frozen=True)
class Window:
    """The intensities that become black and white."""

    low: float  # black
    high: float  # white, above `low`
    name: str = ""  # such as "lung"; empty if it comes from the image's percentiles

    def gray(self, image: Float32) -> NDArray[np.uint8]:
        """Return gray values from 0 to 255.

        NaN is black, as some programs write it outside of the brain.
        """
        shown = np.nan_to_num(
            image.astype(np.float32), nan=self.low, posinf=self.high, neginf=self.low
        )
        gray: NDArray[np.uint8] = (
            np.clip((shown - self.low) * (255 / (self.high - self.low)), 0, 255)
            .round()
            .astype(np.uint8)
        )
        return gray

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}".replace("-", "\u2212")


# Usual windows of CT, in Hounsfield units.
SOFT_TISSUE = Window(-160, 240, "soft tissue")
LUNG = Window(-1350, 150, "lung")
BONE = Window(-450, 1050, "bone")


def choose_window(image: Float32, structure: Bool) -> Window:
    """Return the window of a modality: for CT a usual one, by the median of the structure, else percentiles of image and structure."""
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
    low, high = map(float, np.percentile(sample, (0.5, 99.5)))
    if inside.size:
        least, most = map(float, np.percentile(inside, (2, 98)))
        low = min(low, least)
        high = max(high, most)
    if high > low:
        return Window(low, high)
    return Window(low - 0.5, low + 0.5)


def choose_modality(
    modalities: Sequence[Float32], windows: Sequence[Window], labels: Array, steps: Sequence[float]
) -> int:
    """Return the number of the modality that shows the borders of the labels best.

    The first one of equals.

    The mean intensities of the labels explain most of its variance within 3 mm of a border (the
    correlation ratio). `labels` are unsigned, `steps` are mm per grid axis.
    """
    occupied = bounding_box(labels != 0)
    if len(modalities) == 1 or occupied is None:
        return 0
    # A border is no wider than the grid, however close its voxels are.
    reach = [
        min(max(1, round(_BORDER_MM / step)), extent - 1)
        for step, extent in zip(steps, labels.shape, strict=True)
    ]
    box = tuple(
        slice(max(0, part.start - most), part.stop + most)
        for part, most in zip(occupied, reach, strict=True)
    )
    size = [2 * most + 1 for most in reach]
    is_near = maximum_filter(labels[box], size, mode="nearest") != minimum_filter(
        labels[box], size, mode="nearest"
    )
    shares = []
    for channel, window in zip(modalities, windows, strict=True):
        counted = is_near & _is_tissue(channel[box])
        values = np.clip(channel[box][counted], window.low, window.high).astype(np.float64)
        groups = labels[box][counted].astype(np.intp)
        means = np.bincount(groups, values) / np.maximum(np.bincount(groups), 1)
        # A spread of rounding errors explains nothing.
        shares.append(
            means[groups].var() / max(values.var(), 1e-12 * (window.high - window.low) ** 2)
            if values.size
            else 0.0
        )
    return int(np.argmax(shares))


def _is_tissue(image: Float32) -> Bool:
    """Return where an image is finite, not exactly zero, and not its smallest value if a tenth of the voxels have that one."""
    counted: Bool = np.isfinite(image) & (image != 0)
    if counted.any():
        lowest = image == image[counted].min()
        if _BACKGROUND_SHARE * image.size <= np.count_nonzero(lowest) < np.count_nonzero(counted):
            counted &= ~lowest
    return counted
