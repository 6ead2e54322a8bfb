"""The Gaussian filter on points of any features, for tensors, with gradients with respect to values and features."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_voxels
from crfrefine.base.limits import check_threads
from crfrefine.engines.point_kernels import (
    MAX_VALUE,
    TINY,
    CompiledPoints,
    check_word,
)
from crfrefine.engines.points import NORMALIZATIONS, choose_method
from crfrefine.engines.torch.points import tensor_kernel
from crfrefine.errors import InputError
from crfrefine.layer.autograd import outside_graphs


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
    """Filter values with the Gaussian of any features, item by item: out_i = sum_j exp(-|f_i - f_j|² / 2) values_j.

    The gradient with respect to the values is the transpose of the computed filter, bit for bit. The gradient with
    respect to the features is the derivative of the Gaussian: exact with method="exact", while with the
    lattice its error is that of the values. float32 on the CPU runs in the C++ engine; float64, and any GPU, in plain operations
    of PyTorch. `torch.func.grad` and `vjp` work; `vmap` and `jvp` do not. Second derivatives exist only with respect to the values, in
    float64 or on a GPU.

    Args:
        values: (B, V, N) or (B, V, *grid).
        features: (B, N, D) or (B, D, *grid), each divided by its bandwidth; finite.
        method: "exact", "lattice" or "auto", as of `crfrefine.gaussian_filter`.
        normalization: "none", "after" or "symmetric".
        mask: (N,) or (*grid), nonzero where points count; None means all.
        threads: CPU threads; None means as many as `torch.get_num_threads()`.

    Returns:
        The shape and type of the values; float16 and bfloat16 are computed in float32.

    Raises:
        InputError: shapes, types or devices do not fit, values that are not finite, or points that share no simplex of the lattice.
        ConfigError: a word that is not known.
        CapacityError: more features than the lattice takes, or a feature that spans more than a million bandwidths.

    Source: Adams, Baek & Davis 2010; docs/reference/math.md, sections 6 and 9.
    """
    check_threads(threads)
    check_word("normalization", normalization, NORMALIZATIONS)
    for name, tensor in (("values", values), ("features", features)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 3:
            kind = (
                f"{tuple(tensor.shape)} of {tensor.dtype}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            raise InputError(
                f"{name}: expected floating-point numbers with a batch, a channel and a grid, got {kind}"
            )
    if features.ndim == 3:
        features = features.transpose(1, 2)
    if (
        len(values) != len(features)
        or values.shape[2:] != features.shape[2:]
        or values.device != features.device
    ):
        raise InputError(
            f"values {tuple(values.shape)} on {values.device} and features (batch, feature, *grid) {tuple(features.shape)} on "
            f"{features.device} do not fit each other"
        )
    if not len(values):
        return values.clone()
    dtype = torch.float64 if torch.float64 in (values.dtype, features.dtype) else torch.float32
    sent, points = (tensor.to(dtype).flatten(2) for tensor in (values, features))
    inside = None
    if mask is not None:
        array = mask.detach().float().cpu() if isinstance(mask, Tensor) else mask
        inside = torch.from_numpy(given_voxels(array, tuple(values.shape[2:])).flatten()).to(
            values.device
        )
        sent, points = sent[..., inside], points[..., inside]
    most = MAX_VALUE if dtype == torch.float32 else torch.finfo(dtype).max
    for name, tensor in (("values", sent), ("features", points)):
        try:
            is_finite = not tensor.numel() or bool(
                torch.stack(tensor.detach().aminmax()).abs().max() <= most
            )
        except RuntimeError as error:  # Such tensors hold no numbers that Python can read.
            raise InputError(
                f"{name}: expected a plain tensor; instead of torch.func.vmap, filter a batch (B, V, N)"
            ) from error
        if not is_finite:
            raise InputError(
                f"{name}: expected finite numbers up to {most:.0e}, found NaN, infinity or larger; has the training diverged?"
            )
    method = choose_method(method, points.shape[2], points.shape[1])
    grid = tuple(values.shape[2:]) if inside is None else (points.shape[2],)
    filtered = torch.stack(
        [
            _normalized(sent[i], points[i], grid, method, normalization, threads)
            for i in range(len(sent))
        ]
    )
    if inside is not None:
        whole = filtered.new_zeros(*filtered.shape[:2], len(inside))
        whole[..., inside] = filtered
        filtered = whole
    return filtered.reshape(values.shape).to(values.dtype)


def _normalized(
    values: Tensor,
    features: Tensor,
    grid: tuple[int, ...],
    method: str,
    normalization: str,
    threads: int | None,
) -> Tensor:
    """Filter (V, N) values with (D, N) features on a grid."""
    if values.dtype == torch.float32 and values.device.type == "cpu":
        kept = SimpleNamespace(grid=grid, kernel=None)  # None until the kernel is built

        def apply(channels: Tensor) -> Tensor:
            filtered: Tensor = _Filter.apply(channels, features, kept, method, threads)  # type: ignore[no-untyped-call]
            return filtered
    else:
        kernel = tensor_kernel(features.T, method)

        def apply(channels: Tensor) -> Tensor:
            return kernel(channels.T).T

    if normalization == "none":
        return apply(values)
    ones = values.new_ones(1, values.shape[1])
    if normalization == "after":
        both = apply(torch.cat([values, ones]))
        return both[:-1] / both[-1:].clamp(min=TINY)
    scale = apply(ones).clamp(min=TINY).rsqrt()
    return apply(values * scale) * scale


class _Filter(torch.autograd.Function):
    """The C++ engine's filter, without normalization."""

    @staticmethod
    def forward(
        values: Tensor, features: Tensor, kept: SimpleNamespace, method: str, threads: int | None
    ) -> Tensor:
        """Filter (V, N) values with (D, N) features; the kernel is built if it is not kept yet."""
        if kept.kernel is None:
            points = features.detach().contiguous().numpy().reshape(-1, *kept.grid)
            kept.kernel = CompiledPoints(points, method, threads or torch.get_num_threads())
        return torch.from_numpy(kept.kernel.apply(values.detach().contiguous().numpy()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the kernel, and for the gradient of the features both tensors, so that PyTorch notices if they have changed since."""
        ctx.save_for_backward(*(inputs[:2] if ctx.needs_input_grad[1] else (None, None)))
        ctx.kernel = inputs[2].kernel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to values and features."""
        values, _ = ctx.saved_tensors
        of_values, of_features = ctx.needs_input_grad[:2]
        grads = _Gradients.apply(grad, values, ctx.kernel, of_values, of_features)  # type: ignore[no-untyped-call]
        return *grads, None, None, None

    @staticmethod
    def vmap(*_: Any) -> None:
        """Refuse: the engine filters item by item."""
        raise InputError(
            "gaussian_filter in float32 on the CPU does not work with torch.func.vmap, jacrev or jacfwd; float64 does with jacrev"
        )

    @staticmethod
    def jvp(*_: Any) -> None:
        """Refuse forward mode: only gradients exist."""
        raise InputError(
            "gaussian_filter has no derivatives in forward mode; use torch.func.vjp or grad"
        )


class _Gradients(torch.autograd.Function):
    """The gradients of `_Filter` as a separate node, through which function transforms reach the engine."""

    @staticmethod
    def forward(
        grad: Tensor,
        values: Tensor | None,
        kernel: CompiledPoints,
        of_values: bool,
        of_features: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients that are wanted."""
        given = grad.detach().contiguous().numpy()
        left = torch.from_numpy(kernel.apply(given, transposed=True)) if of_values else None
        if values is None or not of_features:
            return left, None
        return left, torch.from_numpy(
            kernel.feature_gradient(given, values.detach().contiguous().numpy())
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save nothing."""

    vmap = _Filter.vmap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        """Refuse: second derivatives need float64."""
        raise InputError(
            "gaussian_filter has no second derivatives in float32 on the CPU; float64 has those with respect to the values"
        )
