"""Gaussian kernels by summing over all pairs of voxels, in float64: the reference for every other filter.

O(N^2) time: for checks on small grids, refused on large ones.
"""

from __future__ import annotations

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.errors import CapacityError

TRUNCATION_RADIUS = 3.0
"""Radius of the `truncated` filter, in bandwidths of position."""

MAX_POINTS = 20_000
"""More points would take minutes per filtering."""

_MAX_STORED = 4096
_ROWS = 256
# Positions are multiples of spacing / theta: whether a pair at exactly the radius counts must not depend on rounding.
_BALL_MARGIN = 1e-6


class DenseKernel:
    """The kernel exp(-|f_i - f_j|^2 / 2) of a set of points, the points themselves included (its diagonal is 1)."""

    def __init__(self, features: Float64, *, num_positions: int = 0, radius: float = np.inf) -> None:
        """Keep the features; small kernels are computed once and stored.

        Args:
            features: (N, D), already divided by theta.
            num_positions: how many of the last columns are positions.
            radius: pairs whose positions are farther apart than this (in theta) are left out; a pair at the radius is kept.

        Raises:
            CapacityError: more than `MAX_POINTS` points.
        """
        num_points = features.shape[0]
        if num_points > MAX_POINTS:
            raise CapacityError(
                f"the reference sums over all pairs and takes at most {MAX_POINTS} voxels, got {num_points}; "
                "use --device cpu, or a smaller mask"
            )
        self._columns = np.ascontiguousarray(features.T, dtype=np.float64)
        self._num_positions = num_positions
        self._radius = radius
        self._stored = self._rows(slice(None)) if num_points <= _MAX_STORED else None

    @property
    def num_points(self) -> int:
        """N, the number of points."""
        return int(self._columns.shape[1])

    def filter(self, values: Float64) -> Float64:
        """Sum over all points j of K_ij values_j, for (N, V) values; K is symmetric, so this is its own transpose."""
        if self._stored is not None:
            return np.asarray(self._stored @ values)
        blocks = [self._rows(slice(start, start + _ROWS)) @ values for start in range(0, self.num_points, _ROWS)]
        return np.concatenate(blocks)

    def to_dense(self) -> Float64:
        """The (N, N) matrix K."""
        return self._rows(slice(None)) if self._stored is None else self._stored

    def _rows(self, rows: slice) -> Float64:
        first_position = self._columns.shape[0] - self._num_positions
        position = np.zeros((self._columns[0, rows].size, self.num_points))
        intensity = np.zeros_like(position)
        for index, column in enumerate(self._columns):
            # Differences, not the expanded square: |a|^2 + |b|^2 - 2ab loses its digits for close points far from the origin.
            part = position if index >= first_position else intensity
            part += (column[rows, None] - column[None, :]) ** 2
        kernel = np.exp(-0.5 * (position + intensity))
        if np.isfinite(self._radius):
            kernel[position > self._radius**2 * (1.0 + _BALL_MARGIN)] = 0.0
        return kernel
