"""The result of reading a text header: a grid, its place in the world, and the place of the voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import UnsupportedFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.source import VoxelSource

LPS = (-1.0, -1.0, 1.0)
"""Signs that turn left, posterior, superior into RAS+, the convention of all affines here."""


@dataclass(frozen=True)
class TextHeader:
    """The header of a MetaImage or NRRD file.

    Attributes:
        grid_shape: voxels along x, y(, z).
        num_channels: 1 for a scalar volume.
        affine: (4, 4) voxel to world RAS+ mm.
        geometry: the lines that place the grid in the world, as in the file; empty if another file could not use them.
        source: the place of the voxels.
        segments: the lines of an NRRD header about segments, by their keys.
    """

    grid_shape: tuple[int, ...]
    num_channels: int
    affine: NDArray[np.float64]
    geometry: tuple[str, ...]
    source: VoxelSource
    segments: Mapping[str, str] = field(default_factory=dict)


def grid_and_channels(path: Path, sizes: tuple[int, ...], num_channels: int) -> tuple[tuple[int, ...], int]:
    """Split dimensions into grid and channels: a fourth dimension means channels if a voxel has one value; raise if ambiguous."""
    if 2 <= len(sizes) <= 3:
        return sizes, num_channels
    if len(sizes) != 4 or num_channels > 1:
        raise UnsupportedFormatError(
            f"{path}: {len(sizes)} dimensions with {num_channels} values per voxel cannot be split into grid and channels"
        )
    return sizes[:3], sizes[3]


def affine_of(vectors: NDArray[np.float64], origin: NDArray[np.float64], signs: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the affine to RAS+ of 2 or 3 axes, whose vectors are the columns; `signs` turns their space into RAS+."""
    num_axes = len(origin)
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = vectors
    affine[:num_axes, 3] = origin
    return np.diag([*signs, 1.0]) @ affine + 0.0  # Adding zero turns -0 into 0.
