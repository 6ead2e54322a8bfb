"""The mean field of one batch item as a node of the autograd graph: the bridge between tensors and the engine's arrays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from crfrefine.engines.base import RecordingKernels
    from crfrefine.parameters.specs import MeanFieldSpec

_NOTHING: NDArray[Any] = np.empty(0)


class MeanField(torch.autograd.Function):
    """Runs an engine's kernels forward and backward; its tensors have the precision of the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: RecordingKernels,
        spec: MeanFieldSpec,
        logits: Tensor,
        image: Tensor,
        weights: Tensor,
        theta_alpha: Tensor,
        theta_beta: Tensor,
        theta_gamma: Tensor | None,
        compatibility: Tensor,
        temperature: Tensor,
        bias: Tensor,
        volume_weight: Tensor | None,
    ) -> Tensor:
        """Take all steps; save the marginals at the start of each step for `backward`.

        Args:
            ctx: autograd's context.
            kernels: for this item's image and mask, and for these bandwidths.
            spec: the run, with the values of the tensors `weights`, `compatibility`, `temperature`, `bias` and `volume_weight`.
            logits: (L, *grid).
            image: (M, *grid) normalized.
            weights: (kernels, L), the spatial one last; this and what follows may be on the CPU although logits and image are on a GPU.
            theta_alpha: (bilateral kernels, axes).
            theta_beta: (bilateral kernels, M).
            theta_gamma: (axes,); None without a spatial kernel.
            compatibility: (L, L).
            temperature: one number.
            bias: (L,).
            volume_weight: one number; None without a volume term.
        """
        tape = kernels.forward(to_array(logits), spec)
        ctx.kernels, ctx.spec = kernels, spec
        given = (logits, image, weights, theta_alpha, theta_beta, theta_gamma, compatibility, temperature, bias, volume_weight)
        ctx.kinds = [None if tensor is None else (tensor.dtype, tensor.device) for tensor in given]
        # Arrays are saved as tensors: they are freed after the backward pass, hooks may move them elsewhere, and changes in place are
        # detected. This includes the image, whose memory the kernels read again, and the parameters, whose values the spec holds.
        ctx.save_for_backward(logits, weights, compatibility, temperature, bias, to_tensor(tape.record), image)
        ctx.tape = dataclasses.replace(tape, logits=_NOTHING, record=_NOTHING)
        refined: Tensor = _own(to_tensor(tape.logits))
        return refined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the arguments, in their order."""
        logits, _, _, _, _, record, _ = ctx.saved_tensors
        wants = ctx.needs_input_grad[2:]
        _, wants_image, _, wants_alpha, wants_beta, wants_gamma, *_ = wants
        grads = ctx.kernels.backward(
            dataclasses.replace(ctx.tape, record=to_array(record)),
            to_array(logits),
            to_array(grad),
            ctx.spec,
            wants_theta=wants_alpha or wants_beta or wants_gamma,
            wants_image=wants_image,
        )
        found = (
            grads.logits,
            grads.image,
            grads.weights,
            grads.theta_alpha,
            grads.theta_beta,
            grads.theta_gamma,
            grads.compatibility,
            grads.temperature,
            grads.bias,
            grads.volume_weight,
        )
        tensors = (
            torch.as_tensor(_own(to_tensor(value)), dtype=kind[0], device=kind[1]) if wanted and kind is not None else None
            for value, kind, wanted in zip(found, ctx.kinds, wants, strict=True)
        )
        return None, None, *tensors


def to_array(tensor: Tensor) -> Any:
    """Return what an engine takes: a numpy array in C order, or on a GPU the tensor itself; copied only if the order differs."""
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
