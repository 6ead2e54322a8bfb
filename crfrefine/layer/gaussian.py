"""The Gaussian filter on points for tensors, with gradients for values and features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_array, given_voxels
from crfrefine.base.array_types import Float32, Shape
from crfrefine.base.limits import check_threads
from crfrefine.engines.points import MAX_VALUE, NORMALIZATIONS, check_word
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import outside_graphs
from crfrefine.layer.point_filter import PointFilter


@outside_graphs
def gaussian_filter(
    values: Tensor,
    features: Tensor,
    *,
    method: str = "auto",
    normalization: str = "none",
    mask: Any = None,
    threads: int | None = None,
) -> Tensor:
    """Filter values, item by item, with the Gaussian of any features.

    The result is out_i = sum_j exp(-|f_i - f_j|² / 2) values_j, over all pairs of points.

    The gradient with respect to the values is the transpose of the computed filter, bit for bit.
    The gradient with respect to the features is the derivative of the Gaussian: exact with
    method="exact", while with the lattice its error is that of the values. float32 runs in the C++
    engine on the CPU, and in the GPU engine on a GPU, for which CuPy must be installed; float64
    runs in plain operations of PyTorch. `torch.func.grad` and `vjp` work; `vmap` and `jvp` do not.
    Second derivatives exist only with respect to the values, and in float64.

    Args:
        values: (B, V, N) or (B, V, *grid).
        features: (B, N, D) or (B, D, *grid), each divided by its bandwidth; finite.
        method: "exact", "lattice" or "auto", as in `crfrefine.gaussian_filter`.
        normalization: "none", "after" or "symmetric".
        mask: (N,) or (*grid), nonzero where points count; None means all.
        threads: CPU threads; None means as many as `torch.get_num_threads()`.

    Returns:
        The shape and type of the values; float16 and bfloat16 are computed in float32.

    Raises:
        InputError: shapes, types or devices do not fit, values that are not finite, or points that
            share no simplex of the lattice.
        ConfigError: an unknown word.
        CapacityError: more features than the lattice takes, or a feature that spans more than a
            million bandwidths.

    Source: Adams, Baek & Davis 2010; docs/reference/math.md, sections 6 and 9.
    """
    check_threads(threads)
    check_word("normalization", normalization, NORMALIZATIONS)
    _check_kind("values", values)
    _check_kind("features", features)
    if features.ndim == 3:
        features = features.transpose(1, 2)
    are_alike = len(values) == len(features) and values.shape[2:] == features.shape[2:]
    if not are_alike or values.device != features.device:
        raise InputError(
            f"values {tuple(values.shape)} on {values.device} and features (batch, feature, "
            f"*grid) {tuple(features.shape)} on {features.device} do not fit each other"
        )
    if not len(values):
        return values.clone()

    dtype = torch.float32
    if torch.float64 in (values.dtype, features.dtype):
        dtype = torch.float64
    sent = values.to(dtype).flatten(2)
    points = features.to(dtype).flatten(2)
    grid = tuple(values.shape[2:])
    places = None
    if mask is not None:
        places = _places_inside(mask, grid, values.device)
        sent = sent.index_select(2, places)
        points = points.index_select(2, places)
        grid = (points.shape[2],)
    _check_finite("values", sent)
    _check_finite("features", points)

    items = []
    for index in range(len(sent)):
        kernel = PointFilter(points[index], grid, method, threads)
        items.append(kernel.normalized(sent[index], normalization))
    return _on_grid(torch.stack(items), places, values.shape).to(values.dtype)


def filter_one(values: Tensor, features: Any, **options: Any) -> Tensor:
    """Filter (V, N) or (V, *grid) values with (N, D) or (D, *grid) features, a tensor or an array.

    The options are those of `gaussian_filter`, which takes a batch.
    """
    if isinstance(features, Tensor):
        points = features
    else:
        array = given_array(features, "features")
        dtype = np.float32 if array.dtype == np.float32 else np.float64
        points = torch.from_numpy(np.array(array, dtype, order="C"))
    points = points.to(values.device)
    if min(values.ndim, points.ndim) < 2:
        raise InputError(
            f"values {tuple(values.shape)} and features {tuple(points.shape)}: expected (V, N) "
            "and (N, D), or (V, *grid) and (D, *grid)"
        )
    return gaussian_filter(values[None], points[None], **options)[0]


class TensorPoints:
    """The points of a `crfrefine.Lattice`: features on a GPU, or for operations of PyTorch.

    Attributes:
        num_points: N, those inside the mask.
        description: the algorithm and its size, in a line.
    """

    def __init__(
        self, features: Tensor, method: str, mask: Any = None, *, is_plain: bool = False
    ) -> None:
        """Build the kernel of features (D, *grid); `is_plain` is that of `PointFilter`."""
        if not features.is_floating_point():
            raise InputError(f"features: expected floating-point numbers, got {features.dtype}")
        self._features = features
        self._places = None
        if mask is not None:
            self._places = _places_inside(mask, tuple(features.shape[1:]), features.device)
        points = self._inside(features)
        self.num_points = points.shape[1]
        _check_finite("features", points)
        # A copy: the kernel is that of the features as they are now.
        copied = points.detach().clone()
        self._filter = PointFilter(copied, (self.num_points,), method, None, is_plain=is_plain)
        # The kernel is built now, so that errors come from here.
        self.description = self._filter.description

    @outside_graphs
    def filter(self, values: Any, normalization: str) -> Any:
        """Filter (V, *grid) values, at least one channel; a tensor or an array, as the result."""
        is_tensor = isinstance(values, Tensor)
        if not is_tensor:
            values = torch.from_numpy(np.array(values, np.float32, order="C"))
        sent = self._inside(values.to(self._features.device))
        _check_finite("values", sent)
        kernel = self._filter
        if self._features.requires_grad and torch.is_grad_enabled():
            # Gradients go to the caller's tensor; its values may have changed.
            kernel = kernel.with_graph_of(self._inside(self._features))
        elif normalization != "none":
            kernel.keep_sums()
        result = _on_grid(kernel.normalized(sent, normalization), self._places, values.shape)
        if is_tensor:
            return result.to(values.device, values.dtype)
        return result.detach().cpu().numpy()

    def _inside(self, channels: Tensor) -> Tensor:
        """Return the values of the points, (V, N), from (V, *grid)."""
        values = channels.to(inputs.compute_dtype(self._features)).flatten(1)
        if self._places is not None:
            values = values.index_select(1, self._places)
        return values


def plain_points(features: Float32, method: str, device: str) -> TensorPoints:
    """Build the kernel of features (D, *grid) in operations; `device` is "torch" or "torch:cuda".

    Raises BackendUnavailableError without the GPU.
    """
    if device != "torch" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device 'torch:cuda': PyTorch finds no GPU; use 'torch' or 'cpu'"
        )
    tensor = torch.tensor(features, device="cpu" if device == "torch" else "cuda")
    return TensorPoints(tensor, method, is_plain=True)


def _places_inside(mask: Any, grid: Shape, device: torch.device) -> Tensor:
    """Return the numbers of the points where a mask of the grid is not zero, on a device."""
    if isinstance(mask, Tensor):
        mask = mask.detach().float().cpu()
    return torch.from_numpy(np.flatnonzero(given_voxels(mask, grid))).to(device)


def _on_grid(filtered: Tensor, places: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return (..., N) values of the points on their grid, zero elsewhere."""
    if places is None:
        return filtered.reshape(shape)
    num_axes = filtered.ndim - 1
    everywhere = filtered.new_zeros(*shape[:num_axes], math.prod(shape[num_axes:]))
    return everywhere.index_copy(num_axes, places, filtered).reshape(shape)


def _check_kind(name: str, tensor: Any) -> None:
    """Raise InputError unless a value is a tensor of floating-point numbers with a grid."""
    if not isinstance(tensor, Tensor):
        found = type(tensor).__name__
    elif not tensor.is_floating_point() or tensor.ndim < 3:
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
    else:
        return
    raise InputError(
        f"{name}: expected floating-point numbers with a batch, a channel and a grid, got {found}"
    )


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a number is not finite, or too large for the engine."""
    if not tensor.numel():
        return
    limit = MAX_VALUE if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).max
    try:
        ends = torch.stack(tensor.detach().aminmax())
        is_usable = bool(ends.abs().max() <= limit)
    except RuntimeError as error:
        # An error of a GPU, perhaps of earlier work; tensors under vmap hold no numbers to read.
        is_under_vmap = torch._C._functorch.is_batchedtensor(tensor)
        if tensor.device.type == "cuda" and not is_under_vmap:
            raise
        raise InputError(
            f"{name}: expected a plain tensor; instead of torch.func.vmap, filter a batch (B, V, N)"
        ) from error
    if not is_usable:
        raise InputError(
            f"{name}: expected finite numbers up to {limit:.0e}, found NaN, infinity or "
            "larger; has the training diverged?"
        )
