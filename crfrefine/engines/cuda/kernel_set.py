"""The kernels of one model on one image, normalized and ready to filter, and the choice of filter for `auto`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.cuda.device import num_row_groups, row_width
from crfrefine.engines.cuda.filters import ExactFilter, Filter, SpatialFilter, TruncatedFilter, window_radius
from crfrefine.engines.cuda.grid import GridFilter, GridSize, filtering_work
from crfrefine.engines.cuda.keys import Simplices, estimated_vertices
from crfrefine.engines.cuda.lattice import LatticeFilter
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from crfrefine.engines.grid_image import FeatureOrigin
    from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

# For any GPU: costs of arithmetic and memory traffic, estimated on paper (docs/decisions/gpu.md); only their ratio matters.
_OPERATIONS_A_BYTE = 8.0
# Messages of the lattice are off by a few percent, those of direct sums by far less: the lattice must be clearly faster to be chosen.
_LATTICE_HANDICAP = 1.5
# With fewer operations the time is imperceptible, and the most accurate filter is chosen.
_UNNOTICED = 1e10


@dataclass
class Kernel:
    """A filter with its normalization."""

    filter: Filter  # the plain kernel
    scale: Any  # (voxel) factor of the normalization, or None for ones
    scales_sent: bool  # whether the factor is applied to sent values too, not only to received ones
    ones: Any  # (voxel) normalized message of all ones

    def accumulate(self, values: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True) -> None:
        """Add channel_weight times the normalized message to `total`; see `Filter.accumulate`."""
        sent = self.scale if self.scales_sent else None
        self.filter.accumulate(values, sent, self.scale, channel_weight, total, transposed=transposed, adds=adds)


def normalized(plain: Filter, voxels: Voxels, normalization: str, dtype: Any = np.float32) -> Kernel:
    """Compute the normalization of a kernel, "symmetric", "after" or "none", for values of a type."""
    if normalization == "none":
        return Kernel(plain, None, False, None)
    xp = voxels.device.xp
    unit = xp.ones((1, 1), dtype=dtype)
    ones = xp.ones((1, voxels.num_voxels, 1), dtype=dtype)
    row_sum = xp.zeros_like(ones)
    plain.accumulate(ones, None, None, unit, row_sum)
    is_symmetric = normalization == "symmetric"
    sums = xp.maximum(row_sum.reshape(-1), np.finfo(dtype).tiny)
    scale = 1.0 / (xp.sqrt(sums) if is_symmetric else sums)
    if not is_symmetric:
        return Kernel(plain, scale, False, ones.reshape(-1))  # D^-1 K 1 = 1
    message = xp.zeros_like(ones)
    plain.accumulate(ones, scale, scale, unit, message)
    return Kernel(plain, scale, True, message.reshape(-1))


def choose_filter(bilateral: BilateralInput, num_channels: int, num_filterings: int) -> tuple[str, float | None]:
    """Return the filter that `auto` chooses, the direct sum or grid that is less work, or the lattice if it clearly is; and its vertices.

    Operations are weighed against bytes moved. The number of the lattice's
    vertices is estimated from a sample of the voxels; None if the choice does not depend on it.
    """
    voxels = bilateral.voxels
    num_modalities, width = len(bilateral.theta_intensity), row_width(num_channels)
    num_groups = num_row_groups(num_channels)
    filterings = num_filterings * num_groups + 2
    window = math.prod(2.0 * radius + 1.0 for radius in window_radius(bilateral))
    truncated = filterings * voxels.num_voxels * window * (6.0 + 3.0 * num_modalities + 2.0 * width)
    exact = filterings * voxels.num_voxels * float(voxels.num_voxels) * (6.0 + 3.0 * bilateral.num_features + 2.0 * width)
    costs = {"exact": exact, "truncated": truncated}
    num_vertices = None
    if min(costs.values()) > _UNNOTICED:
        size = GridSize.of(bilateral)
        if size.is_possible and bilateral.features.dtype == np.float32:
            once, alone = (
                _OPERATIONS_A_BYTE * num_bytes + operations
                for num_bytes, operations in (filtering_work(size, width), filtering_work(size, 1))
            )
            costs["grid"] = num_filterings * num_groups * once + 2.0 * alone
        num_vertices = _possible_vertices(bilateral)
    if num_vertices is not None:
        corners = voxels.num_voxels * (bilateral.num_features + 1.0)
        per_voxel = num_vertices / voxels.num_voxels
        of_a_filtering = 2.0 * (6.0 + 4.0 * width) + per_voxel * (8.0 + 16.0 * width)
        costs["lattice"] = _LATTICE_HANDICAP * _OPERATIONS_A_BYTE * corners * (400.0 + filterings * of_a_filtering)
    return min(costs, key=lambda name: max(costs[name], _UNNOTICED)), num_vertices


def _possible_vertices(bilateral: BilateralInput) -> float | None:
    """Estimate the number of the lattice's vertices; None if there can be no lattice of these features."""
    try:
        single = bilateral.single()
        return estimated_vertices(single, Simplices(single))
    except CapacityError:
        return None


def bilateral_filter(requested: str, bilateral: BilateralInput, num_channels: int, num_filterings: int) -> Filter:
    """Build the filter of an appearance kernel: "auto", "exact", "truncated", "grid" or "lattice".

    Raises:
        ConfigError: the filter does not exist.
        InputError: the filter is "grid", and the modalities are not one or two.
    """
    num_vertices = None
    chosen = requested
    if requested == "auto":
        chosen, num_vertices = choose_filter(bilateral, num_channels, num_filterings)
    if chosen == "lattice":
        return LatticeFilter(bilateral, num_vertices)
    if chosen == "grid":
        return GridFilter(bilateral, num_channels)
    filters: dict[str, Callable[[BilateralInput], Filter]] = {"exact": ExactFilter, "truncated": TruncatedFilter}
    if chosen not in filters:
        raise ConfigError(f"mean_field.filter: the GPU engine has exact, truncated, grid and lattice, not '{chosen}'")
    return filters[chosen](bilateral)


def build_kernels(
    voxels: Voxels,
    image: Any,
    spec: KernelSetSpec,
    progress: Callable[[int, int], None] | None = None,
    origin: FeatureOrigin | None = None,
) -> list[Kernel]:
    """Build and normalize the kernels of a model, the spatial one last.

    All values have the type of the image, (M, *grid) on the device. `progress` gets the number of kernels built so far, and of all kernels.
    """
    kernels = []
    for number, kernel in enumerate(spec.kernels):
        if progress is not None:
            progress(number, len(spec.kernels))
        plain = build_filter(voxels, image, kernel, spec.filter, spec.num_labels - 1, spec.num_iterations, origin)
        kernels.append(normalized(plain, voxels, spec.normalization, image.dtype))
    return kernels


def build_filter(
    voxels: Voxels,
    image: Any,
    kernel: KernelSpec,
    filter_name: str,
    num_channels: int,
    num_filterings: int,
    origin: FeatureOrigin | None = None,
) -> Filter:
    """Build the filter of one kernel, for the given numbers of channels and filterings; see `bilateral_filter`."""
    theta = voxels.of_box_axes(kernel.theta_position)
    if kernel.theta_intensity is None:
        return SpatialFilter(voxels, theta, image.dtype)
    bilateral = BilateralInput(voxels, image, theta, kernel.theta_intensity, origin)
    return bilateral_filter(filter_name, bilateral, num_channels, num_filterings)
