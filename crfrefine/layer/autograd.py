"""The mean field of one batch item as a node of the autograd graph, and its place beside the graphs of `torch.compile` and exporters."""

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
    """Runs an engine's kernels forward and backward; its tensors have the precision of the kernels."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, spec: MeanFieldSpec, *given: Tensor | None) -> Tensor:
        """Take all steps; `given` are the tensors of GRADIENTS, of which those from `weights` on may be on the CPU."""
        logits, image, weights, _, _, _, compatibility, temperature, bias, _ = given
        assert logits is not None
        tape = kernels.forward(to_array(logits), spec)
        ctx.kernels = kernels
        ctx.kinds = [None if tensor is None else (tensor.dtype, tensor.device) for tensor in given]
        # PyTorch frees saved tensors after the backward pass and detects changes in place, of the image and the parameters, too.
        ctx.save_for_backward(
            logits, to_tensor(tape.record), weights, compatibility, temperature, bias, image
        )
        ctx.tape = dataclasses.replace(tape, logits=_NOTHING, record=_NOTHING)
        refined: Tensor = _own(to_tensor(tape.logits)).to(logits.device)
        return refined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the arguments, in their order."""
        logits, record, *_ = ctx.saved_tensors
        wants = dict(zip(GRADIENTS, ctx.needs_input_grad[2:], strict=True))
        tape = dataclasses.replace(ctx.tape, record=to_array(record))
        wanted = {
            "wants_theta": any(wants[name] for name in _THETAS),
            "wants_image": wants["image"],
        }
        grads = ctx.kernels.backward(tape, to_array(logits), to_array(grad), **wanted)
        tensors = (
            torch.as_tensor(_own(to_tensor(getattr(grads, name))), dtype=kind[0], device=kind[1])
            if wanted and kind is not None
            else None
            for (name, wanted), kind in zip(wants.items(), ctx.kinds, strict=True)
        )
        return None, None, *tensors


def to_array(tensor: Tensor) -> Any:
    """Return the input of an engine: a numpy array in C order, or on a GPU the tensor itself; copied only if the order differs."""
    values = tensor.detach().contiguous()
    return values.numpy() if values.device.type == "cpu" else values


def to_tensor(array: Any) -> Any:
    """Return an engine's result as a tensor, from a numpy array or, on a GPU, by DLPack; numbers stay numbers."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array) if hasattr(array, "__dlpack__") else array


def _own(value: Any) -> Any:
    """Return a copy in PyTorch's own memory of a shared GPU array: only there PyTorch tracks the other streams that still read it."""
    return value.clone() if isinstance(value, Tensor) and value.device.type != "cpu" else value


# PyTorch has this since 2.7; older exporters raise their errors.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `torch.compile` call a function unchanged, between the graphs before and after it; refuse exporters."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            exporter = "torch.export.export" if _is_exporting() else "torch.jit.trace"
            raise cannot_export("torch.onnx.export" if torch.onnx.is_in_onnx_export() else exporter)
        if torch.compiler.is_compiling():
            # Not a decorator: that would import the compiler, which takes longer than importing PyTorch itself.
            result: _R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


def cannot_export(exporter: str) -> ExportError:
    """Return the error for an exporter such as "torch.export.export", which needs the whole computation as one graph."""
    return ExportError(
        f"{exporter} cannot take the CRF (crfrefine.CrfRnn, crfrefine.crf_loss): it is computed outside of PyTorch, so no graph can "
        "contain it; export the network without it, and refine the network's logits afterwards, with the layer or with crfrefine.refine "
        "(to keep what the layer learned: state_dict() or to_parameters().save(path))"
    )
