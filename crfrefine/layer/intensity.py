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
    """Normalize each item of a batch (B, M, *grid) by itself, with statistics inside the mask.

    Raises:
        InputError: an image that is not finite, a mask that does not fit or is empty.
        ConfigError: as `normalize`.
    """
    for index, item in enumerate(image):
        inputs.check_finite(item, index)
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    items = [normalize(item, parameters, inside, dtype, threads=threads) for item, inside in zip(image, masks, strict=True)]
    return items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)


def normalize(
    image: Tensor, parameters: IntensityParameters, mask: Tensor | None, dtype: torch.dtype, *, threads: int | None = None
) -> Tensor:
    """Map the intensities (M, *grid) of each modality to the scale that theta_beta is measured in.

    Statistics are taken where the mask (*grid) is True, the map is applied everywhere. The result is of `dtype`, float32 or float64. If no
    gradient is needed, this is the same function that `crfrefine.refine` uses.

    Raises:
        ConfigError: a list in `parameters` does not have one entry per modality.
    """
    plans = parameters.by_modality(image.shape[0])
    if all(kind == "none" for kind, _, _ in plans):
        return image.to(dtype)
    follows = image.requires_grad and torch.is_grad_enabled()
    if not follows and dtype == torch.float32 and image.device.type == "cpu":
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
            shift, width = _mean_and_deviation(values) if kind == "zscore" else _percentile_range(values, percentiles)
            channels.append((channel - shift) / width if float(width.detach()) > _CONSTANT else torch.zeros_like(channel))
    return torch.stack(channels).to(dtype)


def _mean_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation; the deviation of a constant is 0 and has no gradient."""
    variance, mean = torch.var_mean(values, correction=0)
    return mean, variance.sqrt() if float(variance.detach()) > 0.0 else torch.zeros_like(variance)


def _percentile_range(values: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The lower percentile, and the distance to the upper one; from the smallest to the largest value where both are equal."""
    low, high = _percentiles(values, [percent / 100.0 for percent in percentiles])
    if float(high.detach()) <= float(low.detach()):
        low, high = values.amin(), values.amax()
    return low, high - low


def _percentiles(values: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    """The percentiles, interpolated between order statistics; their gradients go to the voxels with these statistics."""
    positions = [(values.numel() - 1) * fraction for fraction in fractions]
    first = [math.floor(position) for position in positions]
    ranks = [rank for start in first for rank in (start, min(start + 1, values.numel() - 1))]
    found = values[_holders(values.detach(), ranks)]
    starts, ends = found[::2], found[1::2]
    return [start + (end - start) * (position - rank) for start, end, position, rank in zip(starts, ends, positions, first, strict=True)]


def _holders(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the places of the values of these ranks, counted from the smallest; all are found at once.

    A GPU sorts with all its threads but selects from a long list with only a few; a CPU partitions several times faster than it
    sorts.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.argpartition(values.numpy(), ranks)[list(ranks)])
    return torch.sort(values, stable=True).indices[list(ranks)]
