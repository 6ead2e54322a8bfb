"""The kernel of points in plain tensor operations: for tensors of any device, and for arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float32
from crfrefine.base.numerics import MAX_SPAN
from crfrefine.engines.points import require_shared
from crfrefine.engines.torch.filters import Filter, Lattice, dense_filter
from crfrefine.errors import BackendUnavailableError, CapacityError


class TorchPoints:
    """The kernel of points, for arrays; see `PointKernel`."""

    def __init__(self, points: Float32, method: str, device: str) -> None:
        """Build the kernel of features (D, *grid); `device` is "torch" or "torch:cuda"."""
        if device != "torch" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                "device 'torch:cuda': PyTorch finds no GPU; use 'torch' or 'cpu'"
            )
        self._device = "cpu" if device == "torch" else "cuda"
        self.description = f"{method}, in operations of PyTorch on {self._device}"
        rows = points.reshape(len(points), -1)
        self._kernel = tensor_kernel(self._upload(rows), method)

    def apply(self, values: Float32, scale: Float32 | None = None) -> Float32:
        """Filter values; see `PointKernel.apply`."""
        filtered = self._kernel(self._upload(values)).cpu().numpy()
        result: Float32 = np.ascontiguousarray(filtered.T)
        if scale is not None:
            result = result * scale
        return result

    def mean(self, values: Float32) -> None:
        """Return None: the sums of weights need a second filtering."""

    def _upload(self, rows: Float32) -> Tensor:
        """Return (row, point) numbers as a (point, row) tensor."""
        return torch.from_numpy(rows.T.copy()).to(self._device)


def tensor_kernel(features: Tensor, method: str) -> Filter:
    """Return the kernel of (N, D) features, which follows their gradients.

    Raises CapacityError for a feature that spans too many bandwidths, InputError if no two points
    share a vertex of the lattice.
    """
    # The origin of the C++ engine: the lattice is the same, and an offset costs no digits.
    features = features - features.detach().amin(0)
    if features.detach().amax() > MAX_SPAN:
        raise CapacityError(
            "a feature spans more than a million bandwidths; divide the features by larger ones"
        )
    if method == "exact":
        return dense_filter(features)
    lattice = Lattice(features)
    num_points, num_features = features.shape
    require_shared(lattice.num_vertices, num_points, num_features)
    return lattice
