"""Training on overlapping regions: one binary problem per region on the same kernels, with the trainable layer's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crfrefine.layer import functional
from crfrefine.layer.module import CrfRnn
from crfrefine.train.losses import Loss, make_loss

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.engines.base import RecordingKernels
    from crfrefine.parameters.sections import MeanFieldParameters


def refine_regions(
    layer: CrfRnn, settings: MeanFieldParameters, log_odds: Tensor, image: Tensor, threads: int, kernels: Sequence[RecordingKernels]
) -> Tensor:
    """Refine each region as a problem of two labels, differentiable in the layer's parameters.

    Args:
        layer: with one weight for all regions, or one per region, and a bias per region.
        settings: of the mean field, which are not learned.
        log_odds: (R, *grid).
        image: (1, M, *grid), normalized.
        threads: CPU threads.
        kernels: of the layer for this image, built for two labels.

    Returns:
        (R, *grid) refined log-odds.
    """
    weights, spatial_weight, gamma, biases = layer.bilateral_weight, layer.spatial_weight, layer.theta_gamma, layer.bias
    bandwidths = list(zip(layer.theta_alpha, layer.theta_beta, strict=True))
    refined = []
    for region, channel in enumerate(log_odds):

        def own(values: Tensor, region: int = region) -> Tensor:
            return values[region] if len(values) > 1 else values[0]

        binary = torch.stack([torch.zeros_like(channel), channel])[None]
        found = functional.mean_field(
            binary,
            image,
            bilateral=[(own(weight), alpha, beta) for weight, (alpha, beta) in zip(weights, bandwidths, strict=True)],
            spatial=None if spatial_weight is None or gamma is None else (own(spatial_weight), gamma),
            temperature=layer.temperature,
            bias=torch.stack([torch.zeros_like(biases[region]), biases[region]]),
            volume=layer.volume,
            num_iterations=layer.num_iterations,
            damping=settings.damping,
            threads=threads,
            kernels=kernels,
        )[0]
        refined.append(found[1] - found[0])
    return torch.stack(refined)


def decode_regions(log_odds: Tensor, scheme: RegionScheme) -> Tensor:
    """Return the labels (*grid) of log-odds (R, *grid), as `RegionScheme.decode`."""
    labels = torch.zeros(log_odds.shape[1:], dtype=torch.int64, device=log_odds.device)
    for channel, label in zip(log_odds, scheme.class_order, strict=True):
        labels[channel > 0] = label
    return labels


def make_region_loss(name: str, scheme: RegionScheme, frequencies: Sequence[float]) -> Loss:
    """Return the loss of a case: the mean over regions of the loss of each region's problem of two labels, outside and inside.

    Args:
        name: as in `make_loss`.
        scheme: the regions; the loss takes refined log-odds (R, N) and reference labels (N,).
        frequencies: share of each label among the voxels that are trained on, background first.
    """
    shares = [sum(frequencies[label] for label in labels) for labels in scheme.labels]
    losses = [make_loss(name, [(1,)], (1.0 - share, share)) for share in shares]

    def loss(log_odds: Tensor, labels: Tensor) -> Tensor:
        inside = partial(torch.isin, labels)
        values = [
            own(torch.stack([torch.zeros_like(channel), channel]), inside(torch.tensor(members, device=labels.device)).long())
            for own, channel, members in zip(losses, log_odds, scheme.labels, strict=True)
        ]
        return torch.stack(values).mean()

    return loss
