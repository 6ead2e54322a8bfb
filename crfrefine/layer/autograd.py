"""The mean field of a batch as a node of the autograd graph.

`torch.compile` leaves it out of its graphs, and exporters are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crfrefine.base.array_types import Array
from crfrefine.base.limits import run_all
from crfrefine.engines.base import Kernels, MeanFieldGradients
from crfrefine.errors import ExportError
from crfrefine.layer.crf_model import TENSORS
from crfrefine.parameters.specs import MeanFieldSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NOTHING: Array = np.empty(0)


class MeanField(torch.autograd.Function):
    """Runs engines' kernels of the items of a batch, on tensors of their precision.

    At most `num_at_once` items run side by side, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        items: Sequence[tuple[Kernels, MeanFieldSpec]],
        num_at_once: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take all steps of each item; return the refined logits of each.

        The tensors are those of the first item in the order of `MeanFieldGradients`, then those of
        the next item; from `weights` on they may be on the CPU, where a GPU's host has to wait for
        their gradients.
        """
        groups = _by_item(tensors)
        jobs = []
        for (kernels, spec), item in zip(items, groups, strict=True):
            jobs.append(functools.partial(kernels.forward, to_array(item["logits"]), spec))
        tapes = run_all(jobs, num_at_once)
        ctx.num_at_once = num_at_once
        ctx.items = items
        records = []
        refined = []
        for item, tape in zip(groups, tapes, strict=True):
            records.append(to_tensor(tape.record))
            refined.append(to_own_tensor(tape.logits).to(item["logits"].device))
        # PyTorch frees saved tensors after the backward pass, and refuses that pass if one was
        # changed in place. Of all but logits and records, only type and device are read.
        ctx.save_for_backward(*records, *tensors)
        ctx.tapes = [tape._replace(logits=_NOTHING, record=_NOTHING) for tape in tapes]
        return tuple(refined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the arguments, in their order."""
        records = ctx.saved_tensors[: len(grads)]
        tensors = ctx.saved_tensors[len(grads) :]
        needed = ctx.needs_input_grad[2:]
        by_item = (_by_item(tensors), _by_item(needed), grads)
        runs = zip(ctx.items, ctx.tapes, records, *by_item, strict=True)
        jobs = []
        for (kernels, _), tape, record, item, wants, grad in runs:
            # Gradients of parameters go to the device that these are on.
            are_on_cpu = item["weights"].device.type == "cpu"
            goes_to_cpu = are_on_cpu and any(wants[name] for name in TENSORS)
            job = functools.partial(
                kernels.backward,
                tape._replace(record=to_array(record)),
                to_array(item["logits"]),
                to_array(grad),
                wants_theta=wants["theta"],
                wants_image=wants["image"],
                stays=not goes_to_cpu,
            )
            jobs.append(job)
        values: list[Any] = []
        for gradients in run_all(jobs, ctx.num_at_once):
            values += gradients
        results: list[Tensor | None] = []
        for value, is_needed, tensor in zip(values, needed, tensors, strict=True):
            result = None
            if is_needed:  # A gradient has the type and the device of its tensor.
                result = torch.as_tensor(
                    to_own_tensor(value), dtype=tensor.dtype, device=tensor.device
                )
            results.append(result)
        return None, None, *results


def _by_item(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Divide the tensors of a batch, or one property of each, among its items, by their names."""
    names = MeanFieldGradients._fields
    size = len(names)
    items = []
    for start in range(0, len(values), size):
        items.append(dict(zip(names, values[start : start + size], strict=True)))
    return items


def to_array(tensor: Tensor) -> Any:
    """Return a tensor as engines take it, in C order: on the CPU a numpy array, on a GPU a tensor.

    The values are copied only if their order differs.
    """
    values = tensor.detach().resolve_neg().contiguous()
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


def to_own_tensor(array: Any) -> Any:
    """Return an engine's result as a tensor, on a GPU copied into PyTorch's own memory.

    PyTorch knows which streams still read a tensor, but not which read a shared one.
    """
    value = to_tensor(array)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.clone()
    return value


# PyTorch has `is_exporting` since 2.7; the exporters of older versions raise other errors.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `torch.compile` call a function unchanged, between graphs; refuse exporters."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        is_exporting = _is_exporting()
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if (is_exporting or is_tracing) and torch.onnx.is_in_onnx_export():
            raise cannot_export("torch.onnx.export")
        if is_exporting:
            raise cannot_export("torch.export.export")
        if is_tracing:
            raise cannot_export("torch.jit.trace")
        if torch.compiler.is_compiling():
            # This is not a decorator, which would import the compiler at once. That takes longer
            # than importing PyTorch itself.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def cannot_export(exporter: str) -> ExportError:
    """Return the error for an exporter, which needs the whole computation as one graph."""
    return ExportError(
        f"{exporter} cannot take the CRF (crfrefine.CrfRnn, crfrefine.crf_loss): it is computed "
        "outside of PyTorch, so no graph can contain it; export the network without it, and refine "
        "the network's logits afterwards, with the layer or with crfrefine.refine (to keep what "
        "the layer learned: state_dict() or to_parameters().save(path))"
    )
