"""Labels that are present near a place take part there, the others do not: for tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage
from crfrefine.layer.autograd import to_array
from crfrefine.refinement.tiles.grid import MAX_DIMS
from crfrefine.refinement.tiles.packed_kernels import PackedKernels, PackSettings, pack_kernels, saves_work

if TYPE_CHECKING:
    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.parameters.specs import ModelSpec

__all__ = ["PackSettings", "are_possible", "differs", "pack_item", "saves_work"]


def are_possible(logits: Tensor) -> bool:
    """Return whether labels of (B, L, *grid) logits may share channels: on the CPU, in float32, with up to three axes."""
    return logits.device.type == "cpu" and logits.dtype != torch.float64 and logits.ndim - 2 <= MAX_DIMS


def differs(weight: Any) -> bool:
    """Return whether a weight's gradient is one number per label."""
    return isinstance(weight, Tensor) and weight.requires_grad and weight.numel() > 1


def pack_item(
    logits: Tensor, spec: ModelSpec, settings: PackSettings, index: int, image: Float32, mask: Bool | None, spacing: Sequence[float]
) -> PackedKernels | None:
    """Return the kernels of a batch item for its logits in (B, L, *grid); None if it has no use for label sets."""
    values = to_array(logits[index].detach().float())
    return pack_kernels(get_backend("cpu"), values, GridImage(image, mask, spacing), spec, settings)
