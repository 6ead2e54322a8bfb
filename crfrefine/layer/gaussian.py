"""The Gaussian filter on points of any features, for tensors, with gradients with respect to values and features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_voxels
from crfrefine.base.limits import check_threads
from crfrefine.engines.points import MAX_VALUE, NORMALIZATIONS, TINY, CompiledPoints, check_word, choose_method, require_shared
from crfrefine.errors import InputError
from crfrefine.layer.autograd import outside_graphs, to_array

if TYPE_CHECKING:
    from collections.abc import Callable


@outside_graphs
def gaussian_filter(
    values: Tensor, features: Tensor, *, method: str = "auto", normalization: str = "none", mask: Any = None, threads: int | None = None
) -> Tensor:
    """Filter values with the Gaussian of any features, item by item: out_i = sum_j exp(-|f_i - f_j|² / 2) values_j.

    The gradient with respect to the values is the transpose of the computed filter, bit for bit; that with respect to the features is the
    derivative of the Gaussian. float32 on the CPU runs in the C++ engine; float64, and any GPU, in plain operations of PyTorch.
    `torch.func.grad` and `vjp` work; `vmap` and `jvp` do not.

    Args:
        values: (B, V, N) or (B, V, *grid).
        features: (B, N, D) or (B, D, *grid), each divided by its bandwidth; finite.
        method: "exact", "lattice" or "auto", as of `crfrefine.gaussian_filter`.
        normalization: "none", "after" or "symmetric", likewise.
        mask: (N,) or (*grid), nonzero where points count; None means all.
        threads: CPU threads; None means as many as `torch.get_num_threads()`.

    Returns:
        The shape and type of the values; float16 and bfloat16 are computed in float32.

    Raises:
        InputError, ConfigError, CapacityError: as `crfrefine.gaussian_filter`; also types or devices that do not fit.

    Source: Adams, Baek & Davis 2010; docs/reference/math.md, sections 6 and 9.
    """
    check_threads(threads)
    check_word("normalization", normalization, NORMALIZATIONS)
    for name, tensor in (("values", values), ("features", features)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 3:
            kind = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name}: expected floating-point numbers with a batch, a channel and a grid, got {kind}")
    if features.ndim == 3:
        features = features.transpose(1, 2)
    if len(values) != len(features) or values.shape[2:] != features.shape[2:] or values.device != features.device:
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
        inside = torch.from_numpy(given_voxels(array, tuple(values.shape[2:])).flatten()).to(values.device)
        sent, points = sent[..., inside], points[..., inside]
    if not points.numel():
        raise InputError(f"there are {points.shape[2]} points of {points.shape[1]} features; expected one or more of each")
    most = MAX_VALUE if dtype == torch.float32 else torch.finfo(dtype).max
    for name, tensor in (("values", sent), ("features", points)):
        try:
            is_finite = not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).abs().max() <= most)
        except RuntimeError as error:  # Such tensors hold no numbers that Python can read.
            raise InputError(f"{name}: expected a plain tensor; instead of torch.func.vmap, filter a batch (B, V, N)") from error
        if not is_finite:
            raise InputError(f"{name}: expected finite numbers up to {most:.0e}, found NaN, infinity or larger; has the training diverged?")
    method = choose_method(method, points.shape[2])
    grid = tuple(values.shape[2:]) if inside is None else (points.shape[2],)
    filtered = torch.stack([_normalized(sent[i], points[i], grid, method, normalization, threads) for i in range(len(sent))])
    if inside is not None:
        on_grid = filtered.new_zeros(*filtered.shape[:2], len(inside))
        on_grid[..., inside] = filtered
        filtered = on_grid
    return filtered.reshape(values.shape).to(values.dtype)


def _normalized(values: Tensor, features: Tensor, grid: tuple[int, ...], method: str, normalization: str, threads: int | None) -> Tensor:
    """Filter (V, N) values with (D, N) features on a grid."""
    is_compiled = values.dtype == torch.float32 and values.device.type == "cpu"
    kept: list[Any] = []
    if not is_compiled:
        from crfrefine.engines.torch.filters import Lattice, dense_filter

        points = (features - features.detach().amin(1, keepdim=True)).T  # The C++ engine's origin, and no digits lost to an offset.
        kept.append(dense_filter(points) if method == "exact" else Lattice(points))
        if method == "lattice":
            require_shared(kept[0].num_vertices, *points.shape)

    def build(points: Tensor) -> CompiledPoints:
        """Return the kernel of the features, which functions of PyTorch unwrap only inside of `_Filter`; build it once."""
        if not kept:
            kept.append(CompiledPoints(to_array(points).reshape(-1, *grid), method, threads or torch.get_num_threads()))
        kernel: CompiledPoints = kept[0]
        return kernel

    def apply(channels: Tensor) -> Tensor:
        filtered: Tensor = _Filter.apply(channels, features, build) if is_compiled else kept[0](channels.T).T  # type: ignore[no-untyped-call]
        return filtered

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
    def forward(values: Tensor, features: Tensor, build: Callable[[Tensor], CompiledPoints]) -> Tensor:
        """Filter (V, N) values with (D, N) features."""
        return torch.from_numpy(build(features).apply(to_array(values)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the values and the kernel, and the features, so that PyTorch notices if they have changed before the backward pass."""
        values, features, build = inputs
        ctx.save_for_backward(values, features if ctx.needs_input_grad[1] else None)
        ctx.kernel = build(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to values and features."""
        values, _ = ctx.saved_tensors
        of_values, of_features = ctx.needs_input_grad[:2]
        grads = _Gradients.apply(grad, values, ctx.kernel, of_values, of_features)  # type: ignore[no-untyped-call]
        return *grads, None

    @staticmethod
    def vmap(*_: Any) -> None:
        """Refuse: the engine filters item by item."""
        raise InputError(
            "gaussian_filter in float32 on the CPU does not work with torch.func.vmap, jacrev or jacfwd; float64 does with jacrev"
        )

    @staticmethod
    def jvp(*_: Any) -> None:
        """Refuse forward mode: only gradients exist."""
        raise InputError("gaussian_filter has no derivatives in forward mode; use torch.func.vjp or grad")


class _Gradients(torch.autograd.Function):
    """The gradients of `_Filter` as a separate node, through which function transforms reach the engine."""

    @staticmethod
    def forward(
        grad: Tensor, values: Tensor, kernel: CompiledPoints, of_values: bool, of_features: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients that are wanted."""
        by_output = to_array(grad)
        left = torch.from_numpy(kernel.apply(by_output, transposed=True)) if of_values else None
        return left, torch.from_numpy(kernel.feature_gradient(by_output, to_array(values))) if of_features else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save nothing."""

    vmap = _Filter.vmap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        """Refuse: second derivatives need float64."""
        raise InputError("gaussian_filter has no second derivatives in float32 on the CPU; float64 has them")
