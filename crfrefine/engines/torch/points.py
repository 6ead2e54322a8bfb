"""The kernel of points in plain tensor operations."""

from __future__ import annotations

from torch import Tensor

from crfrefine.engines.points import require_shared, require_small_spans
from crfrefine.engines.torch.filters import Filter, Lattice, dense_filter


def tensor_kernel(features: Tensor, method: str) -> Filter:
    """Return the kernel of (N, D) features, which follows their gradients.

    Raises CapacityError for a feature that spans too many bandwidths, InputError if no two points
    share a vertex of the lattice.
    """
    # The origin of the C++ engine: the lattice is the same, and an offset costs no digits.
    features = features - features.detach().amin(0)
    require_small_spans(features.detach().amax().item())
    if method == "exact":
        return dense_filter(features)
    lattice = Lattice(features)
    num_points, num_features = features.shape
    require_shared(lattice.num_vertices, num_points, num_features)
    return lattice
