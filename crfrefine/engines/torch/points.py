"""The kernel of points in plain tensor operations: for tensors of any type and device, and for arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float32
from crfrefine.engines.point_kernels import MAX_SPAN, require_shared
from crfrefine.engines.torch.filters import Filter, Lattice, dense_filter
from crfrefine.errors import BackendUnavailableError, CapacityError


class TorchPoints:
    """The kernel of points in operations of PyTorch, for arrays."""

    def __init__(self, points: Float32, method: str, device: str) -> None:
        """Build the kernel of features (D, *grid); `device` is "torch" or "torch:cuda"."""
        if device != "torch" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                "device 'torch:cuda': PyTorch finds no GPU; use 'torch' or 'cpu'"
            )
        self._device = "cpu" if device == "torch" else "cuda"
        self.description = f"{method}, in operations of PyTorch on {self._device}"
        self._kernel = tensor_kernel(
            torch.from_numpy(points.reshape(len(points), -1).T.copy()).to(self._device), method
        )

    def apply(self, values: Float32, scale: Float32 | None = None) -> Float32:
        """Filter (V, N) values, and multiply each point's results by its `scale`, (N,)."""
        filtered = self._kernel(torch.from_numpy(values.T.copy()).to(self._device)).cpu().numpy()
        result: Float32 = np.ascontiguousarray(filtered.T)
        return result if scale is None else result * scale

    def mean(self, values: Float32) -> None:
        """Return None: the sums of weights take a filtering of their own."""


def tensor_kernel(features: Tensor, method: str) -> Filter:
    """Return the kernel of (N, D) features in operations of PyTorch."""
    features = features - features.detach().amin(
        0
    )  # The C++ engine's origin: the same lattice, and no digits lost to an offset.
    if features.detach().amax() > MAX_SPAN:
        raise CapacityError(
            "a feature spans more than a million bandwidths; divide the features by larger ones"
        )
    if method == "exact":
        return dense_filter(features)
    lattice = Lattice(features)
    require_shared(lattice.num_vertices, *features.shape)
    return lattice
