"""Stored voxels: in the type of the file, NaN and infinity included, and the scaling."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array
from crfrefine.io.formats import ALL_TYPES
from crfrefine.io.reading import decoded_pieces
from crfrefine.io.streams import VoxelSource
from crfrefine.io.volume import VolumeHeader, iter_pieces
from crfrefine.io.writing import Planes

_PIECE_BYTES = 1 << 22  # of the scaled values that are looked at, or made, at once
# Whole numbers up to this one are exact in float64.
_LARGEST_EXACT = 2.0**53


def describe_scaling(source: VoxelSource | None) -> str:
    """Return how values are made of stored ones, "stored × 2 - 1024"; "" if they are the same."""
    if source is None or not source.is_scaled:
        return ""
    if source.intercept == 0:
        return f"stored × {source.slope:.9g}"
    sign = "-" if source.intercept < 0 else "+"
    return f"stored × {source.slope:.9g} {sign} {abs(source.intercept):.9g}"


def scaled(stored: Array, source: VoxelSource | None) -> Array:
    """Return the values of stored ones: float64, or the stored ones if there is no scaling."""
    if source is None or not source.is_scaled:
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        return source.scaled(stored)


def pieces_of_values(header: VolumeHeader) -> Generator[Array]:
    """Yield the scaled values piece by piece, (channels, planes, [y,] x), in the file's order."""
    for piece in decoded_pieces(header, most_bytes=_PIECE_BYTES, as_stored=True):
        yield scaled(piece.values, header.source)


def scaled_planes(stored: Array, source: VoxelSource | None) -> Planes:
    """Return what gives the values of planes of a channel of stored ones, (channels, [z,] y, x)."""
    return lambda channel, planes: scaled(stored[channel, planes], source)


def image_type(stored: Array, source: VoxelSource | None, types: tuple[str, ...]) -> np.dtype[Any]:
    """Return the type of the image with stored values: theirs if there is no scaling.

    Scaled integers get the smallest integer type among `types` that holds all values exactly. If
    some are no whole numbers, or too large, they get float32, or float64 beyond its range.
    """
    if source is None or not source.is_scaled or stored.dtype == np.float64:
        return stored.dtype
    low = math.inf
    high = -math.inf
    is_whole = True
    for channels, planes in iter_pieces(stored.shape, 8, _PIECE_BYTES, by_channel=True):
        values = scaled(stored[channels.start, planes], source)
        finite = values[np.isfinite(values)]
        low = float(finite.min(initial=low))
        high = float(finite.max(initial=high))
        is_whole = is_whole and bool((values == np.rint(values)).all())
    largest = max(-low, high)
    if stored.dtype.kind in "iu" and is_whole and largest <= _LARGEST_EXACT:
        integer = smallest_integer(types, low, high)
        if integer is not None:
            return integer
    if largest > float(np.finfo(np.float32).max):
        return np.dtype(np.float64)
    return np.dtype(np.float32)


def smallest_integer(types: tuple[str, ...], low: float, high: float) -> np.dtype[Any] | None:
    """Return the smallest integer type among `types` that holds two numbers, None for none."""
    for name in ALL_TYPES:
        if name in types and "int" in name:
            limits = np.iinfo(name)
            if limits.min <= low and high <= limits.max:
                return np.dtype(name)
    return None
