"""Gaussian filters in plain tensor operations: a filter returns the product of an (N, N) kernel with (N, V) values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from crfrefine.errors import CapacityError

Filter = Callable[[Tensor], Tensor]

TRUNCATION_RADIUS = 3.0  # of the `truncated` filter, in bandwidths of position
MAX_POINTS = 20_000  # whose matrix takes gigabytes
# Positions are multiples of spacing / theta: whether a pair at exactly the radius counts must not depend on rounding.
_BALL_MARGIN = 1e-6


def dense_filter(features: Tensor, positions: Tensor | None = None) -> Filter:
    """Return the kernel exp(-|f_i - f_j|^2 / 2) of all pairs of (N, D) features over theta.

    Pairs whose positions, (N, axes) over theta, are farther apart than `TRUNCATION_RADIUS` are left out.
    """
    if len(features) > MAX_POINTS:
        raise CapacityError(
            f"the filters exact and truncated are matrices of all pairs here, of at most {MAX_POINTS} voxels, got {len(features)}; "
            "use the filter or method 'lattice', the CPU with float32, or a smaller mask"
        )
    # By differences: |a|^2 + |b|^2 - 2ab loses its digits for close points far from the origin.
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = torch.exp(-0.5 * distances(features, features).square())
    if positions is not None:
        kernel = kernel * (
            distances(positions, positions) <= TRUNCATION_RADIUS * (1.0 + _BALL_MARGIN)
        )
    return kernel.matmul


def spatial_filter(inside: Tensor, steps: Sequence[float], theta: Tensor) -> Filter:
    """Return the exact Gaussian of position on the grid, axis by axis, with zeros outside; steps in the unit of theta."""
    matrices = []
    for extent, step, width in zip(inside.shape, steps, theta, strict=True):
        index = torch.arange(extent, device=theta.device, dtype=theta.dtype) * step
        matrices.append(torch.exp(-0.5 * ((index[:, None] - index[None, :]) / width) ** 2))

    def apply(values: Tensor) -> Tensor:
        grid = values.new_zeros((*inside.shape, values.shape[1])).index_put((inside,), values)
        for axis, matrix in enumerate(matrices):
            grid = torch.tensordot(matrix, grid, dims=([1], [axis])).movedim(0, axis)
        return grid[inside]

    return apply


def normalized(kernel: Filter, ones: Tensor, normalization: str) -> Filter:
    """Return D^-1/2 K D^-1/2 (symmetric), D^-1 K (after) or K (none), with D = diag(K 1); `ones` is (N, 1)."""
    row_sum = ones if normalization == "none" else kernel(ones)
    before = row_sum.rsqrt() if normalization == "symmetric" else ones
    after = before if normalization == "symmetric" else 1.0 / row_sum
    return lambda values: after * kernel(before * values)


class Lattice:
    """The permutohedral lattice of (N, D) features over theta, with K vertices: those of simplices that enclose a point.

    `vertices` and `weights` are (N, D+1), those of each point's simplex; `neighbors` are the vertices before and after each vertex along
    the D+1 directions, each (K,), where K means no vertex.

    Source: Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice"; docs/reference/math.md, section 6.
    """

    def __init__(self, features: Tensor) -> None:
        self._features, size = features, features.shape[1] + 1
        remainder0, rank, self.weights = enclosing_simplex(elevate(features.detach()))
        # A vertex is a number, the inner product of its coordinates and large random ones: two of a million vertices share none.
        generator = torch.Generator().manual_seed(0)
        large = torch.randint(-(1 << 62), 1 << 62, (size,), generator=generator, device="cpu").to(
            rank.device
        )
        corners = [
            ((remainder0 + torch.where(rank < size - k, k, k - size)) * large).sum(1)
            for k in range(size)
        ]
        keys, self.vertices = torch.unique(torch.stack(corners, dim=1), return_inverse=True)
        self.num_vertices = len(keys)
        self.neighbors = [
            (_find(keys, keys - step), _find(keys, keys + step))
            for step in large.sum() - size * large
        ]

    def __call__(self, values: Tensor) -> Tensor:
        """Approximate the sum over all points j of exp(-|f_i - f_j|^2 / 2) values_j."""
        # The gradient with respect to features is that of the Gaussian, K_ij (f_j - f_i): terms are added that are 0 and have its slopes.
        result = self._apply(values)
        if not self._features.requires_grad:
            return result
        fixed, places = values.detach()[:, :, None], self._features.detach()[:, None, :]
        moves = self._features[:, None, :] - places
        arrived = (
            self._apply((places * fixed).flatten(1)).view(*values.shape, -1)
            - places * result.detach()[:, :, None]
        )
        moved = self._apply((moves * fixed).flatten(1)).view(*values.shape, -1)
        return (
            result
            + (moves * arrived + places * moved).sum(2)
            - self._apply((places * moves).sum(2) * fixed[:, :, 0])
        )

    def _apply(self, values: Tensor) -> Tensor:
        """Splat (N, V) values to (K, V), blur with [1 2 1] / 4 along each direction, and slice."""
        corners, weights = self.vertices.flatten(), self.weights[:, :, None]
        at_vertices = values.new_zeros((self.num_vertices, values.shape[1]))
        shares = (weights * values[:, None, :]).flatten(0, 1)
        at_vertices = at_vertices.index_add(0, corners, shares)
        for before, after in self.neighbors:
            padded = torch.nn.functional.pad(at_vertices, (0, 0, 0, 1))
            sides = padded.index_select(0, before) + padded.index_select(0, after)
            at_vertices = 0.5 * at_vertices + 0.25 * sides
        at_corners = at_vertices.index_select(0, corners).view(*self.vertices.shape, -1)
        # The mass of exp(-d^2 / 2) per vertex; each vertex has a volume of (D+1)^(D-1/2).
        num_dims = self._features.shape[1]
        amplitude = math.sqrt(num_dims + 1.0) * math.pow(4.0 * math.pi / 3.0, num_dims / 2.0)
        return amplitude * (weights * at_corners).sum(1)


def elevate(features: Tensor) -> Tensor:
    """Map (N, D) features into the hyperplane of R^(D+1) whose coordinates sum to 0, (N, D+1), where the filter has unit variance."""
    num_dims = features.shape[1]
    index = torch.arange(num_dims, device=features.device, dtype=features.dtype)
    scaled = features * (
        (num_dims + 1) * math.sqrt(2.0 / 3.0) / torch.sqrt((index + 1.0) * (index + 2.0))
    )
    # Coordinate i gets the sum of the scaled features from i on, less i times the one before: E without forming it.
    sums = torch.nn.functional.pad(scaled.flip(1).cumsum(1).flip(1), (0, 1))
    return sums - torch.nn.functional.pad(scaled * (index + 1.0), (1, 0))


def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the simplex around each point, three times (N, D+1): its remainder-0 vertex, ranks of residuals, and weights.

    Rank 0 is that of the largest residual; equal ones are ranked by index. Column k of the weights is that of the vertex of remainder k.
    """
    size = elevated.shape[1]
    quotient = torch.floor(elevated / size + 0.5).long()
    rank = (
        (elevated - quotient * size)
        .sort(dim=1, descending=True, stable=True)
        .indices.argsort(dim=1)
    )
    # Rounding each coordinate by itself can leave the hyperplane; moving those of extreme rank by one multiple brings the point back.
    rank = rank + quotient.sum(1, keepdim=True)
    wrap = (rank < 0).long() - (rank >= size).long()
    remainder0, rank = (quotient + wrap) * size, rank + wrap * size
    by_rank = torch.zeros_like(elevated).scatter(1, rank, (elevated - remainder0) / size)
    # Remainder k is where the k lowest-ranked coordinates have wrapped: its weight is a drop between neighboring sorted residuals.
    drops = by_rank[:, :-1].flip(1) - by_rank[:, 1:].flip(1)
    return remainder0, rank, torch.cat([1.0 - (by_rank[:, :1] - by_rank[:, -1:]), drops], dim=1)


def _find(keys: Tensor, wanted: Tensor) -> Tensor:
    """Return the places of numbers among sorted ones; of those that are missing, the number of keys."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, places, len(keys))
