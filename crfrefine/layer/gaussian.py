"""The Gaussian filter on points for tensors, with gradients for values and features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_array, given_voxels
from crfrefine.base.limits import check_threads
from crfrefine.engines.point_kernels import MAX_VALUE, TINY, CompiledPoints, check_word
from crfrefine.engines.points import NORMALIZATIONS, choose_method
from crfrefine.engines.torch.points import tensor_kernel
from crfrefine.errors import InputError
from crfrefine.layer.autograd import outside_graphs, to_array


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
    method="exact", while with the lattice its error is that of the values. float32 on the CPU runs
    in the C++ engine; float64, and any GPU, in plain operations of PyTorch. `torch.func.grad` and
    `vjp` work; `vmap` and `jvp` do not. Second derivatives exist only with respect to the values,
    in float64 or on a GPU.

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
        if isinstance(mask, Tensor):
            mask = mask.detach().float().cpu()
        inside = torch.from_numpy(given_voxels(mask, grid).flatten()).to(values.device)
        sent = sent[..., inside]
        points = points[..., inside]
        grid = (points.shape[2],)
    _check_finite("values", sent)
    _check_finite("features", points)

    method = choose_method(method, points.shape[2], points.shape[1])
    items = []
    for index in range(len(sent)):
        kernel = _kernel(points[index], grid, method, threads)
        items.append(_normalized(kernel, sent[index], normalization))
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


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a number is not finite, or too large for the engine."""
    if not tensor.numel():
        return
    largest = torch.finfo(tensor.dtype).max
    if tensor.dtype == torch.float32:
        largest = MAX_VALUE
    try:
        ends = torch.stack(tensor.detach().aminmax())
        is_finite = bool(ends.abs().max() <= largest)
    except RuntimeError as error:  # Tensors under vmap hold no numbers that Python can read.
        raise InputError(
            f"{name}: expected a plain tensor; instead of torch.func.vmap, filter a batch (B, V, N)"
        ) from error
    if not is_finite:
        raise InputError(
            f"{name}: expected finite numbers up to {largest:.0e}, found NaN, infinity or larger; "
            "has the training diverged?"
        )


# Returns the product of (V, N) values with a kernel.
PointFilter = Callable[[Tensor], Tensor]


def _kernel(
    features: Tensor, grid: tuple[int, ...], method: str, threads: int | None
) -> PointFilter:
    """Return the kernel of (D, N) features on a grid."""
    if features.dtype == torch.float32 and features.device.type == "cpu":
        built = _BuiltOnce(grid, method, threads)

        def compiled(values: Tensor) -> Tensor:
            filtered = _Filter.apply(values, features, built)  # type: ignore[no-untyped-call]
            return filtered  # type: ignore[no-any-return]

        return compiled

    kernel = tensor_kernel(features.T, method)
    return lambda values: kernel(values.T).T


def _normalized(kernel: PointFilter, values: Tensor, normalization: str) -> Tensor:
    """Filter (V, N) values, and divide by sums of weights as "none", "after" or "symmetric"."""
    if normalization == "none":
        return kernel(values)
    ones = values.new_ones(1, values.shape[1])
    if normalization == "after":
        filtered = kernel(torch.cat([values, ones]))
        return filtered[:-1] / filtered[-1:].clamp(min=TINY)
    scale = kernel(ones).clamp(min=TINY).rsqrt()
    return kernel(values * scale) * scale


class _BuiltOnce:
    """The compiled kernel of an item's points, built when `_Filter` first filters with it.

    Under a function transform, features have numbers only inside of `_Filter`.
    """

    def __init__(self, grid: tuple[int, ...], method: str, threads: int | None) -> None:
        self._grid = grid
        self._method = method
        self._threads = threads
        self._kernel: CompiledPoints | None = None

    def kernel(self, features: Tensor) -> CompiledPoints:
        """Return the kernel of (D, N) features, the same in each call."""
        if self._kernel is None:
            points = to_array(features).reshape(-1, *self._grid)
            threads = self._threads or torch.get_num_threads()
            self._kernel = CompiledPoints(points, self._method, threads)
        return self._kernel


class _Filter(torch.autograd.Function):
    """The C++ engine's filter, without normalization."""

    @staticmethod
    def forward(values: Tensor, features: Tensor, built: _BuiltOnce) -> Tensor:
        """Filter (V, N) values with (D, N) features."""
        return torch.from_numpy(built.kernel(features).apply(to_array(values)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the kernel, and if the features need a gradient, values and features.

        PyTorch then refuses the backward pass if these have changed since.
        """
        values, features, built = inputs
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, features)
        else:
            ctx.save_for_backward(None, None)
        ctx.kernel = built.kernel(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to values and features."""
        values, _ = ctx.saved_tensors
        wants_values, wants_features, _ = ctx.needs_input_grad
        wanted = (wants_values, wants_features)
        grads = _Gradients.apply(grad, values, ctx.kernel, *wanted)  # type: ignore[no-untyped-call]
        return *grads, None

    @staticmethod
    def vmap(*_: Any) -> None:
        """Refuse: the engine filters item by item."""
        raise InputError(
            "gaussian_filter in float32 on the CPU does not work with torch.func.vmap, jacrev or "
            "jacfwd; float64 does with jacrev"
        )

    @staticmethod
    def jvp(*_: Any) -> None:
        """Refuse forward mode: only gradients exist."""
        raise InputError(
            "gaussian_filter has no derivatives in forward mode; use torch.func.vjp or grad"
        )


class _Gradients(torch.autograd.Function):
    """The gradients of `_Filter`: a separate node, so that function transforms reach the engine."""

    @staticmethod
    def forward(
        grad: Tensor,
        values: Tensor | None,
        kernel: CompiledPoints,
        wants_values: bool,
        wants_features: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients that are wanted."""
        by_output = to_array(grad)
        by_values = None
        by_features = None
        if wants_values:
            by_values = torch.from_numpy(kernel.apply(by_output, transposed=True))
        if wants_features and values is not None:
            by_features = torch.from_numpy(kernel.feature_gradient(by_output, to_array(values)))
        return by_values, by_features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save nothing."""

    vmap = _Filter.vmap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        """Refuse: second derivatives need float64."""
        raise InputError(
            "gaussian_filter has no second derivatives in float32 on the CPU; float64 has those "
            "with respect to the values"
        )
