"""The kernel of a model on one image, ready to filter.

The choice of filter for `auto` is here, too, with costs from engines/choices.py.
"""

from __future__ import annotations

import math
from contextlib import suppress

from crfrefine.base.numerics import LATTICE_HANDICAP
from crfrefine.engines.choices import UNNOTICED, lattice_operations, pair_operations
from crfrefine.engines.cuda.filters import (
    Filter,
    exact_filter,
    truncated_filter,
    window_radius,
)
from crfrefine.engines.cuda.lattice import Lattice
from crfrefine.engines.cuda.rows import shape_of_rows
from crfrefine.engines.cuda.simplices import Simplices, estimated_vertices
from crfrefine.engines.cuda.spatial import SpatialFilter
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError, ConfigError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec


def choose_filter(bilateral: BilateralInput, num_channels: int, num_filterings: int) -> str:
    """Return the filter that `auto` chooses.

    It is the direct sum that is less work, or the lattice if that is clearly less, and possible.
    """
    num_voxels = bilateral.voxels.num_voxels
    num_groups, _, width = shape_of_rows(num_channels, num_voxels)
    filterings = num_filterings * num_groups + 2
    window = math.prod(2.0 * radius + 1.0 for radius in window_radius(bilateral))
    per_pair = pair_operations(bilateral.num_features, width)
    per_neighbor = pair_operations(len(bilateral.theta_intensity), width)
    costs = {  # the most accurate filter first
        "exact": filterings * num_voxels * float(num_voxels) * per_pair,
        "truncated": filterings * num_voxels * window * per_neighbor,
    }
    if min(costs.values()) > UNNOTICED:
        with suppress(CapacityError):
            num_vertices = estimated_vertices(bilateral, Simplices(bilateral))
            corners = num_voxels * (bilateral.num_features + 1.0)
            per_corner = lattice_operations(filterings, width, num_vertices / num_voxels)
            costs["lattice"] = LATTICE_HANDICAP * corners * per_corner
    return min(costs, key=lambda name: max(costs[name], UNNOTICED))


def build_kernel(voxels: Voxels, kernel: KernelSpec, spec: KernelSetSpec) -> Filter:
    """Build a kernel of a model on an image; it is not normalized yet.

    Raises ConfigError for the filter "grid", and for kinds of kernels, that this engine does not
    have.
    """
    theta = voxels.of_box_axes(kernel.theta_position)
    if kernel.kind == "spatial":
        return SpatialFilter(voxels, theta)
    if kernel.kind != "bilateral":
        raise ConfigError(
            f"{kernel.kind}: --device cuda has no such kernel; use --device cpu, or set its "
            "weight to 0"
        )

    bilateral = BilateralInput(voxels, theta, kernel.theta_intensity)
    name = spec.filter
    if name == "auto":
        name = choose_filter(bilateral, spec.num_labels - 1, spec.num_iterations)
    if name == "lattice":
        return Lattice(bilateral)
    if name == "truncated":
        return truncated_filter(bilateral)
    if name == "exact":
        return exact_filter(bilateral)
    raise ConfigError(
        f"mean_field.filter: --device cuda has exact, truncated and lattice, not {name!r}; use "
        "'lattice' or 'auto', or --device cpu"
    )
