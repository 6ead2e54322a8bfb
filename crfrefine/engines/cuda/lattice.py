"""The permutohedral lattice on the device: keys, a hash table that grows, deterministic numbers, neighbors, and filtering with it."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.rows import Room, row_constants
from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.errors import CapacityError

COMPILED_FEATURES = (
    *range(1, 13),
    16,
    20,
    28,
)  # dimensions that the CPU's lattice is compiled for; features are padded with zeros

_SAMPLED, _MIN_SAMPLE = (
    100,
    4096,
)  # One voxel of so many is looked at for the estimate, and at least so many voxels.


class Simplices:
    """How the vertices around an image's voxels are computed, and packed into numbers, of more than 64 bits if they are `is_wide`.

    The fields of a number are q_D (highest) .. q_1, each from its smallest value, and the remainder, of `remainder_bits` (lowest);
    `shift`, (D + 1) on the device, is the lowest bit of each field. `constants` are those of the kernels in lattice_build.cu.
    """

    def __init__(self, bilateral: BilateralInput) -> None:
        size = next((size for size in COMPILED_FEATURES if size >= bilateral.num_features), None)
        if size is None:
            raise CapacityError(
                f"the lattice holds at most 28 features (axes + modalities), not {bilateral.num_features}"
            )
        self.num_features, self._padding, self._device = (
            size,
            size - bilateral.num_features,
            bilateral.voxels.device,
        )
        # Factors of the features before elevation (docs/reference/math.md, section 6.1), rounded to single precision.
        scale = [
            float(np.float32((size + 1) * math.sqrt(2.0 / 3.0) / math.sqrt((i + 1.0) * (i + 2.0))))
            for i in range(size)
        ]
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
            raise CapacityError(
                f"the lattice's cells need {total_bits}-bit numbers, and 128 is the most; use larger bandwidths"
            )
        shift = [0, *accumulate(width[:-1])]
        # Minus the smallest values, in their fields: it shifts them to zero, modulo 2^128.
        self._bias = (
            -sum(value << bits for value, bits in zip(lowest[1:], shift[1:], strict=True)) % 2**128
        )
        self.is_wide, self.remainder_bits = total_bits > 64, width[0]
        self.constants = {"CRF_FEATURES": size, "CRF_WIDE_KEYS": int(self.is_wide)}
        self.shift = self._device.upload(np.array(shift, dtype=np.int32))
        self._scale = self._device.upload(np.array(scale, dtype=np.float32))

    def find(self, features: Any) -> tuple[Any, Any, Any]:
        """Return the low words of the keys of (feature, voxel)'s vertices and the high ones, or None, and their weights."""
        xp, num_voxels = self._device.xp, features.shape[1]
        num_corners = num_voxels * (self.num_features + 1)
        low = xp.empty(num_corners, dtype=np.uint64)
        high = xp.empty(num_corners, dtype=np.uint64) if self.is_wide else None
        weight = xp.empty((self.num_features + 1, num_voxels), dtype=np.uint16)
        bias = self._bias % 2**64, self._bias >> 64
        arguments = (
            features,
            num_voxels,
            self._padding,
            self._scale,
            self.shift,
            *bias,
            low,
            high,
            weight,
        )
        self._device.launch(
            "lattice_build", "find_simplices", self.constants, num_voxels, *arguments
        )
        return low, high, weight


