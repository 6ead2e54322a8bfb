"""Gaussian filters in plain tensor operations.

A filter returns the product of an (N, N) kernel with (N, V) values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from crfrefine.base.numerics import RADIUS_MARGIN, TRUNCATION_RADIUS
from crfrefine.errors import CapacityError

Filter = Callable[[Tensor], Tensor]

MAX_POINTS = 20_000  # the matrix of so many points takes gigabytes


def dense_filter(features: Tensor, positions: Tensor | None = None) -> Filter:
    """Return the kernel exp(-|f_i - f_j|^2 / 2) of all pairs of (N, D) features over theta.

    Pairs whose positions, (N, axes) over theta, are farther apart than `TRUNCATION_RADIUS` are left
    out. Raises CapacityError for more points than fit into a matrix.
    """
    if len(features) > MAX_POINTS:
        raise CapacityError(
            "the filters exact and truncated are matrices of all pairs here, of at most "
            f"{MAX_POINTS} voxels, got {len(features)}; "
            "use the filter or method 'lattice', the CPU with float32, or a smaller mask"
        )
    squares = _distances(features).square()
    kernel = torch.exp(-0.5 * squares)
    if positions is not None:
        radius = TRUNCATION_RADIUS * (1.0 + RADIUS_MARGIN)
        kernel = kernel * (_distances(positions) <= radius)
    return kernel.matmul


def _distances(points: Tensor) -> Tensor:
    """Return the (N, N) distances between (N, D) points."""
    # By differences: |a|^2 + |b|^2 - 2ab loses its digits for close points far from the origin.
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def spatial_sum(inside: Tensor, steps: Sequence[float], theta: Tensor) -> Filter:
    """Return the Gaussian of position on the grid, axis by axis, with zeros outside.

    It is made from the mask, (*grid), the steps between voxels along each axis in the unit of the
    bandwidths, and the bandwidths, (axes).
    """
    matrices = []
    for extent, step, width in zip(inside.shape, steps, theta, strict=True):
        index = torch.arange(extent, device=theta.device, dtype=theta.dtype)
        position = index * step
        distance = (position[:, None] - position) / width
        matrices.append(torch.exp(-0.5 * distance**2))

    def apply(values: Tensor) -> Tensor:
        empty = values.new_zeros((*inside.shape, values.shape[1]))
        grid = empty.index_put((inside,), values)
        for axis, matrix in enumerate(matrices):
            product = torch.tensordot(matrix, grid, dims=([1], [axis]))
            grid = product.movedim(0, axis)
        return grid[inside]

    return apply


def normalized(kernel: Filter, like: Tensor, normalization: str) -> Filter:
    """Return D^-1/2 K D^-1/2 (symmetric), D^-1 K (after) or K (none), with D = diag(K 1).

    `like` has N rows, in the type and on the device of values.
    """
    if normalization == "none":
        return kernel
    row_sum = kernel(like.new_ones((len(like), 1)))
    if normalization == "after":
        inverse = 1.0 / row_sum
        return lambda values: inverse * kernel(values)
    root = row_sum.rsqrt()
    return lambda values: root * kernel(root * values)


class Lattice:
    """The permutohedral lattice of (N, D) features over theta.

    Its K vertices are those of simplices that enclose a point.

    Attributes:
        vertices, weights: (N, D+1), those of each point's simplex.
        neighbors: the vertices before and after each vertex along the D+1 directions, each (K,),
            where K means no vertex.

    Source: Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral
    Lattice"; docs/reference/math.md, section 6.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features
        size = features.shape[1] + 1
        elevated = elevate(features.detach())
        remainder0, rank, self.weights = enclosing_simplex(elevated)
        # A vertex is identified by a number, the inner product of its coordinates and large random
        # integers. Among a million vertices, no two have the same number.
        generator = torch.Generator().manual_seed(0)
        limit = 1 << 62
        large = torch.randint(-limit, limit, (size,), generator=generator, device="cpu")
        large = large.to(rank.device)
        corners = []
        for remainder in range(size):
            wraps = rank >= size - remainder
            vertex = remainder0 + remainder - size * wraps
            corners.append((vertex * large).sum(1))
        numbers = torch.stack(corners, dim=1)
        keys, self.vertices = torch.unique(numbers, return_inverse=True)
        self.num_vertices = len(keys)

        self.neighbors = []
        for step in large.sum() - size * large:
            before = _find(keys, keys - step)
            after = _find(keys, keys + step)
            self.neighbors.append((before, after))

    def __call__(self, values: Tensor) -> Tensor:
        """Approximate the sum over all points j of exp(-|f_i - f_j|^2 / 2) values_j."""
        result = self._apply(values)
        if not self._features.requires_grad:
            return result

        # The gradient with respect to features is that of the Gaussian, K_ij (f_j - f_i). The
        # terms that are added here have this gradient, and their value is 0.
        sent = values.detach()[:, :, None]
        received = result.detach()[:, :, None]
        features = self._features[:, None, :]
        places = features.detach()
        moves = features - places
        shape = (*values.shape, -1)
        arrived = self._apply((places * sent).flatten(1)).view(shape)
        moved = self._apply((moves * sent).flatten(1)).view(shape)
        products = (places * moves).sum(2)
        inner = self._apply(products * sent[:, :, 0])
        outer = moves * (arrived - places * received) + places * moved
        return result + outer.sum(2) - inner

    def _apply(self, values: Tensor) -> Tensor:
        """Splat (N, V) values to (K, V), blur with [1 2 1] / 4 along each direction, and slice."""
        corners = self.vertices.flatten()
        weights = self.weights[:, :, None]
        at_vertices = values.new_zeros((self.num_vertices, values.shape[1]))
        shares = (weights * values[:, None, :]).flatten(0, 1)
        at_vertices = at_vertices.index_add(0, corners, shares)
        for before, after in self.neighbors:
            padded = pad(at_vertices, (0, 0, 0, 1))
            sides = padded.index_select(0, before) + padded.index_select(0, after)
            at_vertices = 0.5 * at_vertices + 0.25 * sides
        at_corners = at_vertices.index_select(0, corners)
        at_corners = at_corners.view(*self.vertices.shape, -1)
        # The mass of exp(-d^2 / 2) over a vertex's volume, (D+1)^(D-1/2).
        num_dims = self._features.shape[1]
        mass = math.pow(4.0 * math.pi / 3.0, num_dims / 2.0)
        amplitude = math.sqrt(num_dims + 1.0) * mass
        return amplitude * (weights * at_corners).sum(1)


