"""The permutohedral lattice on the device: keys, a hash table that grows, deterministic numbers, neighbors, and filtering with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.keys import Simplices, estimated_vertices
from crfrefine.engines.cuda.rows import Room, row_constants
from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.errors import CapacityError

MAX_TOGETHER = 32  # entries of a list, or sums of entries, that one thread adds up: several levels of sums are a tree
_EMPTY = np.uint64(2**64 - 1)
_MAX_TABLE_BITS = 32


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table that so many vertices fill to less than half, with room for a quarter more."""
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


def cut_lists(xp: Any, begin: Any) -> tuple[list[tuple[Any, Any]], int]:
    """Cut lists of entries into pieces of at most `MAX_TOGETHER`, whose sums are entries of further pieces, until each list has its sum.

    Args:
        xp: the device's array module.
        begin: (list + 1) where each list begins; none is empty.

    Returns:
        Pieces of the entries, then of the rows of their sums, one level after the other: (piece + 1) where each begins, and (piece) the
        row of its sum, which is that of the list if it is in one piece, else a separate one. And the number of rows.
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
        piece_begin[:-1] = (first + xp.cumsum(length) - length)[owner] + (piece - first_piece[owner]) * MAX_TOGETHER
        piece_begin[-1] = first + length.sum()
        is_one_of_several = num_pieces[owner] > 1
        own_row = free - 1 + xp.cumsum(is_one_of_several.astype(np.int64))
        levels.append((piece_begin, xp.where(is_one_of_several, own_row, owner_list[owner]).astype(np.uint32)))
        longer = xp.flatnonzero(num_pieces > 1)
        # A list in one piece goes to its own row, so the rows that were added are the pieces of the others.
        first, free = free, free + total - (len(owner_list) - len(longer))
        length, owner_list = num_pieces[longer], owner_list[longer]
    return levels, free


class Lattice:
    """The vertices that voxels need, and the weights between voxels and vertices.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        num_vertices: K.
        vertex_low, vertex_high: (vertex) packed keys in ascending order; `vertex_high` is only used beyond 64 bits, else None.
        corner_vertex, corner_weight: (corner, voxel) vertex of each remainder, and its barycentric weight in 1 / 65535.
        entry_voxel, entry_weight: (entry) the same sorted by vertex, corner and voxel, as splatting reads them.
        levels, num_rows: pieces of the vertices' lists of entries, and rows of their sums, those of the vertices first; see `cut_lists`.
        before, after: (direction, vertex) neighbors, -1 = absent.
        table_bits: the hash table's capacity was 2^table_bits, at least twice the vertices.
    """

    def __init__(self, bilateral: BilateralInput, num_vertices: float | None = None) -> None:
        """Build the lattice, whose hash table is at first for an estimated number of vertices; None means that it is estimated here.

        Raises:
            CapacityError: too many features, cells or vertices.
        """
        voxels = bilateral.voxels
        self.device, xp, num_voxels = voxels.device, voxels.device.xp, voxels.num_voxels
        simplices = Simplices(bilateral)
        dimension = self.num_features = simplices.num_features
        self._is_wide, self._constants = simplices.is_wide, simplices.constants
        num_corners = num_voxels * (dimension + 1)
        if num_corners >= 2**32:
            raise CapacityError(f"{num_voxels} voxels with {dimension + 1} vertices each are more than 2^32; use a mask")
        bits = table_bits_for(estimated_vertices(bilateral, simplices) if num_vertices is None else num_vertices)
        key_low, key_high, self.corner_weight = simplices.find(bilateral.features)
        table, slots, corner_slot = self._fill_table(key_low, key_high, bits)
        self.num_vertices = int(slots.size)
        self.vertex_low = xp.empty(self.num_vertices, dtype=np.uint64)
        self.vertex_high: Any = xp.empty(self.num_vertices, dtype=np.uint64) if self._is_wide else None
        read = (key_low, key_high, table, slots, self.num_vertices, self.vertex_low, self.vertex_high)
        self._launch("read_vertices", self.num_vertices, *read)
        slot_vertex = self._number(table, slots)
        self.after = xp.empty((dimension + 1, self.num_vertices), dtype=np.int32)
        self.before = xp.full((dimension + 1, self.num_vertices), -1, dtype=np.int32)
        own, keys = (self.vertex_low, self.vertex_high, self.num_vertices), (key_low, key_high, table, self.table_bits)
        layout = (slot_vertex, simplices.shift, simplices.remainder_bits)
        self._launch("find_neighbors", self.num_vertices, *own, *keys, *layout, self.after, self.before)
        self.corner_vertex = xp.empty((dimension + 1, num_voxels), dtype=np.uint32)
        self._launch("number_corners", num_corners, corner_slot, slot_vertex, num_corners, self.corner_vertex)
        del table, slots, corner_slot, slot_vertex, key_low, key_high, read, keys, layout  # before more is allocated
        self._list_entries()

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self.device.launch("lattice_build", kernel, self._constants, num_threads, *arguments)

    def _fill_table(self, key_low: Any, key_high: Any, bits: int) -> tuple[Any, Any, Any]:
        """Put every key into a table that ends up at most half full; return the table, its used slots, and the slot of each corner."""
        xp, num_corners = self.device.xp, int(key_low.size)
        corner_slot = xp.empty(num_corners, dtype=np.uint32)
        while bits <= _MAX_TABLE_BITS:
            table = xp.full(2**bits, _EMPTY, dtype=np.uint64)
            overflow = xp.zeros(1, dtype=np.uint64)
            self._launch("insert_vertices", num_corners, key_low, key_high, num_corners, table, bits, corner_slot, overflow)
            slots = None if bool(overflow[0]) else xp.flatnonzero(table != _EMPTY).astype(np.int64)
            if slots is not None and 2 * int(slots.size) <= 2**bits:
                self.table_bits = bits
                return table, slots, corner_slot
            bits = bits + 2 if slots is None else (2 * int(slots.size) - 1).bit_length()
            del table, slots  # before a larger one is made
        raise CapacityError("the lattice would have more than 2^31 vertices; use larger bandwidths, or a mask")

    def _number(self, table: Any, slots: Any) -> Any:
        """Number the vertices in the order of their keys, whatever their slots."""
        xp = self.device.xp
        order = xp.argsort(self.vertex_low, kind="stable")
        if self._is_wide:
            order = order[xp.argsort(self.vertex_high[order], kind="stable")]
            self.vertex_high = self.vertex_high[order]
        self.vertex_low = self.vertex_low[order]
        slot_vertex = xp.empty(table.size, dtype=np.uint32)
        self._launch("number_slots", self.num_vertices, order.astype(np.int64), slots, self.num_vertices, slot_vertex)
        return slot_vertex

    def _list_entries(self) -> None:
        """Sort the corners by their vertices, and turn them into lists."""
        xp, num_corners, num_voxels = self.device.xp, int(self.corner_vertex.size), self.corner_vertex.shape[1]
        vertex = self.corner_vertex.reshape(-1)
        order = xp.argsort(vertex, kind="stable").astype(np.int64, copy=False)
        self.entry_voxel, self.entry_weight = xp.empty(num_corners, dtype=np.uint32), xp.empty(num_corners, dtype=np.uint16)
        begin = xp.empty(self.num_vertices + 1, dtype=np.int64)
        arguments = (order, vertex, num_corners, num_voxels, self.corner_weight, self.entry_voxel, self.entry_weight, begin)
        self._launch("list_entries", num_corners, *arguments)
        self.levels, self.num_rows = cut_lists(xp, begin)

    def amplitude(self) -> float:
        """Factor that gives the kernel the mass of exp(-d^2 / 2), with the blur's halves and the weights' unit (math.md, section 6)."""
        d = self.num_features
        return math.sqrt(d + 1.0) * math.pow(4.0 * math.pi / 3.0, d / 2.0) * math.pow(0.5, d + 1) / 65535.0**2


class LatticeFilter(Filter):
    """Splat, blur, slice; see `Filter`."""

    def __init__(self, bilateral: BilateralInput, num_vertices: float | None = None) -> None:
        """Build the lattice."""
        self.lattice = Lattice(bilateral, num_vertices)
        density = self.lattice.num_vertices / bilateral.voxels.num_voxels
        self.description = f"lattice ({self.lattice.num_vertices} vertices, {density:.2g} per voxel)"
        self._rows = Room(bilateral.voxels.device.xp)

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        lattice, (num_voxels, width) = self.lattice, group.shape
        constants, directions, num_vertices = row_constants(group), range(lattice.num_features + 1), lattice.num_vertices

        def launch(kernel: str, num_threads: int, *arguments: Any) -> None:
            lattice.device.launch("lattice", kernel, constants, num_threads, *arguments)

        both = self._rows.array(lattice.num_rows + num_vertices, width)
        rows, other = both[: lattice.num_rows], both[lattice.num_rows :]
        (begin, row), *levels = lattice.levels
        launch("splat", len(row), group, sent, lattice.entry_voxel, lattice.entry_weight, begin, row, len(row), rows)
        for begin, row in levels:
            launch("sum_pieces", len(row), begin, row, len(row), rows)
        for j in reversed(directions) if transposed else directions:
            launch("blur", num_vertices, rows, lattice.before[j], lattice.after[j], num_vertices, other)
            rows, other = other, rows
        corners = (lattice.corner_vertex, lattice.corner_weight, len(directions), num_voxels)
        launch("slice_values", num_voxels, rows, *corners, lattice.amplitude(), *to)
