"""The same model in plain PyTorch, for autograd: the appearance kernel as a dense matrix, the spatial one as a matrix an axis.

Written without any code of the package: a yardstick of the layer's speed, and the truth for its gradients. What is easy to save in time and
memory is saved: one product gives all exponents, and a normalization scales values, not the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPATIAL_RADIUS = 4.0  # in theta_gamma: from there on the spatial kernel of the engine, in float32, fades to zero within a voxel


def positions(grid_shape: Sequence[int], spacing: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(axes, N) in mm from the middle of the grid, voxels in C order: centered, so that products of features lose few digits."""
    axes = [(torch.arange(n, dtype=dtype) - (n - 1) / 2) * step for n, step in zip(grid_shape, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(len(axes), -1)


def _bilateral(features: Tensor) -> tuple[Tensor, Tensor]:
    """K (N, N) of (D, N) features divided by their bandwidths, and D^-1/2 (N)."""
    half = -0.5 * features.square().sum(0, keepdim=True)
    one = torch.ones_like(half)
    kernel = torch.exp(torch.cat([features, half, one]).T @ torch.cat([features, one, half]))
    return kernel, kernel.sum(1).rsqrt()


def _spatial(length: int, step: float, theta_gamma: Tensor) -> Tensor:
    """The normalized kernel of one axis: those of all axes multiply to the spatial kernel, as do their row sums on a full grid."""
    index = torch.arange(length, dtype=theta_gamma.dtype)
    distance = (index[:, None] - index[None, :]).abs()
    near = (SPATIAL_RADIUS * theta_gamma / step + 1.0 - distance).clamp(0.0, 1.0)
    kernel = torch.exp(-0.5 * (distance * step / theta_gamma).square()) * near.square() * (3.0 - 2.0 * near)
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale[None, :]


def mean_field(
    logits: Tensor,
    features: Tensor,
    *,
    spacing: Sequence[float],
    bilateral_weight: Tensor,
    spatial_weight: Tensor,
    theta_gamma: Tensor,
    num_iterations: int,
) -> Tensor:
    """Refined logits: Potts compatibility, symmetric normalization, no mask.

    Args:
        logits: (L, *grid).
        features: (D, N), positions and intensities divided by their bandwidths.
        spacing: mm, one per axis.
        bilateral_weight: one number, or (L, 1).
        spatial_weight: one number, or (L, 1).
        theta_gamma: mm, for all axes.
        num_iterations: steps.
    """
    grid_shape = logits.shape[1:]
    start = logits.flatten(1)
    kernel, scale = _bilateral(features)
    axes = [_spatial(length, step, theta_gamma) for length, step in zip(grid_shape, spacing, strict=True)]
    x = start
    for _ in range(num_iterations):
        marginals = torch.softmax(x, dim=0)
        appearance = ((marginals * scale) @ kernel) * scale
        smooth = marginals.reshape(logits.shape)
        for axis, matrix in enumerate(axes, start=1):
            smooth = torch.tensordot(smooth, matrix, dims=([axis], [0])).movedim(-1, axis)
        message = bilateral_weight * appearance + spatial_weight * smooth.flatten(1)
        x = start - (message.sum(dim=0, keepdim=True) - message)
    return x.reshape(logits.shape)
