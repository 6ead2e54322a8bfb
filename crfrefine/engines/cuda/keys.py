"""The vertices around voxels as packed keys, and how many different ones there are, estimated from a sample."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import numpy as np

from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.errors import CapacityError

COMPILED_FEATURES = (*range(1, 13), 16, 20, 28)  # dimensions that the CPU's lattice is compiled for; features are padded with zeros

_SAMPLED, _MIN_SAMPLE = 100, 4096  # One voxel of so many is looked at for the estimate, and at least so many voxels.


class Simplices:
    """How the vertices around an image's voxels are computed, and packed into numbers.

    The fields of a number are q_D (highest) .. q_1, each from its smallest value, and the remainder (lowest).

    Attributes:
        num_features: D of the lattice, at least that of the image.
        is_wide: whether a number has more than 64 bits.
        constants: of the kernels in lattice_build.cu.
        shift: (D + 1) lowest bit of each field, on the device.
        remainder_bits: width of the lowest field.
    """

    def __init__(self, bilateral: BilateralInput) -> None:
        """Choose the fields' widths, by interval arithmetic on the scaled elevation.

        Raises:
            CapacityError: too many features, a bandwidth that is too small for the range of its feature, or more than 128 bits.
        """
        size = next((size for size in COMPILED_FEATURES if size >= bilateral.num_features), None)
        if size is None:
            raise CapacityError(f"the lattice holds at most 28 features (axes + modalities), not {bilateral.num_features}")
        self.num_features, self._padding, self._device = size, size - bilateral.num_features, bilateral.voxels.device
        # Factors of the features before elevation (docs/reference/math.md, section 6.1), rounded to single precision.
        scale = [float(np.float32((size + 1) * math.sqrt(2.0 / 3.0) / math.sqrt((i + 1.0) * (i + 2.0)))) for i in range(size)]
        ranges = [(0.0, 0.0)] * self._padding + bilateral.ranges
        lowest, width = [0] * (size + 1), [size.bit_length()] + [0] * size
        sum_low = sum_high = 0.0
        for i in range(size, 0, -1):
            low, high = (bound * scale[i - 1] for bound in ranges[i - 1])
            # elevated_i = sum over j >= i of scaled_j - i scaled_(i-1). Margins: rounding, the wrap, a vertex below, a step either way.
            least, most = sum_low - i * high, sum_high - i * low
            sum_low, sum_high = sum_low + low, sum_high + high
            if most - least > 1e9:
                raise CapacityError("a bandwidth is too small for the range of its feature")
            lowest[i] = math.floor(least / (size + 1)) - 4
            width[i] = (math.ceil(most / (size + 1)) + 4 - lowest[i]).bit_length()
        total_bits = sum(width)
        if total_bits > 128:
            raise CapacityError(f"the lattice's cells need {total_bits}-bit numbers, and 128 is the most; use larger bandwidths")
        shift = [0, *accumulate(width[:-1])]
        # Minus the smallest values, in their fields: it shifts them to zero, modulo 2^128.
        self._bias = -sum(value << bits for value, bits in zip(lowest[1:], shift[1:], strict=True)) % 2**128
        self.is_wide, self.remainder_bits = total_bits > 64, width[0]
        self.constants = {"CRF_FEATURES": size, "CRF_WIDE_KEYS": int(self.is_wide)}
        self.shift = self._device.upload(np.array(shift, dtype=np.int32))
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
        bias = self._bias % 2**64, self._bias >> 64
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
    _, met = xp.unique(low, return_counts=True)
    distinct = float(met.size)
    if every == 1:
        return distinct
    once, twice = map(float, voxels.device.download(xp.stack([(met == 1).sum(), (met == 2).sum()])))
    unmet = once * (once - 1.0) / (2.0 * (twice + 1.0))
    return min(distinct + unmet, float(voxels.num_voxels * (simplices.num_features + 1)))
