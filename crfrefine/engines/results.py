"""Label map, softmax and ranges of channels on the host, whichever engine has computed them.

They are compiled functions of the C++ engine, and need no device.
"""

from __future__ import annotations

import numpy as np

from crfrefine.base.array_types import Array, Float32, Float64, Labels
from crfrefine.base.limits import available_threads
from crfrefine.engines.cpu import load_engine
from crfrefine.errors import InputError


def as_float32(values: Array) -> Float32:
    """Return values in C order; those too large for float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def label_map(logits: Float32, threads: int | None = None) -> Labels:
    """Return the label of the largest of (L, *grid) logits at each voxel.

    The lowest label wins a tie. The type is the smallest unsigned type for L - 1.
    """
    out: Labels = np.empty(logits.shape[1:], np.min_scalar_type(len(logits) - 1))
    load_engine().label_map(as_float32(logits), threads or available_threads(), out)
    return out


def softmax(logits: Float32, threads: int | None = None, out: Float32 | None = None) -> Float32:
    """Return the softmax over labels of (L, *grid) logits.

    If `out` is given, the result is written there; `out` may be the logits.
    """
    if out is None:
        out = np.empty(logits.shape, np.float32)
    load_engine().softmax(as_float32(logits), threads or available_threads(), out)
    return out


def channel_ranges(channels: Array, threads: int | None = None) -> Float64:
    """Return the smallest and largest value of each channel in float32, (C, 2).

    Both are NaN for a channel with a value that is not finite in float32.
    """
    extremes = load_engine().channel_ranges(as_float32(channels), threads or available_threads())
    return np.reshape(extremes, (-1, 2))


def largest_magnitude(channels: Array, name: str, threads: int | None = None) -> float:
    """Return the largest magnitude of channels, (C, *grid).

    Raises InputError, with their name, for values that are not finite in float32.
    """
    ranges = channel_ranges(channels, threads)
    for number in np.flatnonzero(np.isnan(ranges[:, 0])):
        is_finite = np.isfinite(as_float32(channels[number]))
        raise InputError(
            f"{name}: channel {number} has {np.count_nonzero(~is_finite)} values that are not "
            "finite in float32 (NaN, infinity, or above 3e38)"
        )
    return float(np.abs(ranges).max(initial=0.0))
