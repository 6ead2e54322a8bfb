"""The Gaussian kernel of points: its interface, its limits, its checks, and its compiled form.

Its form in tensor operations is in engines/torch/points.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array, Float32
from crfrefine.base.limits import available_threads
from crfrefine.base.numerics import MAX_AXES, MAX_SPAN
from crfrefine.engines.choices import exact_or_lattice
from crfrefine.engines.cpu import engine_errors, load_engine
from crfrefine.engines.results import as_float32, channel_ranges
from crfrefine.errors import CapacityError, ConfigError, InputError

METHODS = ("auto", "lattice", "exact")
NORMALIZATIONS = ("none", "after", "symmetric")

MAX_VALUE = 1e20
"""Largest magnitude of a value in float32: sums over many points stay finite with the lattice's
integer weights, too."""

TINY = float(np.finfo(np.float32).tiny)
"""Smallest divisor: sums of weights below it are replaced by it."""


class CompiledPoints:
    """The kernel exp(-|f_i - f_j|² / 2) of N points in the C++ engine, for any number of values.

    `description` is the algorithm and its size, in a line.
    """

    def __init__(self, points: Float32, method: str, threads: int | None) -> None:
        """Build the kernel of features (D, *grid), where near points share a tile of the sums.

        `method` is "exact" or "lattice".
        """
        rows = points.reshape(len(points), -1)
        if points.ndim > MAX_AXES + 1:
            points = rows
        self._shape = points.shape
        self._scale_by_normalization: dict[str, Float32] = {}
        with engine_errors(points.shape):
            self._points = load_engine().Points(points, method, threads or available_threads())
        self.description: str = self._points.description()

        if method == "lattice":  # "lattice (VERTICES vertices, ...)"
            num_vertices = int(self.description.split()[1].strip("("))
            num_features, num_points = rows.shape
            require_shared(num_vertices, num_points, num_features)

    def __reduce__(self) -> Any:
        """Refuse: the engine holds the kernel."""
        raise TypeError(
            "a Lattice cannot be pickled or copied: pass its features to the other process, and "
            "build the Lattice there"
        )

    def apply(
        self, values: Float32, scale: Float32 | None = None, *, transposed: bool = False
    ) -> Float32:
        """Filter (V, N) values with the kernel or its transpose; multiply the results by `scale`.

        The scale, (N,), is a factor of each point's results.
        """
        with engine_errors(values.shape):
            out = np.zeros(values.shape, np.float32)
            self._points.apply(values, scale, transposed, out)
        return out

    def filter(self, values: Float32, normalization: str) -> Float32:
        """Filter (V, N) values, and normalize: one of `NORMALIZATIONS`."""
        if normalization == "none":
            return self.apply(values)
        known = self._scale_by_normalization
        if normalization == "after" and normalization not in known:
            with engine_errors(values.shape):
                means = np.zeros(values.shape, np.float32)
                scale = np.empty(values.shape[1], np.float32)
                was_possible = self._points.mean(values, scale, means)
            if was_possible:  # Else it takes two filterings: of the values, and of ones.
                known[normalization] = scale
                return means
        if normalization not in known:
            (sums,) = self.apply(np.ones((1, values.shape[1]), np.float32))
            sums = np.maximum(sums, TINY)
            if normalization == "symmetric":
                sums = np.sqrt(sums)
            # Each point's factor is the inverse of its sum of weights, or the root of that.
            known[normalization] = 1.0 / sums
        scale = known[normalization]
        if normalization == "symmetric":
            values = values * scale
        return self.apply(values, scale)

    def feature_gradient(self, left: Float32, right: Float32) -> Float32:
        """Return the gradient of sum(left * kernel(right)) with respect to features, (D, N)."""
        with engine_errors(self._shape):
            out = np.empty(self._shape, np.float32)
            self._points.feature_gradient(left, right, out)
            return out.reshape(len(out), -1)


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError if a word is not among the known ones."""
    if value not in known:
        raise ConfigError(f"{name}: expected {', '.join(known)}, got {value!r}")


def choose_method(method: str, num_points: int, num_features: int) -> str:
    """Return "exact" or "lattice"; InputError without points, ConfigError for another word."""
    if not num_points * num_features:
        counts = f"{num_points} points of {num_features} features"
        raise InputError(f"there are {counts}; expected one or more of each")
    check_word("method", method, METHODS)
    if method == "auto":
        return exact_or_lattice(num_points)
    return method


def finite(values: Array, name: str) -> Float32:
    """Return values as float32 in C order; raise InputError if one is not finite or too large."""
    result = as_float32(values)
    # Not-a-number is not below the limit.
    if result.size and not np.abs(channel_ranges(result.reshape(1, -1), 1)).max() <= MAX_VALUE:
        raise InputError(
            f"{name}: expected finite numbers up to {MAX_VALUE:g}, found NaN, infinity or larger "
            "ones"
        )
    return result


def require_small_spans(largest: float) -> None:
    """Raise CapacityError if the largest range of a feature is too many bandwidths."""
    if largest > MAX_SPAN:
        raise CapacityError(
            "a feature spans more than a million bandwidths; divide the features by larger ones"
        )


def require_shared(num_vertices: int, num_points: int, num_features: int) -> None:
    """Raise InputError if no two points share a vertex of the lattice.

    No point would then receive anything from another one.
    """
    if num_points > 1 and num_vertices == num_points * (num_features + 1):
        raise InputError(
            f"each of the {num_points} points has a simplex of the lattice for itself, so that "
            "none receives anything from another one: the bandwidths are too small, or there are "
            "too many features; divide the features by larger bandwidths, or take "
            "method='exact'"
        )
