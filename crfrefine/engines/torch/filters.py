"""Gaussian filters in plain tensor operations, with gradients with respect to values and features: (N, V) values of N masked voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from crfrefine.errors import CapacityError

TRUNCATION_RADIUS = 3.0
"""Radius of the `truncated` filter, in bandwidths of position."""

MAX_POINTS = 50_000
"""More points would take minutes per filtering."""

_MAX_STORED = 4096
_PAIRS_AT_ONCE = 1 << 24
# Positions are multiples of spacing / theta: whether a pair at exactly the radius counts must not depend on rounding.
_BALL_MARGIN = 1e-6
_MAX_KEY = 1 << 62


class Filter(Protocol):
    """A kernel matrix K of N points that can be applied to values."""

    def filter(self, values: Tensor) -> Tensor:
        """Return K values, for (N, V) values."""
        ...


class Dense:
    """The kernel exp(-|f_i - f_j|^2 / 2), by the sum over all pairs; its diagonal is 1."""

    def __init__(self, features: Tensor, *, num_positions: int = 0, radius: float = math.inf) -> None:
        """Keep the features; small kernels are computed once and stored.

        Args:
            features: (N, D), already divided by theta.
            num_positions: how many of the last columns are positions.
            radius: pairs whose positions are farther apart than this (in theta) are left out; a pair at the radius is kept.

        Raises:
            CapacityError: more than `MAX_POINTS` points.
        """
        self._columns, self._num_positions, self._radius = features.T, num_positions, radius
        num_points = len(features)
        if num_points > MAX_POINTS:
            raise CapacityError(
                f"the exact filter sums over all pairs and takes at most {MAX_POINTS} voxels here, got {num_points}; "
                "use mean_field.filter = 'lattice', --device cpu, or a smaller mask"
            )
        self._blocks = torch.arange(num_points, device=features.device).split(max(1, _PAIRS_AT_ONCE // num_points))
        self._stored = self._rows(slice(None)) if num_points <= _MAX_STORED else None

    def filter(self, values: Tensor) -> Tensor:
        """Return the sum over all points j of K_ij values_j; K is symmetric, so this is its own transpose."""
        if self._stored is not None:
            return self._stored @ values
        return torch.cat([self._rows(block) @ values for block in self._blocks])

    def _rows(self, rows: Tensor | slice) -> Tensor:
        # Differences, not the expanded square: |a|^2 + |b|^2 - 2ab loses its digits for close points far from the origin.
        squares = [(column[rows, None] - column[None, :]) ** 2 for column in self._columns]
        first_position = len(squares) - self._num_positions
        kernel = torch.exp(-0.5 * torch.stack(squares).sum(0))
        if math.isinf(self._radius):
            return kernel
        near = torch.stack(squares[first_position:]).sum(0) <= self._radius**2 * (1.0 + _BALL_MARGIN)
        return kernel * near


class Spatial:
    """The exact Gaussian of position on the grid, one axis after the other, with zeros outside the mask."""

    def __init__(self, inside: Tensor, steps: Sequence[float], theta: Tensor) -> None:
        """Compute one matrix per axis.

        Args:
            inside: (*grid) bool.
            steps: distance between neighboring voxels along each axis, in the unit of theta.
            theta: (axes,) bandwidths.
        """
        self._inside = inside
        self._matrices = []
        for extent, step, width in zip(inside.shape, steps, theta, strict=True):
            index = torch.arange(extent, device=theta.device, dtype=theta.dtype) * step
            self._matrices.append(torch.exp(-0.5 * ((index[:, None] - index[None, :]) / width) ** 2))

    def filter(self, values: Tensor) -> Tensor:
        """Return K values."""
        grid = values.new_zeros((*self._inside.shape, values.shape[1])).index_put((self._inside,), values)
        for axis, matrix in enumerate(self._matrices):
            grid = torch.tensordot(matrix, grid, dims=([1], [axis])).movedim(0, axis)
        return grid[self._inside]


class Lattice:
    """The permutohedral lattice of a set of points: only vertices of simplices that enclose a point exist.

    Source: Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice"; docs/reference/math.md, section 6,
    has the geometry in this project's words and symbols.
    """

    def __init__(self, features: Tensor) -> None:
        """Build the lattice of (N, D) features, already divided by theta.

        Raises:
            CapacityError: the coordinates of the vertices do not fit into 62 bits.
        """
        self._num_dims = num_dims = features.shape[1]
        self._features = features
        elevated = elevate(features.detach())
        remainder0, rank = enclosing_simplex(elevated)
        self._weights = barycentric_coordinates(elevated, remainder0, rank)
        corners, strides = _packed_corners(remainder0, rank)
        keys, self.vertices = torch.unique(corners, return_inverse=True)
        self.num_vertices = len(keys)
        self._neighbors = []
        for direction in range(num_dims + 1):
            step = int(strides.sum()) - (int(strides[direction]) * (num_dims + 1) if direction < num_dims else 0)
            self._neighbors.append((_find(keys, keys - step), _find(keys, keys + step)))

    def filter(self, values: Tensor) -> Tensor:
        """Approximate the sum over all points j of exp(-|f_i - f_j|^2 / 2) values_j; its gradient is approximated alike."""
        result: Tensor = _LatticeFilter.apply(values, self._features, self)  # type: ignore[no-untyped-call]
        return result

    def splat(self, values: Tensor) -> Tensor:
        """Spread (N, V) values to the vertices of their simplices, (K, V)."""
        at_vertices = values.new_zeros((self.num_vertices, values.shape[1]))
        for corner in range(self._num_dims + 1):
            at_vertices.index_add_(0, self.vertices[:, corner], self._weights[:, corner, None] * values)
        return at_vertices

    def blur(self, at_vertices: Tensor, *, reverse: bool = False) -> Tensor:
        """Blur (K, V) values with [1 2 1] / 4 along each of the D+1 directions, in `reverse` from last to first: the transpose."""
        for down, up in reversed(self._neighbors) if reverse else self._neighbors:
            # Absent neighbors read the appended row of zeros.
            padded = torch.cat([at_vertices, at_vertices.new_zeros((1, at_vertices.shape[1]))])
            at_vertices = 0.5 * at_vertices + 0.25 * (padded[down] + padded[up])
        return at_vertices

    def slice_(self, at_vertices: Tensor) -> Tensor:
        """Interpolate (K, V) values at the points, (N, V): the transpose of `splat`."""
        corners = range(self._num_dims + 1)
        return torch.stack([self._weights[:, corner, None] * at_vertices[self.vertices[:, corner]] for corner in corners]).sum(0)

    def apply(self, values: Tensor, *, transpose: bool = False) -> Tensor:
        """Return K values, or K^T values, without a gradient."""
        # The mass of exp(-d^2 / 2) per vertex, of which there is one in a volume of (D+1)^(D-1/2).
        amplitude = math.sqrt(self._num_dims + 1.0) * math.pow(4.0 * math.pi / 3.0, self._num_dims / 2.0)
        return amplitude * self.slice_(self.blur(self.splat(values), reverse=transpose))


class _LatticeFilter(torch.autograd.Function):
    """K values, with the gradient of the Gaussian, whose derivative is K_ij (f_j - f_i), not that of the lattice's interpolation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, lattice: Lattice) -> Tensor:
        ctx.lattice = lattice
        ctx.save_for_backward(values, features)
        return lattice.apply(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        values, features = ctx.saved_tensors
        apply = ctx.lattice.apply
        by_values = apply(gradient, transpose=True)
        if not ctx.needs_input_grad[1]:
            return by_values, None, None
        own = (gradient * apply(values) + values * by_values).sum(1)
        columns = []
        for column in features.T:
            sent = apply(values * column[:, None]), apply(gradient * column[:, None], transpose=True)
            columns.append((gradient * sent[0] + values * sent[1]).sum(1) - column * own)
        return by_values, torch.stack(columns, dim=1), None


def elevate(features: Tensor) -> Tensor:
    """Map (N, D) features into the hyperplane of R^(D+1) whose coordinates sum to 0, (N, D+1).

    They are stretched by (D+1) * sqrt(2/3), so that splat, blur and slice together have unit variance (Adams et al., section 3).
    """
    num_dims = features.shape[1]
    index = torch.arange(num_dims, device=features.device, dtype=features.dtype)
    scaled = features * ((num_dims + 1) * math.sqrt(2.0 / 3.0) / torch.sqrt((index + 1.0) * (index + 2.0)))
    # Coordinate i gets the sum of the scaled features from i on, less i times the one before: E without forming it.
    sums = torch.nn.functional.pad(scaled.flip(1).cumsum(1).flip(1), (0, 1))
    return sums - torch.nn.functional.pad(scaled * (index + 1.0), (1, 0))


def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the remainder-0 vertex of the simplex around each point, (N, D+1), and the rank of each coordinate's residual, (N, D+1).

    Rank 0 is the largest residual. A coordinate halfway between two multiples of D+1 goes up, equal residuals are ranked by index.
    """
    size = elevated.shape[1]
    elevated = elevated.detach()
    quotient = torch.floor(elevated / size + 0.5).long()
    rank = (elevated - quotient * size).sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    # Rounding each coordinate by itself can leave the hyperplane; moving those of extreme rank by one multiple brings the point back.
    rank = rank + quotient.sum(1, keepdim=True)
    wrap = (rank < 0).long() - (rank >= size).long()
    return (quotient + wrap) * size, rank + wrap * size


def barycentric_coordinates(elevated: Tensor, remainder0: Tensor, rank: Tensor) -> Tensor:
    """Return the weights of the vertices of each simplex, (N, D+1), column k for remainder k: they reproduce the point and sum to 1."""
    by_rank = torch.zeros_like(elevated).scatter(1, rank, (elevated - remainder0) / elevated.shape[1])
    # Remainder k is where the k lowest-ranked coordinates have wrapped: its weight is a drop between neighboring sorted residuals.
    drops = by_rank[:, :-1].flip(1) - by_rank[:, 1:].flip(1)
    return torch.cat([1.0 - (by_rank[:, :1] - by_rank[:, -1:]), drops], dim=1)


def _packed_corners(remainder0: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the vertices as one number each, (N, D+1), and the weight of each coordinate in it, (D,).

    The last coordinate is left out, since all sum to 0. There is room for the coordinates of neighbors, so that none is another's number.
    """
    size = rank.shape[1]
    num_dims = size - 1
    first, last = remainder0[:, :num_dims].amin(0) - 2 * size, remainder0[:, :num_dims].amax(0) + 2 * size
    extents = (last - first + 1).tolist()
    if math.prod(extents) >= _MAX_KEY:
        raise CapacityError("the lattice has more cells than 62 bits can number: theta_alpha or theta_beta is tiny; use --device cpu")
    strides = torch.tensor([math.prod(extents[axis + 1 :]) for axis in range(num_dims)], device=rank.device)
    origin, ranks = ((remainder0[:, :num_dims] - first) * strides).sum(1), rank[:, :num_dims]
    corners = [origin + (torch.where(ranks < size - k, k, k - size) * strides).sum(1) for k in range(size)]
    return torch.stack(corners, dim=1), strides


def _find(keys: Tensor, wanted: Tensor) -> Tensor:
    """Return the places of numbers among sorted ones; of those that are missing, the number of keys."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, places, len(keys))