def estimated_vertices(bilateral: BilateralInput, simplices: Simplices) -> float:
    """Estimate how many vertices the lattice would have, from one percent of the voxels.

    Source: Chao 1984, Nonparametric estimation of the number of classes in a population.
    """
    voxels, xp = bilateral.voxels, bilateral.voxels.device.xp
    every = max(1, min(_SAMPLED, voxels.num_voxels // _MIN_SAMPLE))
    number = xp.arange(voxels.num_voxels // every, dtype=np.uint64)
    # One of `every` neighbors, as if by chance: a fixed stride would meet neighboring rows at the same places.
    place = number * np.uint64(every) + (
        number * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    ) % np.uint64(every)
    low, high, _ = simplices.find(
        xp.ascontiguousarray(bilateral.features[:, place.astype(np.int64)])
    )
    if high is not None:
        low = (
            low * np.uint64(0x9E3779B97F4A7C15) + high
        )  # of two different keys one in 2^64 is taken for the same
    _, met = xp.unique(low, return_counts=True)
    distinct = float(met.size)
    if every == 1:
        return distinct
    once, twice = map(float, voxels.device.download(xp.stack([(met == 1).sum(), (met == 2).sum()])))
    unmet = once * (once - 1.0) / (2.0 * (twice + 1.0))
    return min(distinct + unmet, float(voxels.num_voxels * (simplices.num_features + 1)))


MAX_TOGETHER = 32  # entries of a list, or sums of entries, that one thread adds up: several levels of sums are a tree
_EMPTY = np.uint64(2**64 - 1)
_MAX_TABLE_BITS = 32


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table that so many vertices fill to less than half, with room for a quarter more."""
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


def cut_lists(xp: Any, begin: Any) -> tuple[list[tuple[Any, Any]], int]:
    """Cut lists of entries into pieces of at most `MAX_TOGETHER`, whose sums are entries of further pieces, until each list has its sum.

    `begin`, (list + 1), is where each list begins; none is empty. Returns where each piece begins, (piece + 1), and the row of its sum,
    (piece), for each level; then the number of rows, the first of which are those of the lists.
    """
    levels: list[tuple[Any, Any]] = []
    length, owner_list = begin[1:] - begin[:-1], xp.arange(int(begin.size) - 1, dtype=np.int64)
    first, free = 0, len(owner_list)
    while owner_list.size:
        num_pieces = (length + (MAX_TOGETHER - 1)) // MAX_TOGETHER
        first_piece = xp.cumsum(num_pieces) - num_pieces
        total = int(num_pieces.sum())
        piece = xp.arange(total, dtype=np.int64)
        owner = xp.searchsorted(first_piece, piece, side="right") - 1
        piece_begin = xp.empty(total + 1, dtype=np.uint32)
        piece_begin[:-1] = (first + xp.cumsum(length) - length)[owner] + (
            piece - first_piece[owner]
        ) * MAX_TOGETHER
        piece_begin[-1] = first + length.sum()
        is_one_of_several = num_pieces[owner] > 1
        own_row = free - 1 + xp.cumsum(is_one_of_several.astype(np.int64))
        levels.append(
            (piece_begin, xp.where(is_one_of_several, own_row, owner_list[owner]).astype(np.uint32))
        )
        longer = xp.flatnonzero(num_pieces > 1)
        # A list in one piece goes to its own row, so the rows that were added are the pieces of the others.
        first, free = free, free + total - (len(owner_list) - len(longer))
        length, owner_list = num_pieces[longer], owner_list[longer]
    return levels, free


class Lattice(Filter):
    """Splat, blur, slice on the vertices that voxels need; see `Filter`.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        num_vertices: K.
        vertex_low, vertex_high: (vertex) packed keys in ascending order; `vertex_high` is only used beyond 64 bits, else None.
        corner_vertex, corner_weight: (corner, voxel) vertex of each remainder, and its barycentric weight in 1 / 65535.
        entry_voxel, entry_weight: (entry) the same sorted by vertex, corner and voxel, as splatting reads them.
        levels, num_rows: pieces of the vertices' lists of entries, and rows of their sums; see `cut_lists`.
        before, after: (direction, vertex) neighbors, -1 = absent.
        table_bits: the hash table's capacity was 2^table_bits, at least twice the vertices.
    """

    def __init__(self, bilateral: BilateralInput, num_vertices: float | None = None) -> None:
        """Build the lattice, whose hash table is at first for a number of vertices; None means an estimated one."""
        voxels = bilateral.voxels
        self.device, xp, num_voxels = voxels.device, voxels.device.xp, voxels.num_voxels
        simplices = Simplices(bilateral)
        dimension = self.num_features = simplices.num_features
        self._is_wide, self._constants = simplices.is_wide, simplices.constants
        num_corners = num_voxels * (dimension + 1)
        if num_corners >= 2**32:
            raise CapacityError(
                f"{num_voxels} voxels with {dimension + 1} vertices each are more than 2^32; use a mask"
            )
        bits = table_bits_for(
            estimated_vertices(bilateral, simplices) if num_vertices is None else num_vertices
        )
        key_low, key_high, self.corner_weight = simplices.find(bilateral.features)
        table, slots, corner_slot = self._fill_table(key_low, key_high, bits)
        self.num_vertices = int(slots.size)
        self.vertex_low = xp.empty(self.num_vertices, dtype=np.uint64)
        self.vertex_high: Any = (
            xp.empty(self.num_vertices, dtype=np.uint64) if self._is_wide else None
        )
        read = (
            key_low,
            key_high,
            table,
            slots,
            self.num_vertices,
            self.vertex_low,
            self.vertex_high,
        )
        self._launch("read_vertices", self.num_vertices, *read)
        slot_vertex = self._number(table, slots)
        self.after = xp.empty((dimension + 1, self.num_vertices), dtype=np.int32)
        self.before = xp.full((dimension + 1, self.num_vertices), -1, dtype=np.int32)
        own, keys = (
            (self.vertex_low, self.vertex_high, self.num_vertices),
            (key_low, key_high, table, self.table_bits),
        )
        layout = (slot_vertex, simplices.shift, simplices.remainder_bits)
        self._launch(
            "find_neighbors", self.num_vertices, *own, *keys, *layout, self.after, self.before
        )
        self.corner_vertex = xp.empty((dimension + 1, num_voxels), dtype=np.uint32)
        self._launch(
            "number_corners", num_corners, corner_slot, slot_vertex, num_corners, self.corner_vertex
        )
        del (
            table,
            slots,
            corner_slot,
            slot_vertex,
            key_low,
            key_high,
            read,
            keys,
            layout,
        )  # before more is allocated
        self._list_entries()
        self.description = f"lattice ({self.num_vertices} vertices, {self.num_vertices / num_voxels:.2g} per voxel)"
        self._rows = Room(xp)

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self.device.launch("lattice_build", kernel, self._constants, num_threads, *arguments)

    def _fill_table(self, key_low: Any, key_high: Any, bits: int) -> tuple[Any, Any, Any]:
        """Put every key into a table that ends up at most half full; return the table, its used slots, and the slot of each corner."""
        xp, num_corners = self.device.xp, int(key_low.size)
        corner_slot = xp.empty(num_corners, dtype=np.uint32)
        while bits <= _MAX_TABLE_BITS:
            table = xp.full(2**bits, _EMPTY, dtype=np.uint64)
            overflow = xp.zeros(1, dtype=np.uint64)
            self._launch(
                "insert_vertices",
                num_corners,
                key_low,
                key_high,
                num_corners,
                table,
                bits,
                corner_slot,
                overflow,
            )
            slots = None if bool(overflow[0]) else xp.flatnonzero(table != _EMPTY).astype(np.int64)
            if slots is not None and 2 * int(slots.size) <= 2**bits:
                self.table_bits = bits
                return table, slots, corner_slot
            bits = bits + 2 if slots is None else (2 * int(slots.size) - 1).bit_length()
            del table, slots  # before a larger one is made
        raise CapacityError(
            "the lattice would have more than 2^31 vertices; use larger bandwidths, or a mask"
        )

    def _number(self, table: Any, slots: Any) -> Any:
        """Number the vertices in the order of their keys, whatever their slots."""
        xp = self.device.xp
        order = xp.argsort(self.vertex_low, kind="stable")
        if self._is_wide:
            order = order[xp.argsort(self.vertex_high[order], kind="stable")]
            self.vertex_high = self.vertex_high[order]
        self.vertex_low = self.vertex_low[order]
        slot_vertex = xp.empty(table.size, dtype=np.uint32)
        self._launch(
            "number_slots",
            self.num_vertices,
            order.astype(np.int64),
            slots,
            self.num_vertices,
            slot_vertex,
        )
        return slot_vertex

    def _list_entries(self) -> None:
        """Sort the corners by their vertices, and turn them into lists."""
        xp, num_corners, num_voxels = (
            self.device.xp,
            int(self.corner_vertex.size),
            self.corner_vertex.shape[1],
        )
        vertex = self.corner_vertex.reshape(-1)
        order = xp.argsort(vertex, kind="stable").astype(np.int64, copy=False)
        self.entry_voxel, self.entry_weight = (
            xp.empty(num_corners, dtype=np.uint32),
            xp.empty(num_corners, dtype=np.uint16),
        )
        begin = xp.empty(self.num_vertices + 1, dtype=np.int64)
        arguments = (
            order,
            vertex,
            num_corners,
            num_voxels,
            self.corner_weight,
            self.entry_voxel,
            self.entry_weight,
            begin,
        )
        self._launch("list_entries", num_corners, *arguments)
        self.levels, self.num_rows = cut_lists(xp, begin)

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        (num_voxels, width), d, num_vertices = group.shape, self.num_features, self.num_vertices
        directions = range(d + 1)
        launch = partial(self.device.launch, "lattice")
        constants = row_constants(group)

        both = self._rows.array(self.num_rows + num_vertices, width)
        rows, other = both[: self.num_rows], both[self.num_rows :]
        (begin, row), *levels = self.levels
        launch(
            "splat",
            constants,
            len(row),
            group,
            sent,
            self.entry_voxel,
            self.entry_weight,
            begin,
            row,
            len(row),
            rows,
        )
        for begin, row in levels:
            launch("sum_pieces", constants, len(row), begin, row, len(row), rows)
        for j in reversed(directions) if transposed else directions:
            launch(
                "blur",
                constants,
                num_vertices,
                rows,
                self.before[j],
                self.after[j],
                num_vertices,
                other,
            )
            rows, other = other, rows
        # It gives the kernel the mass of exp(-d^2 / 2), with the blur's halves and the weights' unit (math.md, section 6).
        amplitude = (
            math.sqrt(d + 1.0)
            * math.pow(4.0 * math.pi / 3.0, d / 2.0)
            * math.pow(0.5, d + 1)
            / 65535.0**2
        )
        launch(
            "slice_values",
            constants,
            num_voxels,
            rows,
            self.corner_vertex,
            self.corner_weight,
            d + 1,
            num_voxels,
            amplitude,
            *to,
        )
