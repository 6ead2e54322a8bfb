"""The permutohedral lattice on the device.

Its vertices are packed into keys, found by a hash table that grows, and numbered in the order of
their keys, so that every run has the same bits; then values are splatted, blurred and sliced.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from crfrefine.engines.cuda.filters import FeatureSource, Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import Room, ceil_divide, row_constants
from crfrefine.errors import CapacityError

# Dimensions that the CPU's lattice is compiled for; features are padded with zeros.
COMPILED_FEATURES = (*range(1, 13), 16, 20, 28)

_SAMPLED = 100  # one voxel of so many is looked at for the estimate of the number of vertices
_MIN_SAMPLE = 4096  # at least so many voxels are looked at for it
_MAX_KEY_BITS = 128
_MAX_RANGE = 1e9  # largest range of an elevated coordinate
_THREADS = 128  # threads of a block
_SLOTS_OF_BLOCK = 16 * _THREADS  # of the hash table, or keys; as in kernels/cuda/lattice_build.cu


class VertexKeys(NamedTuple):
    """Packed vertices: an array of the low words, and one of the high words."""

    low: Any  # uint64
    high: Any  # uint64; None if 64 bits are enough


class Simplices:
    """How the vertices around an image's voxels are computed, and packed into numbers.

    The fields of a number, from the highest bits to the lowest, are q_D .. q_1, each counted from
    its smallest value, and the remainder.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        widths: bits of each field, the remainder's first.
        is_wide: whether numbers have more than 64 bits.
        remainder_bits: width of the remainder's field.
        shift: (D + 1) on the device, the lowest bit of each field.
        constants: those of the kernels in lattice_build.cu.
    """

    def __init__(self, source: FeatureSource) -> None:
        """Lay out the fields; CapacityError if there are too many features, or too many bits."""
        self._device = source.device
        self.num_features = _compiled_size(source.num_features)
        self._padding = self.num_features - source.num_features
        scale = _elevation_scale(self.num_features)
        ranges = [(0.0, 0.0)] * self._padding + source.ranges
        lowest, widths = _field_ranges(ranges, scale)
        self.widths = tuple(widths)
        total_bits = sum(widths)
        if total_bits > _MAX_KEY_BITS:
            raise CapacityError(
                f"the lattice's cells need {total_bits}-bit numbers, and {_MAX_KEY_BITS} is the "
                "most; use larger bandwidths"
            )
        # The bias is minus the smallest value of each field: it shifts them to 0, modulo 2^128.
        shift = []
        bias = 0
        next_bit = 0
        for value, width in zip(lowest, widths, strict=True):
            shift.append(next_bit)
            bias -= value << next_bit
            next_bit += width
        self._bias = bias % 2**_MAX_KEY_BITS
        self.is_wide = total_bits > 64
        self.remainder_bits = widths[0]
        self.constants = {
            "CRF_FEATURES": self.num_features,
            "CRF_WIDE_KEYS": int(self.is_wide),
            "CRF_THREADS": _THREADS,
        }
        self.shift = self._device.upload(np.array(shift, dtype=np.int32))
        self._scale = self._device.upload(np.array(scale, dtype=np.float32))

    def find(self, features: Any, run_length: int = 1) -> tuple[VertexKeys, Any]:
        """Return the keys of the vertices around each voxel, (corner), and their weights.

        With a `run_length`, one voxel of each run of so many is looked at.
        """
        xp = self._device.xp
        num_voxels = features.shape[1] // run_length
        num_corners = num_voxels * (self.num_features + 1)
        low = xp.empty(num_corners, dtype=np.uint64)
        high = xp.empty(num_corners, dtype=np.uint64) if self.is_wide else None
        weight = xp.empty((self.num_features + 1, num_voxels), dtype=np.uint16)
        self._device.launch(
            "lattice_build",
            "find_simplices",
            self.constants,
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
            key_low=low,
            key_high=high,
            corner_weight=weight,
        )
        return VertexKeys(low, high), weight


def _compiled_size(num_features: int) -> int:
    """Return the dimension of the lattice for so many features; CapacityError for too many."""
    for size in COMPILED_FEATURES:
        if size >= num_features:
            return int(size)
    raise CapacityError(
        f"the lattice holds at most {COMPILED_FEATURES[-1]} features (axes + modalities), not "
        f"{num_features}"
    )


def _elevation_scale(size: int) -> list[float]:
    """Return the factors of the features before elevation, rounded to single precision.

    Source: docs/reference/math.md, section 6.1.
    """
    scale = []
    for i in range(size):
        root = math.sqrt((i + 1.0) * (i + 2.0))
        factor = (size + 1) * math.sqrt(2.0 / 3.0) / root
        scale.append(float(np.float32(factor)))
    return scale


def _field_ranges(
    ranges: list[tuple[float, float]], scale: list[float]
) -> tuple[list[int], list[int]]:
    """Return the smallest value of each field of a key, and its bits: the remainder, q_1 .. q_D.

    Raises CapacityError if a feature spans too many bandwidths.
    """
    size = len(ranges)
    lowest = [0] * (size + 1)
    widths = [size.bit_length()] + [0] * size
    sum_low = 0.0
    sum_high = 0.0
    for i in range(size, 0, -1):
        low, high = ranges[i - 1]
        low *= scale[i - 1]
        high *= scale[i - 1]
        # elevated_i = sum over j >= i of scaled_j - i scaled_(i-1). The margins of 4 are for the
        # rounding, the wrap, a vertex below, and a step either way.
        smallest = sum_low - i * high
        largest = sum_high - i * low
        if largest - smallest > _MAX_RANGE:
            raise CapacityError("a bandwidth is too small for the range of its feature")
        highest = math.ceil(largest / (size + 1)) + 4
        lowest[i] = math.floor(smallest / (size + 1)) - 4
        widths[i] = (highest - lowest[i]).bit_length()
        sum_low += low
        sum_high += high
    return lowest, widths


# The fraction of the golden ratio in 64 bits.
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def estimated_vertices(source: FeatureSource, simplices: Simplices) -> float:
    """Estimate how many vertices the lattice would have, from one percent of the voxels.

    Source: Chao 1984, Nonparametric estimation of the number of classes in a population.
    """
    device = source.device
    run_length = max(1, min(_SAMPLED, source.num_points // _MIN_SAMPLE))
    keys, _ = simplices.find(source.features, run_length)
    key_hash = keys.low
    if keys.high is not None:
        # Two different keys have the same hash with a probability of 1 in 2^64.
        key_hash = keys.low * _GOLDEN_RATIO + keys.high
    in_order = device.xp.sort(key_hash)
    num_blocks = ceil_divide(in_order.size, _SLOTS_OF_BLOCK)
    counts = device.xp.empty((3, num_blocks), dtype=np.uint64)
    device.launch(
        "lattice_build",
        "count_runs",
        simplices.constants,
        num_blocks,
        keys=in_order,
        num_keys=in_order.size,
        num_blocks=num_blocks,
        counts=counts,
    )
    distinct, once, twice = device.download(counts).sum(axis=1).tolist()
    if run_length == 1:
        return float(distinct)
    unmet = once * (once - 1.0) / (2.0 * (twice + 1.0))
    num_corners = source.num_points * (simplices.num_features + 1)
    return float(min(distinct + unmet, num_corners))


_ENTRIES_OF_LANE = 4  # of a list of mean length, that a thread of `splat` adds up
# Rows of all vertices, in bytes, that stay in a GPU's nearest memory for all: more directions in a
# launch of `blur` read them more often.
_NEAR_BYTES = 1 << 24
_MAX_CASES = 64  # sizes of lattices whose vertices are remembered
_EMPTY = np.uint64(2**64 - 1)
_MAX_TABLE_BITS = 32


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table for so many vertices.

    It stays at most half full even if there are a quarter more of them.
    """
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


