"""The geometry of grids, as pure functions of a shape and an affine, and the order of their axes.

The affine takes voxel indices (x, y, z) to world millimeters in RAS+ (right, anterior, superior).
Users index (x, y, z); memory and files store axes slowest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import TIMES
from crfrefine.errors import InputError

# Allowed voxel spacing in mm: from that of electron microscopes to the limit of float32 positions.
SPACING_RANGE = (1e-6, 1e9)
# Lengths that differ by less than this fraction are equal: headers keep float32, and sums round.
SAME_LENGTH = 1e-5
# The corners of equal grids are at most this fraction of the smallest spacing apart: headers keep
# float32 or six printed digits.
GRID_TOLERANCE = 0.01
# Cosine between two voxel axes above which an affine counts as sheared: float32 quaternions stay a
# hundred times below it.
SHEAR_TOLERANCE = 1e-4

_WORLD_AXES = ("LR", "PA", "IS")  # letters of the negative and the positive direction of x, y, z


def spacing_of(affine: NDArray[np.float64], num_axes: int = 3) -> tuple[float, ...]:
    """Return the voxel size in mm along each axis: the column norms of the affine."""
    columns = np.asarray(affine, np.float64)[:3, :num_axes]
    return tuple(np.linalg.norm(columns, axis=0).tolist())


def voxel_ml(spacing: Sequence[float]) -> float:
    """Return the volume of a voxel in ml, from mm between voxels."""
    return math.prod(spacing) / 1000.0


def usable_spacing(affine: NDArray[np.float64], num_axes: int, path: Path) -> tuple[float, ...]:
    """Return the voxel size of a file's grid, as `spacing_of` does.

    Raise InputError if the affine is singular, or places voxels absurdly near or far.
    """
    smallest, largest = SPACING_RANGE
    spacing = spacing_of(affine, num_axes)
    is_usable = bool((np.abs(affine) < largest).all())  # also for NaN
    if is_usable:
        is_usable = all(smallest <= step <= largest for step in spacing)
    if is_usable:
        # The smallest singular value of the axes' directions is 1 at right angles, 0 where an axis
        # is in the plane of the others.
        directions = affine[:3, :num_axes] / np.array(spacing)
        is_usable = bool(np.linalg.svd(directions, compute_uv=False).min() > 1e-6)
    if not is_usable:
        raise InputError(
            f"{path}: the geometry in the header is not usable: "
            f"its affine is [{describe_affine(affine)}]; expected axes in different directions, "
            f"and voxels of {SPACING_RANGE[0]:g} mm or more. "
            "Repair the header, whose lengths may be in another unit"
        )
    return spacing


def _directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit vectors of the voxel axes, (3, 3), a column each."""
    columns: NDArray[np.float64] = np.asarray(affine, np.float64)[:3, :3]
    return columns / np.maximum(spacing_of(affine), np.finfo(np.float64).tiny)


def orientation_codes(affine: NDArray[np.float64], num_axes: int = 3) -> str:
    """Return the nearest world direction of each voxel axis, such as "RAS"; no two share one."""
    rotation = _directions(affine)

    def alignment(world_axes: tuple[int, ...]) -> float:
        return float(np.abs(rotation[world_axes, range(3)]).sum())

    nearest = max(permutations(range(3)), key=alignment)
    codes = ""
    for axis, world in enumerate(nearest[:num_axes]):
        is_positive = rotation[world, axis] > 0
        codes += _WORLD_AXES[world][int(is_positive)]
    return codes


def has_clear_orientation(affine: NDArray[np.float64]) -> bool:
    """Return whether each voxel axis is nearest to a world axis of its own.

    Where two axes are nearest to the same one, as in double oblique planes near 45 degrees,
    programs differ in which of them gets its letter.
    """
    nearest = np.abs(_directions(affine)).argmax(axis=0)
    return len(set(nearest.tolist())) == 3


def axes_toward(letters: str, codes: str) -> list[tuple[int, bool]]:
    """Return the axis along which each letter's world axis runs, and whether it runs back.

    `codes` are those of the axes, as of `orientation_codes`. Letters of no axis have no entry.
    """
    found = []
    for letter in letters:
        pair = next((pair for pair in _WORLD_AXES if letter in pair), "")
        for axis, code in enumerate(codes):
            if code in pair:
                found.append((axis, code != letter))
    return found


