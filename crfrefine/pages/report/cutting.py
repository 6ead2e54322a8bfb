"""Prepare a case for display: upright, cropped around its labels, with the planes to show, a window per modality, and a map of changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.geometry import spacing_of
from crfrefine.pages.pictures.display import Upright, crop_around
from crfrefine.pages.pictures.planes import choose_places
from crfrefine.pages.pictures.windows import Window, choose_modality, choose_window
from crfrefine.pages.report.model import CaseImages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Float32

GAINED, LOST, RELABELED = 1, 2, 3
"""Kinds of changed voxels: gained a label, lost its label, or has another label."""

CHANGE_COLORS = {GAINED: "#00FFFF", LOST: "#FF40E0", RELABELED: "#FFE100"}
"""Cyan, magenta and yellow: no label has these colors; they are distinguishable with every common color vision deficiency, and on gray."""


@dataclass(frozen=True)
class FileAxis:
    """The numbers in the file of the voxels along an upright axis, from 1, as other viewers count slices."""

    number: int  # Index of the file's axis, from 0.
    first: int  # Number of the first voxel.
    step: int  # From one voxel to the next, negative if the axis is flipped.
    size: int  # The number of voxels in the file.

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
    """A case whose axes run, as nearly as possible, from right to left, posterior to anterior and inferior to superior."""

    case: str
    images: Float32 | None  # (M, x, y, z) finite intensities; None without an image.
    modality_names: tuple[str, ...]  # One per modality.
    windows: tuple[Window, ...]  # One per modality.
    modality: int  # The number of the one with the highest contrast at the border of the labels.
    reference: Array  # (x, y, z) labels.
    before: Array | None  # (x, y, z) labels; None without a baseline.
    after: Array  # (x, y, z) labels.
    changes: NDArray[np.uint8]  # (x, y, z) 0, GAINED, LOST or RELABELED: after against before, or against the reference without a baseline.
    steps: tuple[float, float, float]  # mm, one per axis.
    point: tuple[int, int, int]  # One index per axis: the planes through the structure.
    axes: tuple[FileAxis, ...]  # The counting in the file, one per axis.
    change: tuple[int, int, int] | None = None  # The voxel with the most changes around it, if no plane through the structure passes by it.
    change_plane: int = 0  # The plane that shows most of that change, by its number.
    reduced: tuple[int, int, int] = (1, 1, 1)  # The factor by which voxels were enlarged, one integer per axis.

    @property
    def gray(self) -> NDArray[np.uint8] | None:
        """Gray values of the shown modality, (x, y, z); None without an image."""
        return None if self.images is None else self.windows[self.modality].gray(self.images[self.modality])


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
    modalities = [pose.turn(channel) for channel in images.image] if images.image is not None else []
    windows = tuple(choose_window(channel, foreground) for channel in modalities)
    shown = np.stack([channel[box] for channel in modalities]).astype(np.float32) if modalities else None
    reference, after, changes = reference[box], after[box], changes[box]
    modality = 0 if shown is None else choose_modality(list(shown), windows, reference if reference.any() else after, steps)
    before = None if before is None else before[box]
    places = choose_places([reference, after] if before is None else [reference, before, after], changes > 0, steps)
    return UprightCase(
        case=images.case,
        images=None if shown is None else _finite(shown),
        modality_names=images.modality_names or tuple(f"modality {number + 1}" for number in range(len(modalities))),
        windows=windows,
        modality=modality,
        reference=reference,
        before=before,
        after=after,
        changes=changes,
        steps=(steps[0], steps[1], steps[2]),
        point=_three(places.structure),
        change=None if places.change is None else _three(places.change),
        change_plane=places.change_plane,
        axes=tuple(
            FileAxis.of(number, images.after.shape[number], crop, is_flipped=flip)
            for number, flip, crop in zip(pose.axis_order, pose.flips, box, strict=True)
        ),
    )


def _finite(images: Float32) -> Float32:
    """Replace, in place and per modality, what is not finite: NaN and -inf by the smallest number, which is black, inf by the largest."""
    for channel in images:
        is_finite = np.isfinite(channel)
        if not is_finite.all():
            low, high = (float(channel[is_finite].min()), float(channel[is_finite].max())) if is_finite.any() else (0.0, 0.0)
            np.nan_to_num(channel, copy=False, nan=low, posinf=high, neginf=low)
    return images


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z


def changes_between(before: Array, after: Array) -> NDArray[np.uint8]:
    """Return the kind of change of each voxel."""
    changes = np.zeros(after.shape, np.uint8)
    changed = before != after
    changes[changed] = RELABELED
    changes[changed & (before == 0)] = GAINED
    changes[changed & (after == 0)] = LOST
    return changes


def reduce_case(case: UprightCase, most_voxels: int) -> UprightCase:
    """Return the case with voxels enlarged until there are no more than allowed; the finest axes are coarsened first.

    Intensities are means over the new voxels; labels come from the middle voxel, so no new label can appear.
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

    def coarser(point: tuple[int, int, int]) -> tuple[int, int, int]:
        return _three([min(place // factor, count - 1) for place, factor, count in zip(point, factors, counts, strict=True)])

    return replace(
        case,
        images=None if case.images is None else np.stack([_block_means(channel, factors, counts) for channel in case.images]),
        reference=case.reference[middles],
        before=None if before is None else before[middles],
        after=case.after[middles],
        changes=changes_between(case.reference[middles] if before is None else before[middles], case.after[middles]),
        steps=tuple(step * factor for step, factor in zip(case.steps, factors, strict=True)),  # type: ignore[arg-type]
        point=coarser(case.point),
        change=None if case.change is None else coarser(case.change),
        axes=tuple(axis.coarser(factor, first) for axis, factor, first in zip(case.axes, factors, middle, strict=True)),
        reduced=(factors[0], factors[1], factors[2]),
    )


def _block_means(image: Float32, factors: list[int], counts: tuple[int, ...]) -> Float32:
    values: Array = image
    for axis, (factor, count) in enumerate(zip(factors, counts, strict=True)):
        starts = np.arange(count) * factor
        sums = np.add.reduceat(values, starts, axis=axis, dtype=np.float32)  # large volumes: single precision, and no copy of the whole
        sizes = np.diff(np.append(starts, values.shape[axis])).astype(np.float32)
        values = sums / sizes.reshape([-1 if other == axis else 1 for other in range(3)])
    return values
