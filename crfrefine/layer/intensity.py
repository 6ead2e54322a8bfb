"""Intensities of tensors on the scale of theta_beta, with gradients where they are wanted.

The rules are those of arrays/intensity.py, which also computes where tensors are like its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.intensity import (
    CONSTANT,
    has_many_digits,
    large_offset,
    normalize_intensity,
    percentile_ranks,
    rules_of,
)
from crfrefine.base.array_types import Range
from crfrefine.layer.autograd import to_array
from crfrefine.layer.inputs import Mask, masks_by_item, stack_items
from crfrefine.parameters.sections import IntensityParameters


def normalize_batch(
    image: Tensor,
    parameters: IntensityParameters,
    mask: Mask,
    dtype: torch.dtype,
    *,
    threads: int | None = None,
) -> Tensor:
    """Map the intensities of a batch (B, M, *grid) to the scale that theta_beta is measured in.

    The image must be finite. The statistics of each item are taken inside the mask, and have
    gradients, too. Where no gradient is needed, float32 on the CPU is normalized by the code of
    `crfrefine.refine`.
    """
    masks = masks_by_item(mask, len(image), image.shape[2:])
    rules = rules_of(parameters, image.shape[1])
    has_gradient = image.requires_grad and torch.is_grad_enabled()
    is_as_arrays = not has_gradient and dtype == torch.float32 and image.device.type == "cpu"
    may_lose_digits = dtype == torch.float32 and has_many_digits(image.dtype)
    if all(kind == "none" for kind, _ in rules) and not may_lose_digits:
        return image.to(dtype)

    items = []
    for item, inside in zip(image, masks, strict=True):
        if not is_as_arrays:
            items.append(_normalize(item, rules, inside, dtype, may_lose_digits))
            continue
        values = item.detach()
        if values.dtype in (torch.float16, torch.bfloat16, torch.bool):
            values = values.float()
        array_mask = None if inside is None else inside.numpy()
        normalized = normalize_intensity(
            values.resolve_neg().numpy(),
            parameters,
            array_mask,
            threads=threads or torch.get_num_threads(),
        )
        items.append(torch.from_numpy(normalized))
    return stack_items(items)


def _normalize(
    image: Tensor,
    rules: Sequence[tuple[str, Range]],
    mask: Tensor | None,
    dtype: torch.dtype,
    may_lose_digits: bool,
) -> Tensor:
    """Normalize an image (M, *grid) in operations of PyTorch; percentiles wait for a GPU."""
    work = image.to(torch.float64 if may_lose_digits else dtype)
    channels = []
    for channel, (kind, numbers) in zip(work, rules, strict=True):
        if kind == "window":
            low, high = numbers
            channels.append(((channel - low) / (high - low)).clamp(0.0, 1.0))
            continue
        if kind == "none" and not may_lose_digits:
            channels.append(channel)
            continue

        inside = channel.flatten() if mask is None else channel[mask]
        if kind == "none":
            values = inside.detach().resolve_neg().cpu().numpy()
            channels.append(channel - large_offset(values))
            continue
        if kind == "zscore":
            variance, shift = torch.var_mean(inside, correction=0)
            is_constant = variance.detach() <= CONSTANT**2
            # The gradient of the root at 0 would be infinity, and infinity times 0 is NaN.
            width = torch.where(is_constant, 1.0, variance).sqrt()
        else:
            shift, end = _percentiles(inside, numbers)
            width = end - shift
            is_constant = width.detach() <= CONSTANT
            width = torch.where(is_constant, 1.0, width)
        channels.append(torch.where(is_constant, 0.0, (channel - shift) / width))
    return torch.stack(channels).to(dtype)


def _percentiles(values: Tensor, percentiles: Range) -> list[Tensor]:
    """Return two percentiles by the rules of `percentile_ranks`.

    Each comes from two values in sorted order, and the gradient goes to a voxel of either.
    """
    present = to_array(values)
    if isinstance(present, np.ndarray):  # On a CPU, PyTorch's sort takes 30 times as long.
        ordered = np.sort(present)
    else:
        ordered = present.sort().values

    def at(rank: int) -> Tensor:
        return values[(values.detach() == float(ordered[rank])).int().argmax()]

    ends = []
    for below, above, share in percentile_ranks(ordered, percentiles):
        start = at(below)
        ends.append(start + (at(above) - start) * share)
    return ends
