"""How far the kernels of a model reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crfrefine.parameters.specs import KernelSetSpec

REACH, SPATIAL_REACH = 3.0, 4.0
"""Bandwidths at which appearance and spatial kernels end: where the truncated sum and the spatial filter of the C++ engine are cut off."""


def reach_of_axes(spec: KernelSetSpec, spacing: Sequence[float], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the voxels along each axis after which every kernel ends, or the grid: nothing is farther away, however wide a kernel is."""
    reach = []
    for axis, (step, extent) in enumerate(zip(spec.distances(spacing), shape, strict=True)):
        widths = [(SPATIAL_REACH if kernel.is_spatial else REACH) * kernel.theta_position[axis] / step for kernel in spec.kernels]
        reach.append(math.ceil(min(max(widths, default=0.0), extent - 1)))
    return tuple(reach)
