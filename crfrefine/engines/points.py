"""Checks of the values of points, and the choice of how they are filtered."""

from __future__ import annotations

import numpy as np

from crfrefine.base.array_types import Array, Float32
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.point_kernels import MAX_VALUE, check_word
from crfrefine.errors import InputError

METHODS = ("auto", "lattice", "exact")
NORMALIZATIONS = ("none", "after", "symmetric")

MAX_EXACT = 8192
"""Points up to which "auto" sums over all pairs, in about .1 s; the lattice is an approximation."""


def choose_method(method: str, num_points: int, num_features: int) -> str:
    """Return "exact" or "lattice"; InputError without points, ConfigError for another word."""
    if not num_points * num_features:
        counts = f"{num_points} points of {num_features} features"
        raise InputError(f"there are {counts}; expected one or more of each")
    check_word("method", method, METHODS)
    if method == "auto":
        return "exact" if num_points <= MAX_EXACT else "lattice"
    return method


def as_float32(values: Array) -> Float32:
    """Return values in C order; those too large for float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def finite(values: Array, name: str) -> Float32:
    """Return values as float32 in C order; raise InputError if one is not finite or too large."""
    result = as_float32(values)
    extremes = []
    if result.size:
        extremes = load_engine().channel_ranges(result.reshape(1, -1), 1)
    if not all(abs(extreme) <= MAX_VALUE for extreme in extremes):
        raise InputError(
            f"{name}: expected finite numbers up to {MAX_VALUE:g}, found NaN, infinity or larger "
            "ones"
        )
    return result
