"""The geometry of grids, as pure functions of a shape and an affine, and the order of their axes.

The affine takes voxel indices (x, y, z) to world millimeters in RAS+ (right, anterior, superior).
Users index (x, y, z); memory and files store axes slowest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.text import TIMES
from crfrefine.errors import InputError

# mm between neighboring voxels: from an electron microscope's to the limit of positions in float32.
SPACING_RANGE = (1e-6, 1e9)
# Largest distance, in smallest spacings, between corners of grids that count as equal: headers keep
# float32 or six printed digits.
GRID_TOLERANCE = 0.01
# Cosine between two voxel axes above which an affine counts as sheared: float32 quaternions stay a
# hundred times below it.
SHEAR_TOLERANCE = 1e-4


def spacing_of(affine: NDArray[np.float64], num_axes: int = 3) -> tuple[float, ...]:
    """Return the voxel size in mm along each axis: the column norms of the affine."""
    return tuple(np.linalg.norm(np.asarray(affine, np.float64)[:3, :num_axes], axis=0).tolist())


def require_usable(affine: NDArray[np.float64], num_axes: int, path: Path) -> None:
    """Raise InputError if an affine is singular, or places voxels absurdly near to each other or far away."""
    is_sane = bool((np.abs(affine) < SPACING_RANGE[1]).all())  # Also False for NaN.
    spacing = spacing_of(affine, num_axes) if is_sane else (0.0,)
    # The smallest singular value of the axes' directions is 1 at right angles, 0 where an axis is in the plane of the others.
    low, high = SPACING_RANGE
    if (
        not all(low <= step <= high for step in spacing)
        or np.linalg.svd(affine[:3, :num_axes] / np.array(spacing), compute_uv=False).min() <= 1e-6
    ):
        raise InputError(
            f"{path}: the geometry in the header is not usable: its affine is "
            f"[{describe_affine(affine)}]; expected axes in different directions, "
            f"and voxels of {SPACING_RANGE[0]:g} mm or more. Repair the header, whose lengths may be in another unit"
        )


def _directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit vectors of the voxel axes, (3, 3), a column each."""
    directions: NDArray[np.float64] = np.asarray(affine, np.float64)[:3, :3] / np.maximum(
        spacing_of(affine), np.finfo(np.float64).tiny
    )
    return directions


def orientation_codes(affine: NDArray[np.float64], num_axes: int = 3) -> str:
    """Return the world direction nearest to each voxel axis, such as "RAS" or "LPS", one letter per axis, each world axis used once."""
    rotation = _directions(affine)
    best = max(
        permutations(range(3)),
        key=lambda order: sum(abs(rotation[world, axis]) for axis, world in enumerate(order)),
    )
    return "".join(
        ("LR", "PA", "IS")[world][int(rotation[world, axis] > 0)]
        for axis, world in enumerate(best[:num_axes])
    )


def is_sheared(affine: NDArray[np.float64]) -> bool:
    """Return whether the voxel axes of the affine are not at right angles, which only the sform of NIfTI and NRRD can express."""
    rotation = _directions(affine)
    return bool(np.abs(rotation.T @ rotation - np.eye(3)).max() > SHEAR_TOLERANCE)


def same_grid(
    shape: Sequence[int],
    affine: NDArray[np.float64] | None,
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64] | None,
) -> bool:
    """Return whether two grids of at most three axes put the same voxels at the same places; without an affine, by their shapes."""
    # Affines are (4, 4) to mm. A 2-D grid equals a 3-D one of a single slice.
    if (*shape, 1)[:3] != (*other_shape, 1)[:3] or affine is None or other_affine is None:
        return (*shape, 1)[:3] == (*other_shape, 1)[:3]
    farthest = farthest_distance(shape, affine, other_affine)
    return farthest <= GRID_TOLERANCE * min(spacing_of(affine, len(shape)))


def farthest_distance(
    shape: Sequence[int], affine: NDArray[np.float64], other_affine: NDArray[np.float64]
) -> float:
    """Return the largest distance in mm between the places of a grid's voxels by two affines."""
    # Corners, not matrix entries: the effect of a rounding error in a direction cosine grows with the length of the axis.
    last = [size - 1 for size in shape] + [0] * (3 - len(shape))
    corners = np.array([[*corner, 1.0] for corner in product(*({0, index} for index in last))])
    difference = np.asarray(affine, np.float64) - np.asarray(other_affine, np.float64)
    return float(np.linalg.norm((corners @ difference.T)[:, :3], axis=1).max())


