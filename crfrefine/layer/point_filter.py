"""The Gaussian filter of points as a node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crfrefine.base import notices
from crfrefine.engines.point_kernels import TINY, CompiledPoints, DifferentiablePoints
from crfrefine.engines.torch.points import tensor_kernel
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import to_array, to_own_tensor, to_tensor

# Returns the product of (V, N) values with a kernel.
PointFilter = Callable[[Tensor], Tensor]


def point_filter(
    features: Tensor, grid: tuple[int, ...], method: str, threads: int | None
) -> PointFilter:
    """Return the kernel of (D, N) features on a grid."""
    engine = _engine_for(features)
    if engine is not None:
        built = _BuiltOnce(engine, grid, method, threads)

        def compiled(values: Tensor) -> Tensor:
            filtered = _Filter.apply(values, features, built)  # type: ignore[no-untyped-call]
            return filtered  # type: ignore[no-any-return]

        return compiled

    kernel = tensor_kernel(features.T, method)
    return lambda values: kernel(values.T).T


def _engine_for(features: Tensor) -> Any:
    """Return the engine that filters points on a tensor's device; None for tensor operations."""
    if features.dtype != torch.float32:
        return None
    try:
        return inputs.engine_for(features.device)
    except BackendUnavailableError as error:
        if "points" not in _TOLD:
            _TOLD.add("points")
            notices.warn(
                "gaussian_filter takes plain operations of PyTorch on this GPU, which are several "
                f"times slower than its own kernels: {error}"
            )
        return None


_TOLD: set[str] = set()  # warnings that were issued already


def normalized(kernel: PointFilter, values: Tensor, normalization: str) -> Tensor:
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
    """An engine's kernel of an item's points, built when `_Filter` first filters with it.

    Under a function transform, features have numbers only inside of `_Filter`.
    """

    def __init__(
        self, engine: Any, grid: tuple[int, ...], method: str, threads: int | None
    ) -> None:
        self._engine = engine
        self._grid = grid
        self._method = method
        self._threads = threads
        self._kernel: DifferentiablePoints | None = None

    def kernel(self, features: Tensor | None) -> DifferentiablePoints:
        """Return the kernel of (D, N) features, the same in each call.

        Only the first call needs the features.
        """
        if self._kernel is None:
            assert features is not None
            points = to_array(features).reshape(-1, *self._grid)
            if self._engine.name == "cpu":
                threads = self._threads or torch.get_num_threads()
                self._kernel = CompiledPoints(points, self._method, threads)
            else:
                self._kernel = self._engine.points(points, self._method)
        return self._kernel

    def in_tensor_operations(self, values: Tensor, features: Tensor | None) -> Tensor:
        """Filter (V, N) values in operations of PyTorch, which can be differentiated twice.

        The (D, N) features may be None after the first call of `kernel`. Raises InputError for a
        kernel on the CPU.
        """
        if self._engine.name == "cpu":
            raise InputError(
                "gaussian_filter has no second derivatives in float32 on the CPU; float64 has "
                "those with respect to the values"
            )
        if features is None:
            kernel: Any = self._kernel
            features = to_tensor(kernel.features)
        return tensor_kernel(features.T, self._method)(values.T).T


class _Filter(torch.autograd.Function):
    """An engine's filter, without normalization."""

    @staticmethod
    def forward(values: Tensor, features: Tensor, built: _BuiltOnce) -> Tensor:
        """Filter (V, N) values with (D, N) features."""
        filtered: Tensor = to_own_tensor(built.kernel(features).apply(to_array(values)))
        return filtered

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
        ctx.built = built

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to values and features."""
        values, features = ctx.saved_tensors
        wants_values, wants_features, _ = ctx.needs_input_grad
        wanted = (wants_values, wants_features)
        tensors = (grad, values, features)
        grads = _Gradients.apply(*tensors, ctx.built, *wanted)  # type: ignore[no-untyped-call]
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
        features: Tensor | None,
        built: _BuiltOnce,
        wants_values: bool,
        wants_features: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients that are wanted."""
        kernel = built.kernel(features)
        by_output = to_array(grad)
        by_values = None
        by_features = None
        if wants_values:
            by_values = to_own_tensor(kernel.apply(by_output, transposed=True))
        if wants_features and values is not None:
            by_features = to_own_tensor(kernel.feature_gradient(by_output, to_array(values)))
        return by_values, by_features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save everything, for second derivatives."""
        grad, values, features, ctx.built, *ctx.wanted = inputs
        ctx.save_for_backward(grad, values, features)

    vmap = _Filter.vmap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the second derivatives: those of operations of PyTorch."""
        grad, values, features = ctx.saved_tensors
        wants_values, wants_features = ctx.wanted
        with torch.enable_grad():
            by_output = grad.detach().requires_grad_()
            if values is None:  # Then the result is linear in the values, which do not matter.
                values = torch.zeros_like(grad)
            sent = values.detach().requires_grad_()
            points = features
            if features is not None:
                points = features.detach().requires_grad_()
            filtered = ctx.built.in_tensor_operations(sent, points)

            wanted = []
            given = []
            for leaf, is_wanted, by_gradient in zip(
                (sent, points), (wants_values, wants_features), grads, strict=True
            ):
                if is_wanted and by_gradient is not None:
                    wanted.append(leaf)
                    given.append(by_gradient)
            first = torch.autograd.grad(filtered, wanted, by_output, create_graph=True)
            leaves = [by_output, sent]
            if points is not None:
                leaves.append(points)
            second = torch.autograd.grad(first, leaves, given, allow_unused=True)
        by_features = second[2] if points is not None else None
        return second[0], second[1], by_features, None, None, None
