"""Checks of a header's geometry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.volume import spacing_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_MM = 1e9
SMALLEST_MM = 1e-9


def require_usable(affine: NDArray[np.float64], num_axes: int, path: Path) -> None:
    """Raise InputError if an affine is singular, or places voxels absurdly far away."""
    is_sane = bool((np.abs(affine) < LARGEST_MM).all())  # Also False for NaN.
    if is_sane and min(spacing_of(affine, num_axes), default=0.0) > SMALLEST_MM and _flatness(affine, num_axes) > 1e-6:
        return
    rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
    raise InputError(f"{path}: the geometry in the header is not usable: its affine is [{rows}]; repair the header")


def _flatness(affine: NDArray[np.float64], num_axes: int) -> float:
    """Return the smallest singular value of the axes' directions: 1 at right angles, 0 where one lies in the plane of the others."""
    directions = affine[:3, :num_axes] / np.array(spacing_of(affine, num_axes))
    return float(np.linalg.svd(directions, compute_uv=False).min())
