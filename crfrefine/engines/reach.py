"""How far the kernels of a model reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crfrefine.specs import KernelSetSpec

REACH, SPATIAL_REACH = 3.0, 4.0
"""Bandwidths at which appearance and spatial kernels end: where the truncated sum and the spatial filter of the C++ engine are cut off."""


def reach_of_axes(spec: KernelSetSpec, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels along each axis after which every kernel ends, for a grid of any number of axes.

    Args:
        spec: the kernels.
        spacing: mm, one per grid axis, in the same order as theirs.
    """
    return tuple(
        max(
            (math.ceil((SPATIAL_REACH if kernel.is_spatial else REACH) * kernel.theta_position[axis] / step) for kernel in spec.kernels),
            default=0,
        )
        for axis, step in enumerate(spec.distances(spacing))
    )
