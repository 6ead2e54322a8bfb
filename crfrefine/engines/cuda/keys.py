"""The vertices around voxels as packed keys, and how many different ones there are, estimated from a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.errors import CapacityError

COMPILED_FEATURES = (*range(1, 13), 16, 20, 28)
"""Dimensions that the CPU's lattice is compiled for: a case uses the next larger one, padded with zeros."""

_SAMPLED, _MIN_SAMPLE = 100, 4096  # One voxel of so many is looked at for the estimate, and at least so many voxels.


@dataclass(frozen=True)
class KeyLayout:
    """How a vertex is packed into a number: fields for q_D (highest) .. q_1 and the remainder (lowest)."""

    lowest: tuple[int, ...]  # (D + 1) smallest value of each q, which its field counts from; q_0 has no field
    shift: tuple[int, ...]  # (D + 1) lowest bit of each field
    remainder_bits: int  # width of the lowest field
    total_bits: int  # width of all fields
    bias: int  # minus the smallest values, in their fields: it shifts them to zero, modulo 2^128


def feature_scales(num_features: int) -> list[float]:
    """Factors of the features before elevation (docs/reference/math.md, section 6.1), rounded to single precision."""
    return [float(np.float32((num_features + 1) * math.sqrt(2.0 / 3.0) / math.sqrt((i + 1.0) * (i + 2.0)))) for i in range(num_features)]


def layout_keys(ranges: list[tuple[float, float]], scale: list[float]) -> KeyLayout:
    """Choose the fields' widths from the (smallest, largest) of every coordinate, by interval arithmetic on the scaled elevation.

    Raises:
        CapacityError: a bandwidth is too small for the range of its feature, or the key has more than 128 bits.
    """
    num_features = len(scale)
    low = [bounds[0] * factor for bounds, factor in zip(ranges, scale, strict=True)]
    high = [bounds[1] * factor for bounds, factor in zip(ranges, scale, strict=True)]
    lowest, width = [0] * (num_features + 1), [0] * (num_features + 1)
    sum_low = sum_high = 0.0
    for i in range(num_features, 0, -1):
        # elevated_i = sum over j >= i of scaled_j - i scaled_(i-1). Margins: rounding, the wrap, a vertex below, a step either way.
        least, most = sum_low - i * high[i - 1], sum_high - i * low[i - 1]
        sum_low += low[i - 1]
        sum_high += high[i - 1]
        if most - least > 1e9:
            raise CapacityError("a bandwidth is too small for the range of its feature")
        lowest[i] = math.floor(least / (num_features + 1)) - 4
        width[i] = (math.ceil(most / (num_features + 1)) + 4 - lowest[i]).bit_length()
    width[0] = num_features.bit_length()
    shift = [0] + [sum(width[:i]) for i in range(1, num_features + 1)]
    total_bits = sum(width)
    if total_bits > 128:
        raise CapacityError(f"the lattice's cells need {total_bits}-bit numbers, and 128 is the most; use larger bandwidths")
    bias = -sum(value << bits for value, bits in zip(lowest[1:], shift[1:], strict=True))
    return KeyLayout(tuple(lowest), tuple(shift), width[0], total_bits, bias % 2**128)


class Simplices:
    """How the vertices of an image's voxels are computed.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        layout: how a vertex is packed.
        is_wide: whether its key has more than 64 bits.
        constants: of the kernels in lattice_build.cu.
        shift: (D + 1) the layout's, on the device.
    """

    def __init__(self, bilateral: BilateralInput) -> None:
        """Lay out the keys; raises CapacityError for too many features, or too fine cells."""
        dimension = next((d for d in COMPILED_FEATURES if d >= bilateral.num_features), None)
        if dimension is None:
            raise CapacityError(f"the lattice holds at most 28 features (axes + modalities), not {bilateral.num_features}")
        self.num_features = dimension
        self._device = bilateral.voxels.device
        self._padding = dimension - bilateral.num_features
        scale = feature_scales(dimension)
        self.layout = layout_keys([(0.0, 0.0)] * self._padding + bilateral.ranges, scale)
        self.is_wide = self.layout.total_bits > 64
        self.constants = {"CRF_FEATURES": dimension, "CRF_WIDE_KEYS": int(self.is_wide)}
        self.shift = self._device.upload(np.array(self.layout.shift, dtype=np.int32))
        self._scale = self._device.upload(np.array(scale, dtype=np.float32))

    def find(self, features: Any) -> tuple[Any, Any, Any]:
        """Return the low words of the vertices' keys and the high ones, or None, (corner * voxel), and weights, (corner, voxel).

        Args:
            features: (feature, voxel).
        """
        xp, num_voxels = self._device.xp, features.shape[1]
        num_corners = num_voxels * (self.num_features + 1)
        low = xp.empty(num_corners, dtype=np.uint64)
        high = xp.empty(num_corners, dtype=np.uint64) if self.is_wide else None
        weight = xp.empty((self.num_features + 1, num_voxels), dtype=np.uint16)
        bias = self.layout.bias % 2**64, self.layout.bias >> 64
        arguments = (features, num_voxels, self._padding, self._scale, self.shift, *bias, low, high, weight)
        self._device.launch("lattice_build", "find_simplices", self.constants, num_voxels, *arguments)
        return low, high, weight


def estimated_vertices(bilateral: BilateralInput, simplices: Simplices) -> float:
    """Estimate how many vertices the lattice would have, from one percent of the voxels.

    Vertices that the sample has not met are estimated from those that it met once and twice (Chao 1984, Nonparametric estimation of
    the number of classes in a population): too few, if some vertices have many more voxels than others.
    """
    voxels, xp = bilateral.voxels, bilateral.voxels.device.xp
    every = max(1, min(_SAMPLED, voxels.num_voxels // _MIN_SAMPLE))
    number = xp.arange(voxels.num_voxels // every, dtype=np.uint64)
    # One of `every` neighbors, as if by chance: a fixed stride would meet neighboring rows at the same places.
    place = number * np.uint64(every) + (number * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(every)
    low, high, _ = simplices.find(xp.ascontiguousarray(bilateral.features[:, place.astype(np.int64)]))
    if high is not None:
        low = low * np.uint64(0x9E3779B97F4A7C15) + high  # of two different keys one in 2^64 is taken for the same
    key = xp.sort(low)
    is_first = xp.concatenate([xp.ones(1, dtype=bool), key[1:] != key[:-1]])
    begin = xp.flatnonzero(is_first)
    met = xp.concatenate([begin[1:], xp.full(1, key.size, dtype=begin.dtype)]) - begin
    distinct = float(begin.size)
    if every == 1:
        return distinct
    once, twice = map(float, voxels.device.download(xp.stack([(met == 1).sum(), (met == 2).sum()])))
    unmet = once * (once - 1.0) / (2.0 * (twice + 1.0))
    return min(distinct + unmet, float(voxels.num_voxels * (simplices.num_features + 1)))
