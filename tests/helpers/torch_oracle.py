"""The mean field unrolled in plain torch over dense kernel matrices: the tests' reference for the layer's values and gradients.

Everything is differentiable by autograd, normalization, image and bandwidths included. It shares no code with the engines. O(N^2) memory
per kernel: for small grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRUNCATION_RADIUS = 3.0
ENERGY_RISE = 1e-6


@dataclass(frozen=True)
class Terms:
    """What the model has besides logits and image; numbers or tensors that broadcast to labels, axes and modalities."""

    bilateral: Sequence[tuple[Any, Any, Any]]  # weight, theta_alpha, theta_beta
    spatial: tuple[Any, Any] | None = None  # weight, theta_gamma
    compatibility: Tensor | None = None
    temperature: Any = 1.0
    bias: Any = None


def dense_kernel(positions: Tensor, intensities: Tensor | None, theta_alpha: Any, theta_beta: Any, radius: float = math.inf) -> Tensor:
    """K (N, N) of N voxels with positions (N, axes) in mm and intensities (N, M); pairs beyond `radius` theta_alpha are left out."""
    offsets = positions[:, None, :] - positions[None, :, :]
    distance = torch.square(offsets / theta_alpha).sum(-1)
    exponent = distance
    if intensities is not None:
        differences = intensities[:, None, :] - intensities[None, :, :]
        exponent = exponent + torch.square(differences / theta_beta).sum(-1)
    return torch.where(distance <= radius**2 * (1.0 + 1e-6), torch.exp(-0.5 * exponent), torch.zeros_like(exponent))


def normalized(kernel: Tensor, normalization: str) -> Tensor:
    """The kernel with its normalization, which contributes to the gradient."""
    row_sum = kernel.sum(1)
    if normalization == "symmetric":
        return kernel / torch.sqrt(row_sum[:, None] * row_sum[None, :])
    return kernel / row_sum[:, None] if normalization == "after" else kernel


def mean_field(
    logits: Tensor,
    image: Tensor,
    terms: Terms,
    *,
    spacing: Sequence[float],
    mask: Tensor | None = None,
    num_iterations: int = 5,
    damping: float = 0.0,
    normalization: str = "symmetric",
    filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
) -> Tensor:
    """Refined logits (L, *grid) of logits (L, *grid) and a normalized image (M, *grid); always all the steps."""
    num_labels = logits.shape[0]
    inside = torch.ones(logits.shape[1:], dtype=torch.bool) if mask is None else mask
    positions = inside.nonzero().to(logits.dtype) * torch.tensor(spacing, dtype=logits.dtype)
    radius = TRUNCATION_RADIUS if filter == "truncated" else math.inf
    pairs = [
        (weight, normalized(dense_kernel(positions, image[:, inside].T, alpha, beta, radius), normalization))
        for weight, alpha, beta in terms.bilateral
    ]
    if terms.spatial is not None:
        weight, gamma = terms.spatial
        pairs.append((weight, normalized(dense_kernel(positions, None, gamma, None), normalization)))
    penalty = 1.0 - torch.eye(num_labels, dtype=logits.dtype) if terms.compatibility is None else terms.compatibility

    everywhere = logits / terms.temperature
    bias = torch.zeros(num_labels, dtype=logits.dtype) if terms.bias is None else terms.bias
    scores = ((logits + bias.reshape(-1, *(1,) * (logits.ndim - 1))) / terms.temperature)[:, inside].T  # (N, L)
    x = scores
    step = 1.0 - damping
    energy = size = math.nan
    for _ in range(num_iterations):
        log_marginals = torch.log_softmax(x, dim=1)
        marginals = log_marginals.exp()
        pairwise = torch.zeros_like(scores)
        for weight, matrix in pairs:
            pairwise = pairwise + ((matrix @ marginals) * weight) @ penalty
        with torch.no_grad():  # The length of the steps is a choice of the algorithm and has no gradient.
            shifted = scores - scores.amax(1, keepdim=True)
            before, energy = energy, float((marginals * (log_marginals - scores + 0.5 * pairwise)).sum())
            size = sum(abs(float((marginals * part).sum())) for part in (log_marginals, shifted, 0.5 * pairwise))
        x = (1.0 - step) * x + step * (scores - pairwise)
        if normalization != "after" and energy > before + ENERGY_RISE * size:
            step *= 0.5
    result = everywhere.clone()
    result[:, inside] = x.T
    return result