def reorientation(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64],
) -> Reorientation | None:
    """Return how the axes of the other grid become those of the first; None if voxel centers differ. Arguments as of `same_grid`."""
    wanted, sizes = (np.array((*extents, 1)[:3]) for extents in (shape, other_shape))
    # The identity comes first.
    for axes in map(list, permutations(range(3))):
        if not np.array_equal(sizes[axes], wanted):
            continue
        for mirrored in product((False, True), repeat=3):
            turned = np.array(other_affine, np.float64)
            turned[:, :3] = turned[:, axes] * np.where(mirrored, -1.0, 1.0)
            turned[:, 3] -= turned[:, :3] @ np.where(mirrored, wanted - 1, 0)
            if same_grid(shape, affine, shape, turned):
                return Reorientation(tuple(axes), mirrored)
    return None


def describe_grid(
    shape: Sequence[int], affine: NDArray[np.float64] | None, *, placed: bool = False
) -> str:
    """Describe a grid for messages, such as "240×240×155, 1.00×1.00×1.00 mm"; with `placed` also its orientation and origin."""
    text = TIMES.join(map(str, shape))
    if affine is None:
        return text
    text += f", {TIMES.join(map(_millimeters, spacing_of(affine, len(shape))))} mm"
    if placed:
        text += f", {orientation_codes(affine, len(shape))}, first voxel at ({', '.join(map(_millimeters, affine[:3, 3]))})"
    return text


def _millimeters(length: float) -> str:
    """Return a length with two decimals, or with as many digits as it has, up to six: "1.00", "0.625"."""
    short, exact = f"{length:.2f}", f"{length:.6g}"
    return short if float(short) == float(exact) else exact


def describe_difference(
    *grids: tuple[str | Path, Sequence[int], NDArray[np.float64] | None],
) -> str:
    """Describe different grids, each with its name, shape and affine, one line each, in enough detail to show the difference."""
    texts = [describe_grid(shape, affine) for _, shape, affine in grids]
    if len({*texts}) == 1:
        texts = [describe_grid(shape, affine, placed=True) for _, shape, affine in grids]
    if len({*texts}) == 1:
        texts = [
            text if affine is None else f"{text}\n    {describe_affine(affine)}"
            for text, (_, _, affine) in zip(texts, grids, strict=True)
        ]
    width = max(len(str(name)) for name, _, _ in grids)
    return "\n".join(
        f"  {name!s:<{width}}  {text}" for text, (name, _, _) in zip(texts, grids, strict=True)
    )


def describe_affine(affine: NDArray[np.float64]) -> str:
    """Return the first three rows of an affine, the whole of what differs between affines."""
    return "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])


@dataclass(frozen=True)
class StorageOrder:
    """The order in which the user's axes are stored. Arrays are transposed as views; nothing is copied."""

    axes: tuple[int, ...]  # for each axis in storage, slowest first, the user's number of it

    @classmethod
    def of_memory(cls, grid: NDArray[Any]) -> StorageOrder:
        """Return the memory order of the axes of an array (*grid); axes of one voxel, which have no place in it, come first."""
        return cls(
            tuple(
                sorted(
                    range(grid.ndim),
                    key=lambda axis: (grid.shape[axis] > 1, -abs(grid.strides[axis])),
                )
            )
        )

    def to_storage(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a user's array (*grid) or (channels, *grid) with its axes in storage order."""
        num_leading = array.ndim - len(self.axes)
        return array.transpose(*range(num_leading), *(axis + num_leading for axis in self.axes))

    def to_user(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array (*grid) or (channels, *grid) in storage order with its axes in the user's order."""
        places = sorted(
            range(len(self.axes)), key=self.axes.__getitem__
        )  # of each of the user's axes
        return StorageOrder(tuple(places)).to_storage(array)


@dataclass(frozen=True)
class Reorientation:
    """How the axes of a stored grid become those of another one: exchanged, mirrored, or both."""

    axes: tuple[
        int, ...
    ]  # for each axis (x, y, z) of the other grid, the number of the stored axis
    mirrored: tuple[bool, ...]  # for each of them, whether the stored axis runs the other way

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array ([channels,] z, y, x) of the stored grid on the other grid."""
        num_leading = values.ndim - 3
        order = (*range(num_leading), *(num_leading + 2 - axis for axis in reversed(self.axes)))
        z, y, x = (
            slice(None, None, -1 if is_mirrored else 1) for is_mirrored in reversed(self.mirrored)
        )
        return values.transpose(order)[..., z, y, x]


def reverse_grid(channels: NDArray[Any]) -> NDArray[Any]:
    """Return (channels, *grid) with its grid reversed: from files, x last, to users, x first, or back."""
    return channels.transpose(0, *range(channels.ndim - 1, 0, -1))
