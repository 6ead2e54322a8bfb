"""The Gaussian filter on points for tensors, with gradients for values and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_array, given_voxels
from crfrefine.base.limits import check_threads
from crfrefine.engines.point_kernels import MAX_VALUE, check_word
from crfrefine.engines.points import NORMALIZATIONS, choose_method
from crfrefine.errors import InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import outside_graphs
from crfrefine.layer.point_filter import normalized, point_filter


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
    Second derivatives exist only with respect to the values, in float64 or on a GPU, and take
    operations of PyTorch.

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
    _check_fit(values, features)
    if not len(values):
        return values.clone()

    dtype = torch.float32
    if torch.float64 in (values.dtype, features.dtype):
        dtype = torch.float64
    sent = values.to(dtype).flatten(2)
    points = features.to(dtype).flatten(2)
    grid = tuple(values.shape[2:])
    inside = None
    if mask is not None:
        inside = _voxels_inside(mask, grid, values.device)
        sent = sent[..., inside]
        points = points[..., inside]
        grid = (points.shape[2],)
    _check_finite({"values": sent, "features": points})

    method = choose_method(method, points.shape[2], points.shape[1])
    items = []
    for index in range(len(sent)):
        kernel = point_filter(points[index], grid, method, threads)
        items.append(normalized(kernel, sent[index], normalization))
    filtered = torch.stack(items)
    if inside is not None:
        everywhere = filtered.new_zeros(*filtered.shape[:2], len(inside))
        everywhere[..., inside] = filtered
        filtered = everywhere
    return filtered.reshape(values.shape).to(values.dtype)


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
    filtered: Tensor = gaussian_filter(values[None], points[None], **options)[0]
    return filtered


class GpuLattice:
    """The kernel of points whose features are a tensor on a GPU; see `crfrefine.Lattice`.

    Attributes:
        num_points: N, those inside the mask.
        description: the algorithm and its size, in a line.
    """

    def __init__(self, features: Tensor, *, method: str, mask: Any = None) -> None:
        """Build the kernel of features (N, D) or (D, *grid)."""
        if features.ndim < 2 or not features.is_floating_point():
            raise InputError(
                f"features are {tuple(features.shape)} of {features.dtype}; expected floating-"
                "point numbers (N, D), or (D, *grid)"
            )
        if features.ndim == 2:
            features = features.T
        self._shape = tuple(features.shape[1:])
        self._device = features.device
        points = features.to(inputs.compute_dtype(features)).flatten(1)
        self._inside = None
        if mask is not None:
            self._inside = _voxels_inside(mask, self._shape, self._device)
            points = points[:, self._inside]
        self._dtype = points.dtype
        self.num_points = points.shape[1]
        _check_finite({"features": points})
        method = choose_method(method, self.num_points, len(points))
        self._kernel = point_filter(points, (self.num_points,), method, None)
        self.description = f"{method}, on {self._device}"
        # The kernel is built now, so that errors come from here.
        self._kernel(points.detach().new_zeros(1, self.num_points))

    def __call__(self, values: Any, normalization: str) -> Any:
        """Filter (V, N) or (V, *grid) values; see `crfrefine.Lattice`."""
        is_tensor = isinstance(values, Tensor)
        if not is_tensor:
            array = given_array(values, "values")
            values = torch.from_numpy(np.array(array, np.float32, order="C"))
        channels = values.to(self._device)
        if channels.ndim < 2 or tuple(channels.shape[1:]) != self._shape:
            grid = ", ".join(str(extent) for extent in self._shape)
            raise InputError(
                f"values have shape {tuple(channels.shape)}; expected (V, {grid}), one value per "
                "point of features (N, D) or (D, *grid)"
            )
        if not len(channels):
            return values.clone() if is_tensor else values.numpy()
        sent = channels.to(self._dtype).flatten(1)
        if self._inside is not None:
            sent = sent[:, self._inside]
        _check_finite({"values": sent})
        filtered = normalized(self._kernel, sent, normalization)
        if self._inside is not None:
            everywhere = filtered.new_zeros(len(filtered), len(self._inside))
            everywhere[:, self._inside] = filtered
            filtered = everywhere
        result = filtered.reshape(channels.shape)
        if not is_tensor:
            return result.cpu().numpy()
        return result.to(values.device, values.dtype)


def _voxels_inside(mask: Any, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where a mask of the grid is not zero, as a list of points on a device."""
    if isinstance(mask, Tensor):
        mask = mask.detach().float().cpu()
    return torch.from_numpy(given_voxels(mask, grid).flatten()).to(device)


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


def _check_fit(values: Tensor, features: Tensor) -> None:
    """Raise InputError unless batch, grid and device are the same."""
    are_alike = len(values) == len(features) and values.shape[2:] == features.shape[2:]
    if not are_alike or values.device != features.device:
        raise InputError(
            f"values {tuple(values.shape)} on {values.device} and features (batch, feature, "
            f"*grid) {tuple(features.shape)} on {features.device} do not fit each other"
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if a number is not finite, or too large for the engine.

    The host waits once for a GPU.
    """
    limits = {}
    tests = []
    name = ""
    try:
        for name, tensor in tensors.items():
            if not tensor.numel():
                continue
            limits[name] = torch.finfo(tensor.dtype).max
            if tensor.dtype == torch.float32:
                limits[name] = MAX_VALUE
            ends = torch.stack(tensor.detach().aminmax())
            tests.append(ends.abs().max() <= limits[name])
        name = next(iter(tensors))
        are_finite = torch.stack(tests).tolist() if tests else []
    except RuntimeError as error:  # Tensors under vmap hold no numbers that Python can read.
        raise InputError(
            f"{name}: expected a plain tensor; instead of torch.func.vmap, filter a batch (B, V, N)"
        ) from error
    for (name, limit), is_finite in zip(limits.items(), are_finite, strict=True):
        if not is_finite:
            raise InputError(
                f"{name}: expected finite numbers up to {limit:.0e}, found NaN, infinity or "
                "larger; has the training diverged?"
            )
