"""The mean field of one batch item as a node of the autograd graph.

`torch.compile` leaves it out of its graphs, and exporters are refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crfrefine.base.array_types import Array
from crfrefine.errors import ExportError

if TYPE_CHECKING:
    from crfrefine.engines.base import Kernels
    from crfrefine.parameters.specs import MeanFieldSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NOTHING: Array = np.empty(0)

_THETAS = ("theta_position", "theta_intensity", "theta_gamma")
# The tensors that have a gradient, in their order; `MeanFieldGradients` has their shapes.
GRADIENTS = (
    "logits",
    "image",
    "weights",
    *_THETAS,
    "compatibility",
    "temperature",
    "bias",
    "volume_weight",
)


class MeanField(torch.autograd.Function):
    """Runs an engine's kernels forward and backward, on tensors of their precision."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, spec: MeanFieldSpec, *tensors: Tensor | None) -> Tensor:
        """Take all steps.

        The tensors are those of GRADIENTS, in that order; from `weights` on they may be on the CPU.
        """
        logits, image, weights, _, _, _, compatibility, temperature, bias, _ = tensors
        assert logits is not None
        tape = kernels.forward(to_array(logits), spec)
        ctx.kernels = kernels
        ctx.kinds = {}  # A gradient has the type and the device of its tensor.
        for name, tensor in zip(GRADIENTS, tensors, strict=True):
            if tensor is not None:
                ctx.kinds[name] = (tensor.dtype, tensor.device)
        # PyTorch frees saved tensors after the backward pass, and refuses that pass if one was
        # changed in place. Image and parameters are saved only for this check.
        record = to_tensor(tape.record)
        ctx.save_for_backward(logits, record, weights, compatibility, temperature, bias, image)
        ctx.tape = dataclasses.replace(tape, logits=_NOTHING, record=_NOTHING)
        refined: Tensor = _in_pytorchs_memory(to_tensor(tape.logits)).to(logits.device)
        return refined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the arguments, in their order."""
        logits, record, *_ = ctx.saved_tensors
        wants = dict(zip(GRADIENTS, ctx.needs_input_grad[2:], strict=True))
        gradients = ctx.kernels.backward(
            dataclasses.replace(ctx.tape, record=to_array(record)),
            to_array(logits),
            to_array(grad),
            wants_theta=any(wants[name] for name in _THETAS),
            wants_image=wants["image"],
        )
        tensors: list[Tensor | None] = []
        for name in GRADIENTS:
            tensor = None
            if wants[name] and name in ctx.kinds:
                dtype, device = ctx.kinds[name]
                gradient = _in_pytorchs_memory(to_tensor(getattr(gradients, name)))
                tensor = torch.as_tensor(gradient, dtype=dtype, device=device)
            tensors.append(tensor)
        return None, None, *tensors


def to_array(tensor: Tensor) -> Any:
    """Return a tensor as engines take it, in C order: on the CPU a numpy array, on a GPU a tensor.

    The values are copied only if their order differs.
    """
    values = tensor.detach().contiguous()
    if values.device.type == "cpu":
        return values.numpy()
    return values


def to_tensor(array: Any) -> Any:
    """Return an engine's result as a tensor, on a GPU by DLPack; numbers stay numbers."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    return array


def _in_pytorchs_memory(value: Any) -> Any:
    """Copy a GPU tensor that an engine shares into PyTorch's own memory; return others as they are.

    PyTorch knows which streams still read such a tensor, but not which read a shared one.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.clone()
    return value


# PyTorch has `is_exporting` since 2.7; the exporters of older versions raise other errors.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `torch.compile` call a function unchanged, between graphs; refuse exporters."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        exporter = _exporter()
        if exporter is not None:
            raise cannot_export(exporter)
        if torch.compiler.is_compiling():
            # This is not a decorator, which would import the compiler at once. That takes longer
            # than importing PyTorch itself.
            result: _R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


def _exporter() -> str | None:
    """Return the exporter that is making a graph of this call, if any."""
    is_exporting = _is_exporting()
    is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not is_exporting and not is_tracing:
        return None
    if torch.onnx.is_in_onnx_export():
        return "torch.onnx.export"
    return "torch.export.export" if is_exporting else "torch.jit.trace"


def cannot_export(exporter: str) -> ExportError:
    """Return the error for an exporter, which needs the whole computation as one graph."""
    return ExportError(
        f"{exporter} cannot take the CRF (crfrefine.CrfRnn, crfrefine.crf_loss): it is computed "
        "outside of PyTorch, so no graph can contain it; export the network without it, and refine "
        "the network's logits afterwards, with the layer or with crfrefine.refine (to keep what "
        "the layer learned: state_dict() or to_parameters().save(path))"
    )
