"""The kernels of one model on one image, normalized and ready to filter.

The choice of filter for `auto` is here, too.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.cuda.filters import (
    ExactFilter,
    Filter,
    SpatialFilter,
    TruncatedFilter,
    window_radius,
)
from crfrefine.engines.cuda.lattice import Lattice, Simplices, estimated_vertices
from crfrefine.engines.cuda.rows import num_row_groups, row_width
from crfrefine.engines.cuda.voxels import CONSTANTS, BilateralInput, PlacedImage, Voxels
from crfrefine.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

# Messages of the lattice are off by a few percent, those of direct sums by far less: the lattice
# must be clearly faster to be chosen.
_LATTICE_HANDICAP = 1.5
# Arithmetic in the time in which a GPU moves a byte, estimated on paper.
_OPERATIONS_A_BYTE = 8.0
# With fewer operations the time is imperceptible, and the most accurate filter is chosen.
_UNNOTICED = 1e10


@dataclass
class Kernel:
    """A filter with its normalization."""

    filter: Filter  # the plain kernel
    scale: Any  # (voxel) factor of received values; None means ones
    # (voxel) factor of sent values: equal to `scale` if the normalization is symmetric, else None.
    sent_scale: Any
    ones: Any  # (voxel) normalized message of all ones

    def accumulate(
        self, values: Any, channel_weight: Any, total: Any, *, adds: bool = True
    ) -> None:
        """Add channel_weight times the normalized message to `total`; see `Filter.accumulate`."""
        self.filter.accumulate(
            values, self.sent_scale, self.scale, channel_weight, total, adds=adds
        )


def normalized(plain: Filter, voxels: Voxels, normalization: str) -> Kernel:
    """Compute the normalization of a kernel, "symmetric", "after" or "none"."""
    if normalization == "none":
        return Kernel(plain, None, None, None)
    is_symmetric = normalization == "symmetric"
    if isinstance(plain, SpatialFilter) and voxels.number is None:
        scale, ones = plain.normalization(is_symmetric=is_symmetric)
    else:
        scale, ones = _normalization(plain, voxels, is_symmetric=is_symmetric)
    if is_symmetric:
        return Kernel(plain, scale, scale, ones)
    return Kernel(plain, scale, None, voxels.ones.reshape(-1))  # D^-1 K 1 = 1


def _normalization(plain: Filter, voxels: Voxels, *, is_symmetric: bool) -> tuple[Any, Any]:
    """Return the same as `SpatialFilter.normalization` for any kernel, by filtering ones."""
    device = voxels.device
    num_voxels = voxels.num_voxels
    unit = device.xp.ones((1, 1), dtype=np.float32)
    scale = device.xp.empty_like(voxels.ones)
    plain.accumulate(voxels.ones, None, None, unit, scale, adds=False)
    scale = scale.reshape(-1)
    device.launch(
        "voxels",
        "find_scale",
        CONSTANTS,
        num_voxels,
        row_sum=scale,
        num_voxels=num_voxels,
        is_symmetric=is_symmetric,
        scale=scale,
    )
    if not is_symmetric:
        return scale, None
    message = device.xp.empty_like(voxels.ones)
    plain.accumulate(voxels.ones, scale, scale, unit, message, adds=False)
    return scale, message.reshape(-1)


def choose_filter(
    bilateral: BilateralInput, num_channels: int, num_filterings: int
) -> tuple[str, float | None]:
    """Return the filter that `auto` chooses, and the estimated number of the lattice's vertices.

    The filter is the direct sum that is less work, or the lattice if that is clearly less. The
    number is None if the choice does not depend on it, or no lattice is possible.
    """
    num_voxels = bilateral.voxels.num_voxels
    width = row_width(num_channels)
    filterings = num_filterings * num_row_groups(num_channels) + 2
    costs = _costs_of_sums(bilateral, width, filterings)
    num_vertices = None
    if min(costs.values()) > _UNNOTICED:
        with suppress(CapacityError):
            num_vertices = estimated_vertices(bilateral, Simplices(bilateral))
            per_voxel = num_vertices / num_voxels
            corners = num_voxels * (bilateral.num_features + 1.0)
            per_corner = 6.0 + 4.0 * width
            per_vertex = 8.0 + 16.0 * width
            per_filtering = 2.0 * per_corner + per_voxel * per_vertex
            work = 400.0 + filterings * per_filtering
            costs["lattice"] = _LATTICE_HANDICAP * _OPERATIONS_A_BYTE * corners * work
    return min(costs, key=lambda name: max(costs[name], _UNNOTICED)), num_vertices


def _costs_of_sums(bilateral: BilateralInput, width: int, filterings: int) -> dict[str, float]:
    """Return the operations of the direct sums; the exact sum, the most accurate, comes first."""
    num_voxels = bilateral.voxels.num_voxels
    window = math.prod(2.0 * radius + 1.0 for radius in window_radius(bilateral))
    per_pair = 6.0 + 3.0 * bilateral.num_features + 2.0 * width
    per_neighbor = 6.0 + 3.0 * len(bilateral.theta_intensity) + 2.0 * width
    return {
        "exact": filterings * num_voxels * float(num_voxels) * per_pair,
        "truncated": filterings * num_voxels * window * per_neighbor,
    }


def build_kernel(image: PlacedImage, kernel: KernelSpec, spec: KernelSetSpec) -> Kernel:
    """Build and normalize a kernel of a model for an image."""
    voxels = image.voxels
    theta = voxels.of_box_axes(kernel.theta_position)
    if kernel.theta_intensity is None:
        return normalized(SpatialFilter(voxels, theta), voxels, spec.normalization)
    bilateral = BilateralInput(image, theta, kernel.theta_intensity)
    return normalized(_appearance_filter(bilateral, spec), voxels, spec.normalization)


def _appearance_filter(bilateral: BilateralInput, spec: KernelSetSpec) -> Filter:
    name = spec.filter
    num_vertices = None
    if name == "auto":
        name, num_vertices = choose_filter(bilateral, spec.num_labels - 1, spec.num_iterations)
    if name == "lattice":
        return Lattice(bilateral, num_vertices)
    if name == "grid":
        raise ConfigError(
            "mean_field.filter: --device cuda has exact, truncated and lattice, not 'grid'; use "
            "'lattice' or 'auto', or --device cpu"
        )
    if name == "exact":
        return ExactFilter(bilateral)
    return TruncatedFilter(bilateral)
