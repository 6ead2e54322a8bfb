"""The Gaussian filter of points as a node of the autograd graph."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crfrefine.base import notices
from crfrefine.base.array_types import Shape
from crfrefine.engines.points import TINY, CompiledPoints, choose_method
from crfrefine.engines.torch.points import tensor_kernel
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import to_array, to_own_tensor

if TYPE_CHECKING:
    from crfrefine.engines.cuda.points import CudaPoints

_TOLD: set[str] = set()  # warnings that were issued already


class PointFilter:
    """The kernel of points: returns the product of (V, N) values with it, which has gradients.

    An engine's kernel is built in the first call: under a function transform, features have numbers
    only inside of `_Filter`.
    """

    def __init__(
        self,
        features: Tensor,
        grid: Shape,
        method: str,
        threads: int | None,
        *,
        is_plain: bool = False,
    ) -> None:
        """Take (D, N) features on a grid; the method is "exact", "lattice" or "auto".

        With `is_plain` the kernel is in operations of PyTorch, whatever the features are. Raises
        InputError without points, ConfigError for another method.
        """
        self._features = features
        self._grid = grid
        self._method = choose_method(method, features.shape[1], len(features))
        self._threads = threads
        self._kernel: CompiledPoints | CudaPoints | None = None
        self._sums: Tensor | None = None  # of each point's weights, if they are known, (1, N)
        self._engine: Any = None
        if features.dtype == torch.float32 and not is_plain:
            try:
                self._engine = inputs.engine_for(features.device)
            except BackendUnavailableError as error:
                notices.warn(
                    "gaussian_filter takes plain operations of PyTorch, which are several times "
                    f"slower than the engine's kernels: {error}",
                    _TOLD,
                )
        if self._engine is None:
            self._in_operations = tensor_kernel(features.T, self._method)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter (V, N) values."""
        if self._engine is None:
            return self._in_operations(values.T).T
        return _Filter.apply(values, self._features, self)  # type: ignore[no-untyped-call]

    def normalized(self, values: Tensor, normalization: str) -> Tensor:
        """Filter (V, N) values, and divide by sums of weights as "none", "after" or "symmetric"."""
        if normalization == "none":
            return self(values)
        sums = self._sums
        if normalization == "after" and sums is None:
            # One filtering of one more channel takes less time than two.
            ones = values.new_ones(1, values.shape[1])
            filtered = self(torch.cat([values, ones]))
            return filtered[:-1] / filtered[-1:].clamp(min=TINY)
        if sums is None:
            sums = self._find_sums()
        if normalization == "after":
            return self(values) / sums
        scale = sums.rsqrt()
        return self(values * scale) * scale

    def keep_sums(self) -> None:
        """Find the sums of weights once for all further calls, without a gradient."""
        if self._sums is None:
            self._sums = self._find_sums()

    def _find_sums(self) -> Tensor:
        """Return the sum of each point's weights, (1, N), as a divisor."""
        ones = self._features.new_ones(1, self._features.shape[1])
        return self(ones).clamp(min=TINY)

    def with_graph_of(self, features: Tensor) -> PointFilter:
        """Return the same kernel, whose gradients go to other features (D, N).

        Their finite values do not matter: they may have changed since the kernel was built.
        """
        same = copy(self)
        same._features = self._features + (features - features.detach())
        same._sums = None
        if self._engine is None:
            same._in_operations = tensor_kernel(same._features.T, self._method)
        return same

    @property
    def description(self) -> str:
        """The algorithm and its size, in a line."""
        if self._engine is None:
            return f"{self._method}, in operations of PyTorch on {self._features.device}"
        return self.built(self._features).description

    def built(self, features: Tensor | None) -> CompiledPoints | CudaPoints:
        """Return the engine's kernel; only the first call needs the (D, N) features."""
        if self._kernel is None:
            assert features is not None
            points = to_array(features).reshape(-1, *self._grid)
            if self._engine.name == "cpu":
                threads = self._threads or torch.get_num_threads()
                self._kernel = CompiledPoints(points, self._method, threads)
            else:
                self._kernel = self._engine.points(points, self._method)
        return self._kernel


class _Filter(torch.autograd.Function):
    """An engine's filter, without normalization."""

    @staticmethod
    def forward(values: Tensor, features: Tensor, kernel: PointFilter) -> Tensor:
        """Filter (V, N) values with (D, N) features."""
        return to_own_tensor(kernel.built(features).apply(to_array(values)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the kernel, and if the features need a gradient, values and features.

        PyTorch then refuses the backward pass if these have changed since.
        """
        values, features, ctx.kernel = inputs
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, features)
        else:
            ctx.save_for_backward(None, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to values and features."""
        arguments = (grad, *ctx.saved_tensors, ctx.kernel, ctx.needs_input_grad[0])
        grads = _Gradients.apply(*arguments)  # type: ignore[no-untyped-call]
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
        kernel: PointFilter,
        wants_values: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients; that of the features is wanted if the values were saved."""
        built = kernel.built(features)
        by_output = to_array(grad)
        by_values = None
        by_features = None
        if wants_values:
            by_values = to_own_tensor(built.apply(by_output, transposed=True))
        if values is not None:
            by_features = to_own_tensor(built.feature_gradient(by_output, to_array(values)))
        return by_values, by_features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save nothing: there are no second derivatives."""

    vmap = _Filter.vmap

    @staticmethod
    def backward(*_: Any) -> None:
        """Refuse: engines have no second derivatives."""
        raise InputError(
            "gaussian_filter has no second derivatives in float32; float64 has those with respect "
            "to the values"
        )