class _HashTable(NamedTuple):
    """The keys of all corners, each at its slot, at most half of which are used."""

    slots: Any  # (slot) number of a corner with the key, or `_EMPTY`
    ends: Any  # (block) used slots up to the end of each block of `list_vertices`
    num_vertices: int
    corner_slot: Any  # (corner)
    bits: int  # there are 2^bits slots


class Lattice(Filter):
    """Splat, blur, slice on the vertices that voxels need; see `Filter`.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        num_vertices: K.
        vertex_low, vertex_high: (vertex) packed keys in ascending order; `vertex_high` is only
            used beyond 64 bits, else None.
        corner_vertex, corner_weight: (corner, voxel) vertex of each remainder, and its barycentric
            weight in 1 / 65535.
        entry_voxel, entry_weight: (entry) the same sorted by vertex, corner and voxel, as
            splatting reads them.
        begin: (vertex + 1) where the list of entries of each vertex begins.
        before, after: (direction, vertex) neighbors, -1 = absent.
        table_bits: the hash table's capacity was 2^table_bits, at least twice the vertices.
    """

    def __init__(self, source: FeatureSource, num_vertices: float | None = None) -> None:
        """Build the lattice, with a hash table that is first made for `num_vertices`.

        None means as many as the newest lattice of so many points and fields had, or an estimate.
        The table's size changes no result. Raises CapacityError if the lattice would be too large.
        """
        self.device = source.device
        simplices = Simplices(source)
        self.num_features = simplices.num_features
        self._constants = simplices.constants
        num_corners = source.num_points * (self.num_features + 1)
        if num_corners >= 2**32:
            raise CapacityError(
                f"{source.num_points} voxels with {self.num_features + 1} vertices each are more "
                "than 2^32; use a mask"
            )
        case = (source.num_points, simplices.widths)
        if num_vertices is None:
            num_vertices = self.device.num_vertices.get(case)
        if num_vertices is None:
            num_vertices = estimated_vertices(source, simplices)
        self._find_vertices(source, simplices, table_bits_for(num_vertices))
        # The hash table and the corners' keys are freed by now, before more is allocated.
        self._list_entries()
        if len(self.device.num_vertices) >= _MAX_CASES:
            self.device.num_vertices.clear()
        self.device.num_vertices[case] = self.num_vertices
        per_voxel = self.num_vertices / source.num_points
        self.description = f"lattice ({self.num_vertices} vertices, {per_voxel:.2g} per voxel)"
        self._rows = Room(self.device.xp)

    def _launch(self, kernel: str, num_items: int, /, **arguments: Any) -> None:
        """Run a kernel of the build."""
        self.device.launch("lattice_build", kernel, self._constants, num_items, **arguments)

    def _find_vertices(self, source: FeatureSource, simplices: Simplices, table_bits: int) -> None:
        """Find the vertices of all corners, their keys and their neighbors."""
        xp = self.device.xp
        keys, self.corner_weight = simplices.find(source.features)
        table = self._fill_table(keys, table_bits)
        self.table_bits = table.bits
        self.num_vertices = table.num_vertices
        slot_vertex = self._number(keys, table)

        num_directions = self.num_features + 1
        shape = (num_directions, self.num_vertices)
        self.after = xp.empty(shape, dtype=np.int32)
        self.before = xp.full(shape, -1, dtype=np.int32)
        self.corner_vertex = xp.empty(self.corner_weight.shape, dtype=np.uint32)
        num_corners = int(self.corner_vertex.size)
        self._launch(
            "link_vertices",
            num_corners,
            vertex_low=self.vertex_low,
            vertex_high=self.vertex_high,
            num_vertices=self.num_vertices,
            key_low=keys.low,
            key_high=keys.high,
            table=table.slots,
            table_bits=table.bits,
            slot_vertex=slot_vertex,
            shift=simplices.shift,
            remainder_bits=simplices.remainder_bits,
            after=self.after,
            before=self.before,
            corner_slot=table.corner_slot,
            num_corners=num_corners,
            corner_vertex=self.corner_vertex,
        )

    def _fill_table(self, keys: VertexKeys, bits: int) -> _HashTable:
        """Put every key into a table that ends up at most half full."""
        xp = self.device.xp
        num_corners = int(keys.low.size)
        corner_slot = xp.empty(num_corners, dtype=np.uint32)
        while bits <= _MAX_TABLE_BITS:
            num_slots = 2**bits
            num_blocks = ceil_divide(num_slots, _SLOTS_OF_BLOCK)
            slots = xp.full(num_slots, _EMPTY, dtype=np.uint64)
            # Used slots of each block; the last number is not 0 if the table was too full.
            counts = xp.zeros(num_blocks + 1, dtype=np.uint64)
            self._launch(
                "insert_vertices",
                num_corners,
                key_low=keys.low,
                key_high=keys.high,
                num_corners=num_corners,
                table=slots,
                table_bits=bits,
                corner_slot=corner_slot,
                overflow=counts[num_blocks:],
            )
            self._launch(
                "count_vertices", num_blocks, table=slots, num_slots=num_slots, counts=counts
            )
            ends = xp.cumsum(counts, dtype=np.uint64)
            num_vertices, with_overflow = self.device.download(ends[-2:]).tolist()
            if with_overflow > num_vertices:
                bits += 2
            elif 2 * num_vertices <= num_slots:
                return _HashTable(slots, ends, num_vertices, corner_slot, bits)
            else:
                bits = (2 * num_vertices - 1).bit_length()
            del slots  # freed before a larger table is made
        raise CapacityError(
            "the lattice would have more than 2^31 vertices; use larger bandwidths, or a mask"
        )

    def _number(self, keys: VertexKeys, table: _HashTable) -> Any:
        """Number the vertices in the order of their keys; return the vertex of each used slot."""
        xp = self.device.xp
        num_slots = int(table.slots.size)
        num_vertices = self.num_vertices
        used_slot = xp.empty(num_vertices, dtype=np.uint32)
        used = self._empty_keys(keys)
        vertices = self._empty_keys(keys)
        self._launch(
            "list_vertices",
            ceil_divide(num_slots, _SLOTS_OF_BLOCK),
            table=table.slots,
            num_slots=num_slots,
            ends=table.ends,
            key_low=keys.low,
            key_high=keys.high,
            used_slot=used_slot,
            used_low=used.low,
            used_high=used.high,
        )

        order = xp.argsort(used.low, kind="stable")
        if used.high is not None:
            order = order[xp.argsort(used.high[order], kind="stable")]
        order = order.astype(np.int64, copy=False)
        slot_vertex = xp.empty(num_slots, dtype=np.uint32)
        self._launch(
            "number_slots",
            num_vertices,
            order=order,
            used_slot=used_slot,
            used_low=used.low,
            used_high=used.high,
            num_vertices=num_vertices,
            slot_vertex=slot_vertex,
            vertex_low=vertices.low,
            vertex_high=vertices.high,
        )
        self.vertex_low, self.vertex_high = vertices
        return slot_vertex

    def _empty_keys(self, like: VertexKeys) -> VertexKeys:
        """Return memory for the keys of all vertices, as wide as others."""
        xp = self.device.xp
        low = xp.empty(self.num_vertices, dtype=np.uint64)
        high = None
        if like.high is not None:
            high = xp.empty(self.num_vertices, dtype=np.uint64)
        return VertexKeys(low, high)

    def _list_entries(self) -> None:
        """Sort the corners by their vertices, and turn them into lists."""
        xp = self.device.xp
        num_corners = int(self.corner_vertex.size)
        num_voxels = self.corner_vertex.shape[1]
        vertex = self.corner_vertex.reshape(-1)
        order = xp.argsort(vertex, kind="stable").astype(np.int64, copy=False)
        self.entry_voxel = xp.empty(num_corners, dtype=np.uint32)
        self.entry_weight = xp.empty(num_corners, dtype=np.uint16)
        self.begin = xp.empty(self.num_vertices + 1, dtype=np.int64)
        self._launch(
            "list_entries",
            num_corners,
            order=order,
            corner_vertex=vertex,
            num_corners=num_corners,
            num_voxels=num_voxels,
            corner_weight=self.corner_weight,
            entry_voxel=self.entry_voxel,
            entry_weight=self.entry_weight,
            vertex_begin=self.begin,
        )

    def filter_until_last(
        self, group: Any, sent: Any, received: Any, channel_weight: Any
    ) -> Arguments:
        """Splat and blur; see `Filter.filter_until_last`."""
        to_slice = self._blurred(group, sent, transposed=False)
        return {**to_slice, "slice_scale": received, "slice_weight": channel_weight}

    def _add(self, group: Any, sent: Any, output: Arguments, *, transposed: bool) -> None:
        num_voxels = len(group)
        self.device.launch(
            "lattice",
            "slice_values",
            self._row_constants(group),
            num_voxels,
            num_voxels=num_voxels,
            **self._blurred(group, sent, transposed=transposed),
            **output,
        )

    def _blurred(self, group: Any, sent: Any, *, transposed: bool) -> Arguments:
        """Splat and blur; return what slicing reads, arguments of `slice_values` and `update`."""
        width = group.shape[1]
        num_vertices = self.num_vertices
        rows, blurred = self._rows.array(2, num_vertices, width)
        constants = self._row_constants(group)

        lanes = _lanes_for(self.entry_voxel.size / num_vertices)
        self.device.launch(
            "lattice",
            "splat",
            constants,
            ceil_divide(num_vertices * lanes, _THREADS),
            values=group,
            sent=sent,
            entry_voxel=self.entry_voxel,
            entry_weight=self.entry_weight,
            begin=self.begin,
            num_vertices=num_vertices,
            lanes=lanes,
            rows=rows,
        )

        num_directions = self.num_features + 1
        at_once = _directions_at_once(rows.nbytes)
        step = -1 if transposed else 1
        for number in range(0, num_directions, at_once):
            together = min(at_once, num_directions - number)
            first = num_directions - 1 - number if transposed else number
            self.device.launch(
                "lattice",
                f"blur_{together}",
                constants,
                num_vertices,
                rows=rows,
                before=self.before,
                after=self.after,
                num_vertices=num_vertices,
                first=first,
                step=step,
                next_rows=blurred,
            )
            rows, blurred = blurred, rows
        return {
            "vertex_rows": rows,
            "corner_vertex": self.corner_vertex,
            "corner_weight": self.corner_weight,
            "num_corners": num_directions,
            "amplitude": _amplitude(self.num_features),
        }

    def _row_constants(self, group: Any) -> dict[str, int]:
        return {**row_constants(group), "CRF_THREADS": _THREADS}


def _lanes_for(mean_length: float) -> int:
    """Return how many threads of `splat` share a vertex whose list has the mean length."""
    lanes = 1
    while lanes < _THREADS and lanes * _ENTRIES_OF_LANE < mean_length:
        lanes *= 2
    return lanes


def _directions_at_once(num_bytes: int) -> int:
    """Return how many directions a launch of `blur` takes, for rows of so many bytes.

    With three, it reads up to 27 rows for a vertex where three launches read 9.
    """
    return 3 if num_bytes <= _NEAR_BYTES else 2


def _amplitude(num_features: int) -> float:
    """Return the factor that gives the kernel the mass of exp(-d^2 / 2) (math.md, section 6).

    It also makes up for the blur's missing factors of 1/2, and for the unit of the weights.
    """
    mass = math.pow(4.0 * math.pi / 3.0, num_features / 2.0)
    halves = math.pow(0.5, num_features + 1)
    unit = 65535.0**2
    return math.sqrt(num_features + 1.0) * mass * halves / unit