def elevate(features: Tensor) -> Tensor:
    """Map (N, D) features into the hyperplane of R^(D+1) whose coordinates sum to 0, (N, D+1).

    There the filter has unit variance.
    """
    num_dims = features.shape[1]
    index = torch.arange(num_dims, device=features.device, dtype=features.dtype)
    roots = torch.sqrt((index + 1.0) * (index + 2.0))
    scale = (num_dims + 1) * math.sqrt(2.0 / 3.0) / roots
    scaled = features * scale
    # Coordinate i is the sum of the scaled features from i on, minus i times feature i - 1: the
    # product with the matrix E, which is never formed.
    sums = scaled.flip(1).cumsum(1).flip(1)
    before = scaled * (index + 1.0)
    return pad(sums, (0, 1)) - pad(before, (1, 0))


def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the simplex around each point, as three tensors (N, D+1).

    They are its remainder-0 vertex, the ranks of the residuals, and the weights. The largest
    residual has rank 0; equal ones are ranked by index. Column k of the weights belongs to the
    vertex of remainder k.
    """
    size = elevated.shape[1]
    quotient = torch.floor(elevated / size + 0.5).long()
    residual = elevated - quotient * size
    order = residual.sort(dim=1, descending=True, stable=True).indices
    # Rounding each coordinate by itself can leave the hyperplane; moving those of extreme rank by
    # one multiple brings the point back.
    rank = order.argsort(dim=1) + quotient.sum(1, keepdim=True)
    wrap = (rank < 0).long() - (rank >= size).long()
    remainder0 = (quotient + wrap) * size
    rank = rank + wrap * size

    wrapped = (elevated - remainder0) / size
    by_rank = torch.zeros_like(elevated).scatter(1, rank, wrapped)
    # Remainder k is where the k lowest-ranked coordinates have wrapped: its weight is a drop
    # between neighboring sorted residuals.
    largest = by_rank[:, :1]
    smallest = by_rank[:, -1:]
    drops = by_rank[:, :-1] - by_rank[:, 1:]
    rest = 1.0 - (largest - smallest)
    return remainder0, rank, torch.cat([rest, drops.flip(1)], dim=1)


def _find(keys: Tensor, wanted: Tensor) -> Tensor:
    """Return the places of numbers among sorted keys; if one is missing, the number of keys."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, places, len(keys))
