"""Intensity normalization of the layer's image: `arrays.intensity.normalize_intensity` for tensors, differentiable in the image.

Percentiles, mean and deviation depend on the image too, and contribute to its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.layer import inputs
from crfrefine.parameters.sections import IntensityParameters

_CONSTANT = float(torch.finfo(torch.float32).tiny)


def normalize_batch(
    image: Tensor, parameters: IntensityParameters, mask: inputs.Mask | None, dtype: torch.dtype, *, threads: int | None = None
) -> Tensor:
    """Map the intensities of each item of a batch (B, M, *grid) to the scale that theta_beta is measured in.

    Statistics are taken for each item and modality inside the mask, the map is applied everywhere. The result is of `dtype`, float32 or
    float64. If no gradient is needed, this is the same function that `crfrefine.refine` uses.

    Raises:
        InputError: an image that is not finite, a mask that does not fit or is empty.
        ConfigError: a list in `parameters` does not have one entry per modality.
    """
    for index, item in enumerate(image):
        inputs.check_finite(item, index)
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    items = [_normalize(item, parameters, inside, dtype, threads) for item, inside in zip(image, masks, strict=True)]
    return items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)


def _normalize(image: Tensor, parameters: IntensityParameters, mask: Tensor | None, dtype: torch.dtype, threads: int | None) -> Tensor:
    plans = parameters.by_modality(image.shape[0])
    if all(kind == "none" for kind, _, _ in plans):
        return image.to(dtype)
    is_followed = image.requires_grad and torch.is_grad_enabled()
    if not is_followed and dtype == torch.float32 and image.device.type == "cpu":
        raw = image.detach()
        raw = raw if raw.dtype not in (torch.float16, torch.bfloat16, torch.bool) else raw.float()
        inside = None if mask is None else mask.numpy()
        return torch.from_numpy(normalize_intensity(raw.numpy(), parameters, inside, threads=threads))
    work = image.to(torch.promote_types(image.dtype, dtype))
    channels = []
    for channel, (kind, percentiles, window) in zip(work, plans, strict=True):
        if kind == "none":
            channels.append(channel)
        elif kind == "window" and window is not None:
            channels.append(((channel - window[0]) / (window[1] - window[0])).clamp(0.0, 1.0))
        else:
            values = channel.flatten() if mask is None else channel[mask]
            if kind == "zscore":  # The (population) deviation of a constant is 0 and has no gradient.
                variance, shift = torch.var_mean(values, correction=0)
                width = variance.sqrt() if float(variance.detach()) > 0.0 else torch.zeros_like(variance)
            else:
                shift, width = _percentile_range(values, percentiles)
            channels.append((channel - shift) / width if float(width.detach()) > _CONSTANT else torch.zeros_like(channel))
    return torch.stack(channels).to(dtype)


def _percentile_range(values: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The lower percentile, and the distance to the upper one; from the smallest to the largest value where both are equal.

    They are interpolated between order statistics, whose voxels get the gradients.
    """
    positions = [(values.numel() - 1) * (percent / 100.0) for percent in percentiles]
    first = [math.floor(position) for position in positions]
    ranks = [rank for start in first for rank in (start, min(start + 1, values.numel() - 1))]
    found = values[_holders(values.detach(), ranks)]
    pairs = zip(found[::2], found[1::2], positions, first, strict=True)
    low, high = (start + (end - start) * (position - rank) for start, end, position, rank in pairs)
    if float(high.detach()) <= float(low.detach()):
        low, high = values.amin(), values.amax()
    return low, high - low


def _holders(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the places of the values of these ranks, counted from the smallest; all are found at once.

    A GPU sorts with all its threads but selects from a long list with only a few; a CPU partitions several times faster than it sorts.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.argpartition(values.numpy(), ranks)[list(ranks)])
    return torch.sort(values, stable=True).indices[list(ranks)]
