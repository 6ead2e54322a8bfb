"""The layer and PyTorch's graphs: `torch.compile` calls it between its graphs, and exporters are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from crfrefine.errors import ExportError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# PyTorch has this since 2.7; older exporters raise their errors.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)


def not_exported(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse exporters, which need the whole computation of a function as one graph that runs elsewhere."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise cannot_export(_exporter(), function.__name__)
        return function(*args, **kwargs)

    return call


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `torch.compile` call a function unchanged, between the graphs before and after it; refuse exporters."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            # Not a decorator: that would import the compiler, which takes longer than importing PyTorch itself.
            result: _R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return not_exported(call)


def cannot_export(exporter: str, function: str = "forward") -> ExportError:
    """Return the error for an exporter such as "torch.export.export", which needs the whole computation of a function as one graph."""
    if function.endswith("loss"):
        return ExportError(
            f"{exporter} cannot take crfrefine.crf_loss: it is computed outside of PyTorch, so no graph can contain it, and is needed in "
            "training only; export the network without the loss"
        )
    return ExportError(
        f"{exporter} cannot take crfrefine.CrfRnn: the CRF is computed outside of PyTorch, so no graph can contain it; export the network "
        "without this layer and refine its logits afterwards, with the layer or with crfrefine.refine (to keep what the layer learned: "
        "state_dict() or to_parameters().save(path))"
    )


def _exporter() -> str:
    if torch.onnx.is_in_onnx_export():
        return "torch.onnx.export"
    return "torch.export.export" if _is_exporting() else "torch.jit.trace"
