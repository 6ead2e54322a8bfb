"""`Lattice`: the kernel of the CRF as an operator on arrays of points with any features."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_voxels
from crfrefine.base.array_types import Array, Float32
from crfrefine.base.limits import check_threads
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.point_kernels import (
    MAX_VALUE,
    TINY,
    CompiledPoints,
    PointKernel,
    check_word,
)
from crfrefine.errors import InputError

METHODS = ("auto", "lattice", "exact")
NORMALIZATIONS = ("none", "after", "symmetric")
DEVICES = ("cpu", "torch", "torch:cuda")

MAX_EXACT = 8192
"""Points up to which "auto" sums over all pairs, in about .1 s; the lattice is an approximation."""


class Lattice:
    """The kernel exp(-|f_i - f_j|² / 2) of points, built once, for any number of values.

    Arguments and errors are those of `gaussian_filter`.

    Attributes:
        description: the algorithm and its size, in a line.
        num_points: N, those inside the mask.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import Lattice
        >>> features = np.random.default_rng(0).normal(size=(500, 4))
        >>> lattice = Lattice(features)
        >>> smooth = lattice(np.ones((2, 500)), normalization="after")
        >>> bool(np.allclose(smooth, 1.0))
        True
    """

    def __init__(
        self,
        features: ArrayLike,
        *,
        method: str = "auto",
        mask: ArrayLike | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Build the kernel of features (N, D) or (D, *grid)."""
        check_threads(threads)
        check_word("device", device, DEVICES)
        points = given_array(features, "features")
        if points.ndim < 2:
            raise InputError(f"features have shape {points.shape}; expected (N, D), or (D, *grid)")
        if points.ndim == 2:
            points = points.T
        self.shape = points.shape[1:]
        self._mask = None
        if mask is not None:
            self._mask = given_voxels(mask, self.shape).copy()
            points = points[:, self._mask]
        self.num_points = math.prod(points.shape[1:])

        method = choose_method(method, self.num_points, num_features=len(points))
        points = _from_first_point(points)
        self._kernel: PointKernel
        if device == "cpu":  # The engine refuses features that are not finite.
            self._kernel = CompiledPoints(_as_float32(points), method, threads)
        else:
            from crfrefine.engines.torch.points import TorchPoints

            self._kernel = TorchPoints(finite(points, "features"), method, device)
        self.description = self._kernel.description
        self._scale_by_normalization: dict[str, Float32] = {}

    def __call__(self, values: ArrayLike, *, normalization: str = "none") -> Float32:
        """Filter values (V, N) or (V, *grid); see `gaussian_filter`."""
        check_word("normalization", normalization, NORMALIZATIONS)
        channels = given_array(values, "values")
        if channels.ndim < 2 or channels.shape[1:] != self.shape:
            grid = ", ".join(str(extent) for extent in self.shape)
            raise InputError(
                f"values have shape {channels.shape}; expected (V, {grid}), one value per point "
                "of features (N, D) or (D, *grid)"
            )
        if self._mask is None:
            sent = finite(channels.reshape(len(channels), self.num_points), "values")
        else:
            sent = finite(channels[:, self._mask], "values")
        if not len(sent):
            return np.zeros(channels.shape, np.float32)

        filtered = self._filter(sent, normalization)
        if self._mask is None:
            return filtered.reshape(channels.shape)
        result = np.zeros(channels.shape, np.float32)
        result[:, self._mask] = filtered
        return result

    def _filter(self, sent: Float32, normalization: str) -> Float32:
        """Filter (V, N) values, and normalize."""
        if normalization == "none":
            return self._kernel.apply(sent)
        if normalization == "after" and normalization not in self._scale_by_normalization:
            means = self._kernel.mean(sent)
            if means is not None:
                filtered, self._scale_by_normalization["after"] = means
                return filtered
        # Each point's factor is the inverse of its sum of weights, or the root of that.
        scale = self._scale_by_normalization.get(normalization)
        if scale is None:
            ones = np.ones((1, self.num_points), np.float32)
            (sums,) = self._kernel.apply(ones)
            sums = np.maximum(sums, np.float32(TINY))
            if normalization == "symmetric":
                sums = np.sqrt(sums)
            scale = 1.0 / sums
            self._scale_by_normalization[normalization] = scale
        if normalization == "symmetric":
            sent = sent * scale
        return self._kernel.apply(sent, scale)


def choose_method(method: str, num_points: int, num_features: int) -> str:
    """Return "exact" or "lattice"; InputError without points, ConfigError for another word."""
    if not num_points * num_features:
        counts = f"{num_points} points of {num_features} features"
        raise InputError(f"there are {counts}; expected one or more of each")
    check_word("method", method, METHODS)
    if method == "auto":
        return "exact" if num_points <= MAX_EXACT else "lattice"
    return method


def _from_first_point(points: Array) -> Array:
    """Return features (D, *grid) in float32; those with more digits become offsets.

    The offsets are from the first point, so that large coordinates lose no precision.
    """
    if points.dtype.itemsize <= np.float32().itemsize:
        return points
    first_place = (slice(1),) * (points.ndim - 1)
    first = points[(slice(None), *first_place)]
    moved = np.empty(points.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(points, first, out=moved, dtype=np.float64, casting="unsafe")
    return moved


def _as_float32(values: Array) -> Float32:
    """Return values in C order; those too large for float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def finite(values: Array, name: str) -> Float32:
    """Return values as float32 in C order; raise InputError if one is not finite or too large."""
    result = _as_float32(values)
    extremes = []
    if result.size:
        extremes = load_engine().channel_ranges(result.reshape(1, -1), 1)
    if not all(abs(extreme) <= MAX_VALUE for extreme in extremes):
        raise InputError(
            f"{name}: expected finite numbers up to {MAX_VALUE:g}, found NaN, infinity or larger "
            "ones"
        )
    return result
