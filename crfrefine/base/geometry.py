"""The geometry of grids, as pure functions of a shape and an affine.

The affine takes voxel indices (x, y, z) to world millimeters in RAS+ (right, anterior, superior).
Users index (x, y, z); memory and files store axes slowest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np

from crfrefine.base.array_types import Array, Float64, Spacing
from crfrefine.base.axes import WORLD_AXES, Axes, all_axes
from crfrefine.base.text import text_of_sizes
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


def spacing_of(affine: Float64, num_axes: int = 3) -> Spacing:
    """Return the voxel size in mm along each axis: the column norms of the affine."""
    columns = np.asarray(affine, np.float64)[:3, :num_axes]
    return tuple(np.linalg.norm(columns, axis=0).tolist())


def voxel_ml(spacing: Sequence[float]) -> float:
    """Return the volume of a voxel in ml, from mm between voxels."""
    return math.prod(spacing) / 1000.0


def usable_spacing(affine: Float64, num_axes: int, path: Path) -> Spacing:
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


def _directions(affine: Float64) -> Float64:
    """Return the unit vectors of the voxel axes, (3, 3), a column each."""
    columns = np.asarray(affine, np.float64)[:3, :3]
    return columns / np.maximum(spacing_of(affine), np.finfo(np.float64).tiny)


def orientation_codes(affine: Float64, num_axes: int = 3) -> str:
    """Return the nearest world direction of each voxel axis, such as "RAS"; no two share one."""
    rotation = _directions(affine)
    codes = ""
    for axis, world in enumerate(nearest_axes(rotation)[:num_axes]):
        is_positive = rotation[world, axis] > 0
        codes += WORLD_AXES[world][int(is_positive)]
    return codes


def nearest_axes(matrix: Float64) -> tuple[int, ...]:
    """Return the row of each column of (3, 3), no two the same, with large entries in all."""

    # All six orders are compared: the largest entries of two columns could be in one row.
    def alignment(rows: tuple[int, ...]) -> float:
        return float(np.abs(matrix[rows, range(3)]).sum())

    return max(permutations(range(3)), key=alignment)


def has_clear_orientation(affine: Float64) -> bool:
    """Return whether each voxel axis is nearest to another world axis.

    Where two axes are nearest to the same one, as in double oblique planes near 45 degrees,
    programs differ in which of them gets its letter.
    """
    nearest = np.abs(_directions(affine)).argmax(axis=0)
    return len(set(nearest.tolist())) == 3


def is_sheared(affine: Float64) -> bool:
    """Return whether voxel axes are not at right angles: only sforms and NRRD can express that."""
    rotation = _directions(affine)
    return bool(np.abs(rotation.T @ rotation - np.eye(3)).max() > SHEAR_TOLERANCE)


def same_grid(
    shape: Sequence[int],
    affine: Float64 | None,
    other_shape: Sequence[int],
    other_affine: Float64 | None,
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


def farthest_distance(shape: Sequence[int], affine: Float64, other_affine: Float64) -> float:
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
    affine: Float64,
    other_shape: Sequence[int],
    other_affine: Float64,
) -> Axes | None:
    """Return how the axes of the other grid become those of the first.

    Returns None if voxel centers differ. The arguments are those of `same_grid`.
    """
    sizes = (*shape, 1)[:3]
    other_sizes = (*other_shape, 1)[:3]
    # The first ones leave the axes as they are, so that equal grids are not turned.
    for axes in all_axes():
        if axes.along(other_sizes) == sizes:
            turned = axes.affine(other_affine, other_sizes)
            if same_grid(shape, affine, shape, turned):
                return axes
    return None


def describe_grid(shape: Sequence[int], affine: Float64 | None, *, placed: bool = False) -> str:
    """Describe a grid for messages, such as "240×240×155, 1.00×1.00×1.00 mm".

    With `placed`, the text has its orientation and origin too.
    """
    text = text_of_sizes(shape)
    if affine is None:
        return text
    text += f", {text_of_sizes(map(_millimeters, spacing_of(affine, len(shape))))} mm"
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
    *grids: tuple[str | Path, Sequence[int], Float64 | None],
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


def describe_affine(affine: Float64) -> str:
    """Return the first three rows of an affine as text; the last row is always the same."""
    rows = []
    for row in affine[:3]:
        rows.append(" ".join(f"{value:g}" for value in row))
    return "; ".join(rows)


def reverse_grid(channels: Array) -> Array:
    """Return (channels, *grid) with reversed grid axes: from files' order, x last, or to it."""
    return channels.transpose(0, *range(channels.ndim - 1, 0, -1))
