"""Intensity normalization of the layer's image: `features.normalize_intensity` for tensors, differentiable in the image.

Percentiles, mean and deviation are functions of the image too, and take part in its gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.parameters.model import IntensityParameters, intensity_by_modality

_CONSTANT = float(torch.finfo(torch.float32).tiny)


def normalize(
    image: Tensor, parameters: IntensityParameters, mask: Tensor | None, dtype: torch.dtype, *, threads: int | None = None
) -> Tensor:
    """Map each modality's intensities to the scale that theta_beta is measured in.

    Where no gradient is asked for, this is the very function that `crfrefine.refine` uses.

    Args:
        image: (M, *grid) raw intensities, finite.
        parameters: one normalization for all modalities, or one each.
        mask: (*grid) bool; statistics are taken where it is True, the map is applied everywhere. None: everywhere.
        dtype: float32 or float64, type of the result.
        threads: at most so many modalities at a time.

    Returns:
        (M, *grid) normalized intensities.

    Raises:
        ConfigError: a list in `parameters` does not have one entry a modality.
    """
    plans = intensity_by_modality(parameters, image.shape[0])
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
    """Mean and (population) standard deviation; that of a constant is 0 and has no derivative."""
    variance, mean = torch.var_mean(values, correction=0)
    return mean, variance.sqrt() if float(variance.detach()) > 0.0 else torch.zeros_like(variance)


def _percentile_range(values: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The lower percentile, and the distance to the upper one; from the smallest to the largest value where both are equal."""
    low, high = (_percentile(values, percent / 100.0) for percent in percentiles)
    if float(high.detach()) <= float(low.detach()):
        low, high = values.amin(), values.amax()
    return low, high - low


def _percentile(values: Tensor, fraction: float) -> Tensor:
    """The percentile, interpolated between order statistics; its gradient goes to the voxels that hold these."""
    position = (values.numel() - 1) * fraction
    first = math.floor(position)
    last = min(first + 1, values.numel() - 1)
    start, end = (torch.kthvalue(values, rank + 1).values for rank in (first, last))
    return start + (end - start) * (position - first)
