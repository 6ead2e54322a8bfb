"""The permutohedral lattice, transcribed plainly: a dictionary of vertices, float64, one function per stage.

Not for speed. Source: Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice";
docs/reference/math.md has the geometry in this project's words and symbols.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Float64

Integer = NDArray[np.int64]


def elevate(features: Float64) -> Float64:
    """Map features into the hyperplane of R^(D+1) whose coordinates sum to 0, scaled so that the whole filter has unit variance.

    Splatting and slicing each spread by (D+1)^2 / 12 along every direction and the blur by (D+1)^2 / 2, together (D+1)^2 * 2/3; so
    features are stretched by (D+1) * sqrt(2/3).

    Args:
        features: (N, D), already divided by theta.

    Returns:
        (N, D+1), each row sums to 0.

    Source: Adams et al. 2010, section 3 (the matrix E).
    """
    num_dims = features.shape[1]
    scale = (num_dims + 1) * math.sqrt(2.0 / 3.0)
    index = np.arange(num_dims)
    scaled = features * (scale / np.sqrt((index + 1.0) * (index + 2.0)))
    elevated = np.zeros((features.shape[0], num_dims + 1))
    # Coordinate i gets the sum of the scaled features from i on, less i times the one before: E without forming it.
    elevated[:, :num_dims] = np.cumsum(scaled[:, ::-1], axis=1)[:, ::-1]
    elevated[:, 1:] -= scaled * (index + 1.0)
    return elevated


def enclosing_simplex(elevated: Float64) -> tuple[Integer, Integer]:
    """Find the simplex that encloses each point: its remainder-0 vertex and the rank of each coordinate's residual.

    The vertex is the nearest point whose coordinates are multiples of D+1 and sum to 0; rank 0 is the largest residual. A coordinate
    halfway between two multiples goes up, equal residuals are ranked by index.

    Args:
        elevated: (N, D+1), rows sum to 0.

    Returns:
        remainder0 (N, D+1), multiples of D+1 that sum to 0, and rank (N, D+1), a permutation of 0..D in each row.
    """
    size = elevated.shape[1]
    quotient = np.floor(elevated / size + 0.5).astype(np.int64)
    residual = elevated - quotient * size
    larger = residual[:, None, :] > residual[:, :, None]
    equal_before = (residual[:, None, :] == residual[:, :, None]) & (np.arange(size)[None, :] < np.arange(size)[:, None])
    rank = (larger | equal_before).sum(axis=2)
    # Rounding each coordinate by itself can leave the hyperplane; moving those of extreme rank by one multiple brings the point back.
    rank = rank + quotient.sum(axis=1, keepdims=True)
    wrap = (rank < 0).astype(np.int64) - (rank >= size)
    return (quotient + wrap) * size, rank + wrap * size


def barycentric_coordinates(elevated: Float64, remainder0: Integer, rank: Integer) -> Float64:
    """Weights of the D+1 vertices of the enclosing simplex: they reproduce the point, are non-negative and sum to 1.

    Args:
        elevated: (N, D+1).
        remainder0: (N, D+1) from `enclosing_simplex`.
        rank: (N, D+1) from `enclosing_simplex`.

    Returns:
        (N, D+1), column k for the vertex of remainder k.
    """
    size = elevated.shape[1]
    by_rank = np.empty_like(elevated)
    np.put_along_axis(by_rank, rank, (elevated - remainder0) / size, axis=1)
    weights = np.empty_like(elevated)
    # Remainder k is where the k lowest-ranked coordinates have wrapped: its weight is a drop between neighboring sorted residuals.
    weights[:, 1:] = by_rank[:, :-1][:, ::-1] - by_rank[:, 1:][:, ::-1]
    weights[:, 0] = 1.0 - (by_rank[:, 0] - by_rank[:, -1])
    return weights


def simplex_keys(remainder0: Integer, rank: Integer) -> Integer:
    """Coordinates of the vertices of each enclosing simplex.

    Args:
        remainder0: (N, D+1) from `enclosing_simplex`.
        rank: (N, D+1) from `enclosing_simplex`.

    Returns:
        (N, D+1, D+1): vertex k has all coordinates congruent to k modulo D+1 and summing to 0.
    """
    size = rank.shape[1]
    remainder = np.arange(size)
    step = np.where(rank[:, None, :] < size - remainder[None, :, None], remainder[None, :, None], remainder[None, :, None] - size)
    return remainder0[:, None, :] + step


def amplitude(num_dims: int) -> float:
    """Factor that gives the lattice's kernel the mass of exp(-d^2 / 2), so that sums over many points agree with exact ones.

    By themselves, splat, blur and slice conserve mass: a single value of 1 becomes a bump whose sum over all vertices is 1. There is
    one vertex per volume of (D+1)^(D-1/2), and the Gaussian has volume (2 pi)^(D/2) * ((D+1) * sqrt(2/3))^D. Normalized messages do not
    depend on it.

    Args:
        num_dims: D.
    """
    return math.sqrt(num_dims + 1.0) * math.pow(4.0 * math.pi / 3.0, num_dims / 2.0)


class Lattice:
    """The lattice of a set of points: only vertices of simplices that enclose a point exist.

    Attributes:
        keys: the vertices' coordinates without the last one (they sum to 0), in order of first touch.
        simplex_vertices: (N, D+1) vertex ids.
        barycentric: (N, D+1) weights.
        neighbors: (D+1, K, 2) vertex ids one step down and up each direction; -1 = absent.
    """

    def __init__(self, features: Float64) -> None:
        """Build the lattice.

        Args:
            features: (N, D), already divided by theta.
        """
        self.num_dims = features.shape[1]
        size = self.num_dims + 1
        elevated = elevate(features)
        remainder0, rank = enclosing_simplex(elevated)
        self.barycentric = barycentric_coordinates(elevated, remainder0, rank)
        vertex_of_key: dict[tuple[int, ...], int] = {}
        corners = simplex_keys(remainder0, rank)[:, :, :-1].reshape(-1, self.num_dims)
        ids = [vertex_of_key.setdefault(tuple(key), len(vertex_of_key)) for key in corners.tolist()]
        self.simplex_vertices = np.asarray(ids, dtype=np.int64).reshape(-1, size)
        self.keys = list(vertex_of_key)
        self.neighbors = np.full((size, len(self.keys), 2), -1, dtype=np.int64)
        for direction in range(size):
            # One step along a direction adds 1 to all coordinates and takes D+1 from one of them (the last one is not stored).
            step = tuple(1 - size * (axis == direction) for axis in range(self.num_dims))
            for vertex, key in enumerate(self.keys):
                down = tuple(a - b for a, b in zip(key, step, strict=True))
                up = tuple(a + b for a, b in zip(key, step, strict=True))
                self.neighbors[direction, vertex] = vertex_of_key.get(down, -1), vertex_of_key.get(up, -1)

    @property
    def num_vertices(self) -> int:
        """K, the number of vertices."""
        return len(self.keys)

    def splat(self, values: Float64) -> Float64:
        """Spread (N, V) values to the vertices of their simplices: (K, V)."""
        vertex_values = np.zeros((self.num_vertices, values.shape[1]))
        for corner in range(self.num_dims + 1):
            np.add.at(vertex_values, self.simplex_vertices[:, corner], self.barycentric[:, corner, None] * values)
        return vertex_values

    def blur(self, vertex_values: Float64, *, reverse: bool = False) -> Float64:
        """Blur (K, V) vertex values with [1 2 1] / 4 along each of the D+1 directions; absent neighbors count as 0.

        Args:
            vertex_values: (K, V).
            reverse: take the directions from last to first: the transpose, since each single direction is symmetric but their product is
                not where vertices are absent.
        """
        directions = range(self.num_dims + 1)
        for direction in reversed(directions) if reverse else directions:
            # Absent neighbors have the id -1 and read the appended row.
            padded = np.concatenate([vertex_values, np.zeros((1, vertex_values.shape[1]))])
            down, up = self.neighbors[direction].T
            vertex_values = 0.5 * vertex_values + 0.25 * (padded[down] + padded[up])
        return vertex_values

    def slice_(self, vertex_values: Float64) -> Float64:
        """Interpolate (K, V) vertex values at the points: (N, V); the transpose of `splat`."""
        corners = vertex_values[self.simplex_vertices]
        return np.asarray((self.barycentric[:, :, None] * corners).sum(axis=1))

    def filter(self, values: Float64, *, transpose: bool = False) -> Float64:
        """Approximate the sum over all points j of exp(-|f_i - f_j|^2 / 2) values_j, for (N, V) values."""
        return amplitude(self.num_dims) * self.slice_(self.blur(self.splat(values), reverse=transpose))
