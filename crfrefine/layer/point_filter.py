"""The Gaussian filter of points as a node of the autograd graph."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from crfrefine.base import notices
from crfrefine.engines.point_kernels import TINY, CompiledPoints, DifferentiablePoints
from crfrefine.engines.torch.points import tensor_kernel
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import to_array, to_own_tensor, to_tensor


class PointFilter:
    """The kernel of points: returns the product of (V, N) values with it, which has gradients."""

    def __init__(
        self, features: Tensor, grid: tuple[int, ...], method: str, threads: int | None
    ) -> None:
        """Take (D, N) features on a grid; an engine builds its kernel in the first call."""
        self._features = features
        self._method = method
        self._built: _BuiltOnce | None = None
        engine = _engine_for(features)
        if engine is not None:
            self._built = _BuiltOnce(engine, grid, method, threads)
        else:
            self._in_operations = tensor_kernel(features.T, method)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter (V, N) values."""
        if self._built is None:
            return self._in_operations(values.T).T
        return _Filter.apply(  # type: ignore[no-untyped-call]
            values, self._features, self._built
        )

    def with_graph_of(self, features: Tensor) -> PointFilter:
        """Return the same kernel for features of the same values, which gradients go to."""
        same = copy(self)
        same._features = features
        if self._built is None:
            same._in_operations = tensor_kernel(features.T, self._method)
        return same

    @property
    def description(self) -> str:
        """The algorithm and its size, in a line."""
        if self._built is None:
            return f"{self._method}, in operations of PyTorch on {self._features.device}"
        return self._built.kernel(self._features).description


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
                "gaussian_filter takes plain operations of PyTorch, which are several times slower "
                f"than the engine's kernels: {error}"
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
        return to_own_tensor(built.kernel(features).apply(to_array(values)))

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
            "gaussian_filter in float32 does not work with torch.func.vmap, jacrev or jacfwd; "
            "float64 does with jacrev"
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
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the second derivatives: those of operations of PyTorch."""
        grad, values, features = ctx.saved_tensors
        sent = values
        if values is None:  # Then the result is linear in the values, which do not matter.
            sent = torch.zeros_like(grad)
        leaves = [grad, sent]
        if features is not None:
            leaves.append(features)

        def first(by_output: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            def filtered(sent: Tensor, points: Tensor | None = None) -> Tensor:
                return ctx.built.in_tensor_operations(sent, points)

            pull: Any = torch.func.vjp(filtered, *arguments)[1]
            return pull(by_output)

        gradients, pull = torch.func.vjp(first, *leaves)[:2]
        given = []
        for gradient, by_gradient in zip(gradients, grads, strict=False):
            given.append(torch.zeros_like(gradient) if by_gradient is None else by_gradient)
        second: Any = pull(tuple(given))
        by_values = second[1] if values is not None else None
        by_features = second[2] if features is not None else None
        return second[0], by_values, by_features, None, None, None
