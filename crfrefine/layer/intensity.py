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
    LARGE_OFFSET,
    OFFSET_SAMPLE,
    has_many_digits,
    normalize_intensity,
    percentile_ranks,
    rules_of,
)
from crfrefine.layer.inputs import Mask, check_finite, masks_by_item, stack_items
from crfrefine.parameters.sections import IntensityParameters


def normalize_batch(
    image: Tensor,
    parameters: IntensityParameters,
    mask: Mask | None,
    dtype: torch.dtype,
    *,
    threads: int | None = None,
    is_checked: bool = False,
) -> Tensor:
    """Map the intensities of a batch (B, M, *grid) to the scale that theta_beta is measured in.

    The statistics of each item are taken inside the mask, and have gradients, too. Where no
    gradient is needed, float32 on the CPU is normalized by the code of `crfrefine.refine`. Raises
    InputError if the image contains NaN or infinity; with `is_checked` the caller looks for them.
    """
    if not is_checked:
        check_finite(image)
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
            items.append(_normalize(item, rules, inside, dtype))
            continue
        values = item.detach()
        if values.dtype in (torch.float16, torch.bfloat16, torch.bool):
            values = values.float()
        array_mask = None if inside is None else inside.numpy()
        normalized = normalize_intensity(
            values.resolve_neg().numpy(), parameters, array_mask, threads=threads
        )
        items.append(torch.from_numpy(normalized))
    return stack_items(items)


def _normalize(
    image: Tensor,
    rules: Sequence[tuple[str, tuple[float, float]]],
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Normalize an image (M, *grid) in operations of PyTorch, without waiting for numbers."""
    may_lose_digits = has_many_digits(image.dtype)
    work = image.to(torch.float64 if may_lose_digits else dtype)
    channels = []
    for channel, (kind, numbers) in zip(work, rules, strict=True):
        if kind == "window":
            low, high = numbers
            channels.append(((channel - low) / (high - low)).clamp(0.0, 1.0))
            continue
        if kind == "none" and (dtype == torch.float64 or not may_lose_digits):
            channels.append(channel)
            continue

        inside = channel.flatten() if mask is None else channel[mask]
        if kind == "none":
            channels.append(channel - _large_offset(inside.detach()))
            continue
        if kind == "zscore":
            variance, shift = torch.var_mean(inside, correction=0)
            is_constant = variance.detach() <= CONSTANT**2
            # The gradient of the root at 0 would be infinity, and infinity times 0 is NaN.
            width = torch.where(is_constant, 1.0, variance).sqrt()
        else:
            shift, end = _percentiles(inside, numbers)
            is_constant = (end - shift).detach() <= CONSTANT
            width = torch.where(is_constant, 1.0, end - shift)
        channels.append(torch.where(is_constant, 0.0, (channel - shift) / width))
    return torch.stack(channels).to(dtype)


def _large_offset(values: Tensor) -> Tensor:
    """Return the offset of `crfrefine.arrays.intensity.large_offset`, as a tensor."""
    sample = values[:: 1 + len(values) // OFFSET_SAMPLE].sort().values
    twentieth = len(sample) // 20
    spread = sample[len(sample) - 1 - twentieth] - sample[twentieth]
    spread = torch.where(spread == 0.0, sample[-1] - sample[0], spread)
    median = sample[len(sample) // 2]
    return torch.where(median.abs() > LARGE_OFFSET * spread, median, 0.0)


def _percentiles(values: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return two percentiles, or if they are equal, the smallest and the largest value.

    They are interpolated between two values in sorted order, whose voxels get the gradients.
    """
    ranks = percentile_ranks(len(values), percentiles)
    places = [place for below, above, _ in ranks for place in (below, above)]
    fixed = values.detach()
    if fixed.device.type == "cpu":  # A CPU partitions several times faster than it sorts.
        voxels = torch.from_numpy(np.argpartition(fixed.numpy(), places)[places])
    else:
        order = fixed.sort(stable=True).indices
        # A list of numbers would be copied to the GPU, for which the host waits.
        voxels = torch.stack([order[place] for place in places])

    starts = values[voxels[::2]]
    steps = values[voxels[1::2]] - starts
    low = starts[0] + steps[0] * ranks[0][2]
    high = starts[1] + steps[1] * ranks[1][2]
    is_equal = high.detach() <= low.detach()
    low = torch.where(is_equal, values.amin(), low)
    high = torch.where(is_equal, values.amax(), high)
    return low, high
