"""Checks of a header's geometry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.volume import SPACING_RANGE, TIMES, is_plausible, spacing_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_MM = SPACING_RANGE[1]


def require_usable(affine: NDArray[np.float64], num_axes: int, path: Path) -> None:
    """Raise InputError if an affine is singular, or places voxels absurdly near to each other or far away."""
    is_sane = bool((np.abs(affine) < LARGEST_MM).all())  # Also False for NaN.
    spacing = spacing_of(affine, num_axes) if is_sane else ()
    if spacing and is_plausible(spacing) and _flatness(affine, num_axes) > 1e-6:
        return
    if min(spacing, default=0.0) > 0.0 and not is_plausible(spacing):
        size = TIMES.join(f"{step:g}" for step in spacing)
        problem = f"its voxels measure {size} mm; expected {SPACING_RANGE[0]:g} mm or more. Its lengths may be in another unit"
    else:
        problem = "its affine is [" + "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3]) + "]"
    raise InputError(f"{path}: the geometry in the header is not usable: {problem}; repair the header")


def _flatness(affine: NDArray[np.float64], num_axes: int) -> float:
    """Return the smallest singular value of the axes' directions: 1 at right angles, 0 where one lies in the plane of the others."""
    directions = affine[:3, :num_axes] / np.array(spacing_of(affine, num_axes))
    return float(np.linalg.svd(directions, compute_uv=False).min())
