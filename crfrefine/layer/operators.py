"""The layer and the loss as operators of PyTorch: `torch.compile` puts them into its graphs and does not look inside.

A graph's tensors cannot hold an engine's kernels. They wait beside it for the backward pass, behind a token: a tensor of one number, with
whose memory they are dropped.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.base import notices
from crfrefine.errors import InputError
from crfrefine.layer import graphs, inputs, raw
from crfrefine.parameters.model import CrfParameters

_NUM_TENSORS = 11
"""Tensors of `_refine` that may want a gradient: logits, image, and the values of `raw.Terms`; its first arguments."""


@torch.library.custom_op("crfrefine::refine", mutates_args=(), **graphs.OPTIONS)
def refine(
    logits: Tensor,
    image: Tensor,
    bilateral_weight: Tensor,
    theta_position: Tensor,
    theta_intensity: Tensor,
    spatial_weight: Tensor | None,
    theta_gamma: Tensor | None,
    compatibility: Tensor,
    temperature: Tensor,
    bias: Tensor,
    volume_weight: Tensor | None,
    spacing: Tensor | None,
    mask: Tensor | None,
    wants: Sequence[bool],
    settings: str,
    num_iterations: int,
    threads: int,
    label_threshold: float,
) -> tuple[Tensor, Tensor]:
    """Return refined logits in their precision, float32 or float64, and the token of the data for the backward pass.

    Logits, image and the values of `raw.Terms` say in `wants` whether they need a gradient; `settings` are the layer's parameters as TOML.
    Without a spacing it is 1 mm, with a warning; with 0 threads, there are as many as `torch.get_num_threads()`.
    """
    kernels = (bilateral_weight, theta_position, theta_intensity, spatial_weight, theta_gamma)
    given = (logits, image, *kernels, compatibility, temperature, bias, volume_weight)
    leaves = [None if tensor is None else tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(given, wants, strict=True)]
    run = raw.Run(_parameters(settings), num_iterations, threads or torch.get_num_threads(), label_threshold)
    warnings: list[str] = []
    inputs.warn_of_probabilities(logits, _told(settings), warnings.append)

    def known_spacing() -> Tensor | float:
        matters = run.parameters.mean_field.positions != "voxels"
        return notices.known_spacing(spacing, matters=matters, told=_told(settings), tell=warnings.append)

    def compute() -> Tensor:
        terms = raw.Terms(*leaves[2:])  # type: ignore[arg-type]
        return raw.refine(leaves[0], leaves[1], known_spacing, mask, terms, run, warnings.append)  # type: ignore[arg-type]

    refined = _recorded(compute, logits.device) if any(wants) else compute()
    for text in warnings:
        notices.warn(text)
    token = _keep((refined, [leaf for leaf, wanted in zip(leaves, wants, strict=True) if wanted and leaf is not None]))
    return refined.detach().contiguous(), token


@refine.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("crfrefine::refine_backward", mutates_args=(), **graphs.OPTIONS)
def _refine_backward(token: Tensor, grad: Tensor, logits: Tensor, image: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the tensors that want one; logits and image are here because the kernels read their memory again."""
    refined, leaves = _kept(token)
    return [found.contiguous() for found in torch.autograd.grad(refined, leaves, grad, retain_graph=True, materialize_grads=True)]


@_refine_backward.register_fake
def _(token: Tensor, grad: Tensor, logits: Tensor, image: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, wants = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS + 2]
    ctx.wants, ctx.num_inputs = wants, len(inputs)
    ctx.save_for_backward(output[1], *tensors[:2], *(tensor for tensor, wanted in zip(tensors, wants, strict=True) if wanted))


def _pass_back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    token, logits, image, *wanted = ctx.saved_tensors
    found = iter(_refine_backward(token, grad, logits, image, wanted))
    grads = [next(found) if is_wanted else None for is_wanted in ctx.wants]
    return (*grads, *[None] * (ctx.num_inputs - len(grads)))


refine.register_autograd(_pass_back, setup_context=_save)


_KEPT: dict[int, Any] = {}
"""What waits for a backward pass, by the address of its token."""


def _keep(value: Any) -> Tensor:
    """Return a token for a value; the value is dropped when the token's memory is, wherever the tensor went."""
    owner = np.zeros(1, dtype=np.int64)
    token = torch.from_numpy(owner)
    _KEPT[token.data_ptr()] = value
    weakref.finalize(owner, _KEPT.pop, token.data_ptr(), None).atexit = False
    return token


def _kept(token: Tensor) -> Any:
    try:
        return _KEPT[token.data_ptr()]
    except KeyError:
        raise InputError(
            "the CRF's kernels of the forward pass are gone: a compiled graph must hand its tensors to the backward pass as they are, "
            "without hooks that copy them (torch.autograd.graph.save_on_cpu)"
        ) from None


@functools.lru_cache(maxsize=32)
def _told(settings: str) -> set[str]:
    """Return the warnings issued for layers with these settings: an operator does not know which layer calls it."""
    return set()


@functools.lru_cache(maxsize=32)
def _parameters(settings: str) -> CrfParameters:
    return CrfParameters.from_toml(settings)


def _recorded(compute: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Call a function such that autograd records it: not in this thread, whose recording PyTorch has switched off inside an operator."""
    found: list[Tensor] = []
    errors: list[BaseException] = []
    stream = torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()

    def call() -> None:
        try:
            with stream:
                found.append(compute())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="crfrefine-recording")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