def turned_toward(
    letters: str, shape: tuple[int, ...], affine: NDArray[np.float64]
) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return shape and affine of the same voxels with axes that run as three letters say."""
    turned = np.array(affine, np.float64)
    sizes = []
    for number, (axis, is_mirrored) in enumerate(axes_toward(letters, orientation_codes(affine))):
        step = affine[:3, axis]
        if is_mirrored:
            turned[:3, 3] += step * (shape[axis] - 1)
            step = -step
        turned[:3, number] = step
        sizes.append(shape[axis])
    return tuple(sizes), turned


def is_sheared(affine: NDArray[np.float64]) -> bool:
    """Return whether voxel axes are not at right angles: only sforms and NRRD can express that."""
    rotation = _directions(affine)
    return bool(np.abs(rotation.T @ rotation - np.eye(3)).max() > SHEAR_TOLERANCE)


def same_grid(
    shape: Sequence[int],
    affine: NDArray[np.float64] | None,
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64] | None,
) -> bool:
    """Return whether two grids of at most three axes put the same voxels at the same places.

    Affines are (4, 4) to mm; where one is None, only shapes are compared. A 2-D grid equals a 3-D
    one of a single slice.
    """
    if (*shape, 1)[:3] != (*other_shape, 1)[:3]:
        return False
    if affine is None or other_affine is None:
        return True
    farthest = farthest_distance(shape, affine, other_affine)
    return farthest <= GRID_TOLERANCE * min(spacing_of(affine, len(shape)))


def farthest_distance(
    shape: Sequence[int], affine: NDArray[np.float64], other_affine: NDArray[np.float64]
) -> float:
    """Return the largest distance in mm between the places where two affines put a voxel."""
    # Corners are compared, not matrix entries: the effect of a rounding error in a direction
    # cosine grows with the length of the axis.
    last = [size - 1 for size in shape] + [0] * (3 - len(shape))
    ends = [{0, index} for index in last]
    corners = np.array(list(product(*ends, [1.0])))
    difference = np.asarray(affine, np.float64) - np.asarray(other_affine, np.float64)
    return float(np.linalg.norm((corners @ difference.T)[:, :3], axis=1).max())


def reorientation(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64],
) -> Reorientation | None:
    """Return how the axes of the other grid become those of the first.

    The result is None if voxel centers differ. The arguments are those of `same_grid`.
    """
    sizes = np.array((*shape, 1)[:3])
    other_sizes = np.array((*other_shape, 1)[:3])
    # The first permutation is the identity, so that equal grids are not turned.
    for permutation in permutations(range(3)):
        axes = list(permutation)
        if not np.array_equal(other_sizes[axes], sizes):
            continue
        for mirrored in product((False, True), repeat=3):
            turned = np.array(other_affine, np.float64)
            turned[:, :3] = turned[:, axes] * np.where(mirrored, -1.0, 1.0)
            turned[:, 3] -= turned[:, :3] @ np.where(mirrored, sizes - 1, 0)
            if same_grid(shape, affine, shape, turned):
                return Reorientation(permutation, mirrored)
    return None


def describe_grid(
    shape: Sequence[int], affine: NDArray[np.float64] | None, *, placed: bool = False
) -> str:
    """Describe a grid for messages, such as "240×240×155, 1.00×1.00×1.00 mm".

    With `placed`, the text has its orientation and origin too.
    """
    text = TIMES.join(map(str, shape))
    if affine is None:
        return text
    text += f", {TIMES.join(map(_millimeters, spacing_of(affine, len(shape))))} mm"
    if placed:
        origin = ", ".join(map(_millimeters, affine[:3, 3]))
        text += f", {orientation_codes(affine, len(shape))}, first voxel at ({origin})"
    return text


def _millimeters(length: float) -> str:
    """Return a length with two decimals, or up to six digits if it has more: "1.00", "0.625"."""
    rounded = f"{length:.2f}"
    exact = f"{length:.6g}"
    if float(rounded) == float(exact):
        return rounded
    return exact


def describe_difference(
    *grids: tuple[str | Path, Sequence[int], NDArray[np.float64] | None],
) -> str:
    """Describe different grids, one line each, in enough detail to show the difference.

    Each grid is a name, a shape and an affine.
    """
    texts = [describe_grid(shape, affine) for _, shape, affine in grids]
    if len(set(texts)) == 1:
        texts = [describe_grid(shape, affine, placed=True) for _, shape, affine in grids]
    if len(set(texts)) == 1:
        for number, (_, _, affine) in enumerate(grids):
            if affine is not None:
                texts[number] += f"\n    {describe_affine(affine)}"

    width = max(len(str(name)) for name, _, _ in grids)
    lines = []
    for (name, _, _), text in zip(grids, texts, strict=True):
        lines.append(f"  {name!s:<{width}}  {text}")
    return "\n".join(lines)


def describe_affine(affine: NDArray[np.float64]) -> str:
    """Return the first three rows of an affine as text; the last row is always the same."""
    rows = []
    for row in affine[:3]:
        rows.append(" ".join(f"{value:g}" for value in row))
    return "; ".join(rows)


@dataclass(frozen=True)
class StorageOrder:
    """The order in which the user's axes are stored; arrays are transposed as views, not copied."""

    axes: tuple[int, ...]  # the user's number of each stored axis, slowest first

    @classmethod
    def of_memory(cls, grid: NDArray[Any]) -> StorageOrder:
        """Return the memory order of the axes of an array (*grid); axes of one voxel come first."""
        # Sorted by the last key first; of equal axes the first one stays first.
        slowest_first = np.lexsort((-np.abs(grid.strides), np.greater(grid.shape, 1)))
        return cls(tuple(slowest_first.tolist()))

    def along(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the values of a user's axes, one each, in storage order."""
        return tuple(values[axis] for axis in self.axes)

    def to_storage(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a user's array (*grid) or (channels, *grid) with its axes in storage order."""
        num_leading = array.ndim - len(self.axes)
        return array.transpose(*range(num_leading), *(axis + num_leading for axis in self.axes))

    def to_user(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array (*grid) or (channels, *grid) in storage order in the user's order."""
        places = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return StorageOrder(tuple(places)).to_storage(array)


@dataclass(frozen=True)
class Reorientation:
    """How the axes of a stored grid become those of another one: exchanged, mirrored, or both."""

    # The number of the stored axis that becomes each axis (x, y, z) of the other grid.
    axes: tuple[int, ...]
    mirrored: tuple[bool, ...]  # whether each of these stored axes runs the other way

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array ([channels,] z, y, x) of the stored grid on the other grid."""
        num_leading = values.ndim - 3
        stored = [num_leading + 2 - axis for axis in reversed(self.axes)]
        turned = values.transpose(*range(num_leading), *stored)
        is_mirrored = [False] * num_leading + list(reversed(self.mirrored))
        return np.flip(turned, tuple(np.flatnonzero(is_mirrored).tolist()))


def reverse_grid(channels: NDArray[Any]) -> NDArray[Any]:
    """Return (channels, *grid) with reversed grid axes: from files' order, x last, or to it."""
    return channels.transpose(0, *range(channels.ndim - 1, 0, -1))
