"""Prepare a case for display: upright, cropped around its labels, gray values in 8 bits, and a map of changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io.volume import spacing_of
from crfrefine.pictures.display import Upright, crop_around, display_range, find_largest_change
from crfrefine.report.model import CaseImages

if TYPE_CHECKING:
    from numpy.typing import NDArray

GAINED, LOST, RELABELED = 1, 2, 3
"""Kinds of changed voxels: gained a label, lost its label, or has another label."""

CHANGE_COLORS = {GAINED: "#00FFFF", LOST: "#FF40E0", RELABELED: "#FFE100"}
"""Cyan, magenta and yellow: no label has these colors; they are distinguishable with every common color vision deficiency, and on gray."""


@dataclass(frozen=True)
class FileAxis:
    """The numbers in the file of the voxels along an upright axis, from 1, as other viewers count slices.

    Attributes:
        number: index of the file's axis, from 0.
        first: number of the first voxel.
        step: from one voxel to the next, negative if the axis is flipped.
        size: the number of voxels in the file.
    """

    number: int
    first: int
    step: int
    size: int

    @classmethod
    def of(cls, number: int, size: int, crop: slice, *, is_flipped: bool) -> FileAxis:
        """Return the counting after a crop; the kept part is given in upright order."""
        return cls(number, size - crop.start if is_flipped else crop.start + 1, -1 if is_flipped else 1, size)

    def coarser(self, factor: int, middle: int) -> FileAxis:
        """Return the counting of voxels merged by a factor, each represented by its middle voxel."""
        return replace(self, first=self.first + self.step * middle, step=self.step * factor)

    def place(self, index: int) -> str:
        """Return the position of a voxel in words."""
        return f"voxel {self.first + self.step * index} of {self.size} along the file’s {('first', 'second', 'third')[self.number]} axis"


@dataclass(frozen=True)
class UprightCase:
    """A case whose axes run, as nearly as possible, from right to left, posterior to anterior and inferior to superior.

    Attributes:
        case: its name.
        gray: (x, y, z) 0 to 255; None without an image.
        reference: (x, y, z) labels.
        before: (x, y, z) labels; None without a baseline.
        after: (x, y, z) labels.
        changes: (x, y, z) 0, GAINED, LOST or RELABELED: after against before, or against the reference without a baseline.
        steps: mm, one per axis.
        point: the voxel with the most changes around it.
        axes: the counting in the file, one per axis.
        reduced: the factor by which voxels were enlarged, one integer per axis.
    """

    case: str
    gray: NDArray[np.uint8] | None
    reference: NDArray[Any]
    before: NDArray[Any] | None
    after: NDArray[Any]
    changes: NDArray[np.uint8]
    steps: tuple[float, float, float]
    point: tuple[int, int, int]
    axes: tuple[FileAxis, ...]
    reduced: tuple[int, int, int] = (1, 1, 1)


def upright_case(images: CaseImages) -> UprightCase:
    """Turn, crop and window the volumes of a case."""
    pose = Upright.of(images.affine, 3)
    spacing = spacing_of(images.affine)
    steps = tuple(spacing[axis] for axis in pose.axis_order)
    reference, after = pose.turn(images.reference), pose.turn(images.after)
    before = None if images.before is None else pose.turn(images.before)
    changes = changes_between(reference if before is None else before, after)
    foreground = (reference > 0) | (after > 0) | (changes > 0)
    box = tuple(crop_around(foreground, steps))
    gray = None if images.image is None else _gray_values(pose.turn(images.image), box)
    after, changes = after[box], changes[box]
    point = find_largest_change(np.zeros_like(changes), changes, steps) if changes.any() else find_largest_change(after, after, steps)
    return UprightCase(
        case=images.case,
        gray=gray,
        reference=reference[box],
        before=None if before is None else before[box],
        after=after,
        changes=changes,
        steps=(steps[0], steps[1], steps[2]),
        point=(point[0], point[1], point[2]),
        axes=tuple(
            FileAxis.of(number, images.after.shape[number], crop, is_flipped=flip)
            for number, flip, crop in zip(pose.axis_order, pose.flips, box, strict=True)
        ),
    )


def _gray_values(image: NDArray[np.float32], box: tuple[slice, ...]) -> NDArray[np.uint8]:
    low, high = display_range(image)
    # NaN becomes black; some programs write it outside the brain. In place: volumes can be large.
    shown = np.nan_to_num(image[box].astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
    shown -= low
    shown *= 255 / (high - low)
    return np.clip(shown, 0, 255, out=shown).round(out=shown).astype(np.uint8)


def changes_between(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the kind of change of each voxel."""
    changes = np.zeros(after.shape, np.uint8)
    changed = before != after
    changes[changed] = RELABELED
    changes[changed & (before == 0)] = GAINED
    changes[changed & (after == 0)] = LOST
    return changes


def reduce_case(case: UprightCase, most_voxels: int) -> UprightCase:
    """Return the case with voxels enlarged until there are no more than allowed; the finest axes are coarsened first.

    Gray values are means over the new voxels; labels come from the middle voxel, so no new label can appear.
    """
    factors = [1, 1, 1]
    shape = case.after.shape
    while np.prod([-(-size // factor) for size, factor in zip(shape, factors, strict=True)]) > most_voxels:
        growing = [axis for axis in range(3) if shape[axis] > factors[axis]]
        finest = min(growing, key=lambda axis: (case.steps[axis] * factors[axis], -shape[axis]))
        factors[finest] += 1
    if factors == [1, 1, 1]:
        return case
    middle = [min(factor // 2, size - 1) for factor, size in zip(factors, shape, strict=True)]
    middles = tuple(slice(first, None, factor) for first, factor in zip(middle, factors, strict=True))
    counts = tuple(len(range(size)[middle]) for size, middle in zip(shape, middles, strict=True))
    before = case.before
    return replace(
        case,
        gray=None if case.gray is None else _block_means(case.gray, factors, counts),
        reference=case.reference[middles],
        before=None if before is None else before[middles],
        after=case.after[middles],
        changes=changes_between(case.reference[middles] if before is None else before[middles], case.after[middles]),
        steps=tuple(step * factor for step, factor in zip(case.steps, factors, strict=True)),  # type: ignore[arg-type]
        point=tuple(min(place // factor, count - 1) for place, factor, count in zip(case.point, factors, counts, strict=True)),  # type: ignore[arg-type]
        axes=tuple(axis.coarser(factor, first) for axis, factor, first in zip(case.axes, factors, middle, strict=True)),
        reduced=(factors[0], factors[1], factors[2]),
    )


def _block_means(gray: NDArray[np.uint8], factors: list[int], counts: tuple[int, ...]) -> NDArray[np.uint8]:
    values: NDArray[Any] = gray
    for axis, (factor, count) in enumerate(zip(factors, counts, strict=True)):
        starts = np.arange(count) * factor
        sums = np.add.reduceat(values, starts, axis=axis, dtype=np.float32)  # large volumes: single precision, and no copy of the whole
        sizes = np.diff(np.append(starts, values.shape[axis])).astype(np.float32)
        values = sums / sizes.reshape([-1 if other == axis else 1 for other in range(3)])
    return values.round().astype(np.uint8)
