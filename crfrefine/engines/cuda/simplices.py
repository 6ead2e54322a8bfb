"""The simplices of the permutohedral lattice around points, and how many vertices they have.

A vertex is packed into a number of up to 128 bits, its key. kernels/cuda/lattice_build.cu has the
kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.base.numerics import KEY_MARGIN, KEY_RANGE
from crfrefine.engines.cuda.filters import FeatureSource
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import ceil_divide
from crfrefine.errors import CapacityError

# Dimensions that the CPU's lattice is compiled for; features are padded with zeros.
COMPILED_FEATURES = (*range(1, 13), 16, 20, 28)
THREADS = 128  # threads of a block
SLOTS_OF_BLOCK = 16 * THREADS  # of the hash table, or keys; as in kernels/cuda/lattice_build.cu

_SAMPLED = 100  # one voxel of so many is looked at for the estimate of the number of vertices
_MIN_SAMPLE = 4096  # at least so many voxels are looked at for it
_MAX_KEY_BITS = 128
# The fraction of the golden ratio in 64 bits.
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def words(name: str, keys: Any) -> Arguments:
    """Return the arguments of a kernel for keys, (word, vertex) uint64, by their name.

    The low word comes first; there is no high one if 64 bits are enough.
    """
    return {f"{name}_low": keys[0], f"{name}_high": keys[1] if len(keys) > 1 else None}


class Simplices:
    """How the vertices around an image's voxels are computed, and packed into numbers.

    The fields of a number, from the highest bits to the lowest, are q_D .. q_1, each counted from
    its smallest value, and the remainder.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        widths: bits of each field, the remainder's first.
        case: the number of points and the widths, by which a device remembers lattices.
        num_words: words of a number, one of 64 bits or two.
        shift: (D + 1) on the device, the lowest bit of each field.
    """

    def __init__(self, source: FeatureSource) -> None:
        """Lay out the fields.

        Raises CapacityError if there are too many features or bits, or one spans too many
        bandwidths.
        """
        self.device = source.device
        sizes = [size for size in COMPILED_FEATURES if size >= source.num_features]
        if not sizes:
            raise CapacityError(
                f"the lattice holds at most {COMPILED_FEATURES[-1]} features (axes + modalities), "
                f"not {source.num_features}"
            )
        self.num_features = sizes[0]
        self._padding = self.num_features - source.num_features
        # docs/reference/math.md, section 6.1: the factor of each feature before elevation, and the
        # ends of elevated_i, the sum over j >= i of scaled_j less i scaled_(i-1), i = 1 .. D.
        places = np.arange(1.0, self.num_features + 1.0)
        num_corners = self.num_features + 1
        factors = num_corners * math.sqrt(2.0 / 3.0) / np.sqrt(places * (places + 1.0))
        scale = factors.astype(np.float32)
        scaled = np.array([0.0] * self._padding + source.spans) * scale.astype(np.float64)
        largest = np.append(np.cumsum(scaled[:0:-1])[::-1], 0.0)
        smallest = -places * scaled
        if (largest - smallest > KEY_RANGE).any():
            raise CapacityError("a bandwidth is too small for the range of its feature")
        lowest = np.floor(smallest / num_corners).astype(np.int64) - KEY_MARGIN
        highest = np.ceil(largest / num_corners).astype(np.int64) + KEY_MARGIN
        widths = [count.bit_length() for count in (highest - lowest).tolist()]
        self.widths = (self.num_features.bit_length(), *widths)
        self.case = (source.num_points, self.widths)
        total_bits = sum(self.widths)
        if total_bits > _MAX_KEY_BITS:
            raise CapacityError(
                f"the lattice's cells need {total_bits}-bit numbers, and {_MAX_KEY_BITS} is the "
                "most; use larger bandwidths"
            )
        shift = [0, *np.cumsum(self.widths[:-1]).tolist()]
        # Minus the smallest value of each field, which shifts them to 0, modulo 2^128.
        fields = zip(lowest.tolist(), shift[1:], strict=True)
        self._bias = -sum(value << bit for value, bit in fields) % 2**_MAX_KEY_BITS
        self.num_words = 2 if total_bits > 64 else 1
        self.shift = self.device.upload(np.array(shift, dtype=np.int32))
        self._scale = self.device.upload(scale)

    @property
    def amplitude(self) -> float:
        """The factor that gives the kernel the mass of exp(-d^2 / 2) (math.md, section 6).

        It also makes up for the blur's missing factors of 1/2, and for the unit of the weights.
        """
        # The mass is that of exp(-d^2 / 2) over a vertex's volume.
        mass = math.pow(4.0 * math.pi / 3.0, self.num_features / 2.0)
        halves = math.pow(0.5, self.num_features + 1)
        unit = 65535.0**2
        return math.sqrt(self.num_features + 1.0) * mass * halves / unit

    def find(self, features: Any, run_length: int = 1) -> tuple[Any, Any]:
        """Return the keys of the vertices around each voxel, (word, corner), and their weights.

        With a `run_length`, one voxel of each run of so many is looked at.
        """
        xp = self.device.xp
        num_voxels = features.shape[1] // run_length
        num_corners = num_voxels * (self.num_features + 1)
        keys = xp.empty((self.num_words, num_corners), dtype=np.uint64)
        weight = xp.empty((self.num_features + 1, num_voxels), dtype=np.uint16)
        self.launch(
            "find_simplices",
            num_voxels,
            features=features,
            all_voxels=features.shape[1],
            run_length=run_length,
            num_voxels=num_voxels,
            num_padding=self._padding,
            scale=self._scale,
            shift=self.shift,
            bias_low=self._bias % 2**64,
            bias_high=self._bias >> 64,
            **words("key", keys),
            corner_weight=weight,
        )
        return keys, weight

    def launch(self, kernel: str, num_items: int, /, **arguments: Any) -> None:
        """Run a kernel of kernels/cuda/lattice_build.cu on such keys; see `Launcher.launch`."""
        constants = {
            "CRF_FEATURES": self.num_features,
            "CRF_WIDE_KEYS": self.num_words - 1,
            "CRF_THREADS": THREADS,
        }
        self.device.launch("lattice_build", kernel, constants, num_items, **arguments)


def estimated_vertices(source: FeatureSource, simplices: Simplices) -> float:
    """Estimate how many vertices the lattice would have, from one percent of the voxels.

    The device remembers that for the next lattice.

    Source: Chao 1984, Nonparametric estimation of the number of classes in a population.
    """
    device = source.device
    run_length = max(1, min(_SAMPLED, source.num_points // _MIN_SAMPLE))
    keys, _ = simplices.find(source.features, run_length)
    key_hash = keys[0]
    if len(keys) > 1:
        # Two different keys have the same hash with a probability of 1 in 2^64.
        key_hash = keys[0] * _GOLDEN_RATIO + keys[1]
    in_order = device.xp.sort(key_hash)
    num_blocks = ceil_divide(in_order.size, SLOTS_OF_BLOCK)
    counts = device.xp.empty((3, num_blocks), dtype=np.uint64)
    simplices.launch(
        "count_runs",
        num_blocks,
        keys=in_order,
        num_keys=in_order.size,
        num_blocks=num_blocks,
        counts=counts,
    )
    distinct, once, twice = device.download(counts).sum(axis=1).tolist()
    num_vertices: float = distinct
    if run_length > 1:
        unmet = once * (once - 1.0) / (2.0 * (twice + 1.0))
        num_corners = source.num_points * (simplices.num_features + 1)
        num_vertices = min(distinct + unmet, num_corners)
    device.remember_vertices(simplices.case, num_vertices)
    return num_vertices
