"""Intensities of tensors on the scale of theta_beta, with gradients where they are wanted.

The rules are those of arrays/intensity.py, which also computes where tensors are like its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crfrefine.arrays.intensity import (
    CONSTANT,
    FILL_SPREAD,
    LARGE_OFFSET,
    MIN_FILL,
    MIN_GAP,
    OFFSET_SAMPLE,
    has_many_digits,
    normalize_intensity,
    percentile_ranks,
    rules_of,
)
from crfrefine.base.array_types import Range
from crfrefine.layer.inputs import Mask, masks_by_item, stack_items
from crfrefine.parameters.sections import IntensityParameters


def normalize_batch(
    image: Tensor,
    parameters: IntensityParameters,
    mask: Mask | None,
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
            items.append(_normalize(item, rules, inside, dtype))
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


def _percentiles(values: Tensor, percentiles: Range) -> tuple[Tensor, Tensor]:
    """Return two percentiles, or if they are equal, the smallest and the largest value.

    They are interpolated between two values in sorted order, whose voxels get the gradients. A
    fill is left out.
    """
    ordered, order = values.detach().sort(stable=True)
    num_fill = _count_fill(ordered, percentiles)
    ends = []
    for below, above, share in _ranks(len(values) - num_fill, percentiles):
        start = values[order[num_fill + below]]
        step = values[order[num_fill + above]] - start
        ends.append(start + step * share.to(values.dtype))
    low, high = ends
    is_equal = high.detach() <= low.detach()
    lowest = values[order[num_fill]]
    highest = values[order[-1]]
    return torch.where(is_equal, lowest, low), torch.where(is_equal, highest, high)


def _ranks(count: Tensor, percentiles: Range) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what `percentile_ranks` does of a number of values that only the device knows."""
    ranks = []
    for percent in percentiles:
        place = (count - 1).to(torch.float64) * (percent / 100.0)
        below = place.floor().to(torch.int64)
        above = torch.minimum(below + 1, count - 1)
        ranks.append((below, above, place - below))
    return ranks


def _count_fill(ordered: Tensor, percentiles: Range) -> Tensor:
    """Return how many of sorted values are a fill, as of `find_fill`: 0 without a fill."""
    num_values = len(ordered)
    num_lowest = (ordered == ordered[0]).sum()
    (place, _, _), _ = percentile_ranks(num_values, percentiles)
    is_fill = (ordered[0] < 0) & (num_lowest > place) & (num_lowest < num_values)
    is_fill &= num_lowest >= MIN_FILL * num_values
    first_other = num_lowest.clamp(max=num_values - 1)
    (first, _, _), (last, _, _) = _ranks(num_values - first_other, FILL_SPREAD)
    spread = ordered[first_other + last] - ordered[first_other + first]
    is_fill &= (spread > 0) & (ordered[first_other] - ordered[0] > MIN_GAP * spread)
    return torch.where(is_fill, num_lowest, 0)
