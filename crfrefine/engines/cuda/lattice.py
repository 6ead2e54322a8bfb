"""The permutohedral lattice on the device: keys, a hash table that grows, deterministic numbers, neighbors, and filtering with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import Device, Room, check_memory, precision, row_constants
from crfrefine.engines.cuda.keys import Simplices, estimated_vertices
from crfrefine.engines.cuda.lists import SEGMENT, SPLAT_THREADS, VertexLists, group_size
from crfrefine.engines.cuda.memory import lattice_bytes, table_bits_for, table_bytes, vertex_bytes
from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.errors import CapacityError

_EMPTY = np.uint64(2**64 - 1)
_MOST_TABLE_BITS = 32
_FEW_VERTICES = 1 << 16  # their numbers have 16 bits: half as many passes of a radix sort
_ROWS = "the values at the lattice's vertices"


class Lattice:
    """The vertices that voxels need, and the weights between voxels and vertices.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        num_vertices: K.
        vertex_low, vertex_high: (vertex) packed keys in ascending order; `vertex_high` is None if 64 bits are enough.
        corner_vertex, corner_weight: (corner, voxel) vertex of each remainder, and its barycentric weight in 1 / 65535.
        lists: the same sorted by vertex, as splatting reads them.
        before, after: (direction, vertex) neighbors, -1 = absent.
        table_bits: the hash table's capacity was 2^table_bits, at least twice the vertices.
    """

    def __init__(self, bilateral: BilateralInput, *, first_table_bits: int | None = None) -> None:
        """Build the lattice.

        Args:
            bilateral: the features, float32.
            first_table_bits: capacity to start from; None: for as many vertices as are estimated.

        Raises:
            CapacityError: too many features, cells or vertices, or too little memory.
        """
        voxels = bilateral.voxels
        self.device: Device = voxels.device
        num_voxels = voxels.num_voxels
        simplices = Simplices(bilateral)
        dimension = self.num_features = simplices.num_features
        self.layout, self._is_wide, self._constants = simplices.layout, simplices.is_wide, simplices.constants
        num_corners = num_voxels * (dimension + 1)
        if num_corners >= 2**32:
            raise CapacityError(f"{num_voxels} voxels with {dimension + 1} vertices each are more than 2^32; use a mask")
        check_memory(self.device, lattice_bytes(num_voxels, dimension, np.float32, is_wide=self._is_wide), "the lattice")
        xp = self.device.xp
        bits = table_bits_for(estimated_vertices(bilateral, simplices)) if first_table_bits is None else first_table_bits
        key_low, key_high, self.corner_weight = simplices.find(bilateral.features)
        table, slots, corner_slot = self._fill_table(key_low, key_high, bits)
        self.num_vertices = int(slots.size)
        segment = SEGMENT[group_size(num_corners, self.num_vertices)]
        needed = vertex_bytes(self.num_vertices, num_corners, dimension, self.table_bits, segment)
        check_memory(self.device, needed, f"the lattice's {self.num_vertices} vertices")
        self.vertex_low = xp.empty(self.num_vertices, dtype=np.uint64)
        self.vertex_high: Any = xp.empty(self.num_vertices, dtype=np.uint64) if self._is_wide else None
        self._launch(
            "read_vertices", self.num_vertices, key_low, key_high, table, slots, self.num_vertices, self.vertex_low, self.vertex_high
        )
        slot_vertex = self._number(table, slots)
        self.after = xp.empty((dimension + 1, self.num_vertices), dtype=np.int32)
        self.before = xp.full((dimension + 1, self.num_vertices), -1, dtype=np.int32)
        self._launch(
            "find_neighbors",
            self.num_vertices,
            self.vertex_low,
            self.vertex_high,
            self.num_vertices,
            key_low,
            key_high,
            table,
            self.table_bits,
            slot_vertex,
            simplices.shift,
            self.layout.remainder_bits,
            self.after,
            self.before,
        )
        self.corner_vertex = xp.empty((dimension + 1, num_voxels), dtype=np.uint32)
        self._launch("number_corners", num_corners, corner_slot, slot_vertex, num_corners, self.corner_vertex)
        del table, slots, corner_slot, slot_vertex, key_low, key_high
        self.lists = self._list_entries()

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self.device.launch("lattice_build", kernel, self._constants, num_threads, *arguments)

    def _fill_table(self, key_low: Any, key_high: Any, bits: int) -> tuple[Any, Any, Any]:
        """Put every key into a table that ends up at most half full; return the table, its used slots, and the slot of each corner."""
        xp = self.device.xp
        num_corners = int(key_low.size)
        corner_slot = xp.empty(num_corners, dtype=np.uint32)
        while True:
            if bits > _MOST_TABLE_BITS:
                raise CapacityError("the lattice would have more than 2^31 vertices; use larger bandwidths, or a mask")
            check_memory(self.device, table_bytes(bits), "the lattice's hash table")
            table = xp.full(2**bits, _EMPTY, dtype=np.uint64)
            overflow = xp.zeros(1, dtype=np.uint64)
            self._launch("insert_vertices", num_corners, key_low, key_high, num_corners, table, bits, corner_slot, overflow)
            if bool(overflow[0]):
                del table  # before a larger one is made
                bits += 2
                continue
            slots = xp.flatnonzero(table != _EMPTY).astype(np.int64)
            if 2 * int(slots.size) <= 2**bits:
                self.table_bits = bits
                return table, slots, corner_slot
            bits = (2 * int(slots.size) - 1).bit_length()
            del table, slots

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

    def _list_entries(self) -> VertexLists:
        """Sort the corners by their vertices, in as few bits as those have, and turn them into lists."""
        xp, num_corners, num_voxels = self.device.xp, int(self.corner_vertex.size), self.corner_vertex.shape[1]
        vertex = self.corner_vertex.reshape(-1)
        order = xp.argsort(vertex.astype(np.uint16 if self.num_vertices <= _FEW_VERTICES else np.uint32, copy=False), kind="stable")
        order = order.astype(np.int64, copy=False)
        voxel, weight = xp.empty(num_corners, dtype=np.uint32), xp.empty(num_corners, dtype=np.uint16)
        begin = xp.empty(self.num_vertices + 1, dtype=np.int64)
        arguments = (order, vertex, num_corners, num_voxels, self.corner_weight, voxel, weight, begin)
        self._launch("list_entries", num_corners, *arguments)
        return VertexLists(xp, voxel, weight, begin)

    def amplitude(self) -> float:
        """Factor that gives the kernel the mass of exp(-d^2 / 2), with the blur's halves and the weights' unit (math.md, section 6)."""
        d = self.num_features
        return math.sqrt(d + 1.0) * math.pow(4.0 * math.pi / 3.0, d / 2.0) * math.pow(0.5, d + 1) / 65535.0**2


class LatticeFilter:
    """Splat, blur, slice; see `Filter`."""

    def __init__(self, bilateral: BilateralInput, num_vertices: float | None = None) -> None:
        """Build the lattice.

        Args:
            bilateral: the features.
            num_vertices: an estimate; None: to be made.
        """
        self.lattice = Lattice(bilateral.single(), first_table_bits=None if num_vertices is None else table_bits_for(num_vertices))
        num_voxels = bilateral.voxels.num_voxels
        self.description = f"lattice ({self.lattice.num_vertices} vertices, {self.lattice.num_vertices / num_voxels:.2g} per voxel)"
        self._rows = Room(bilateral.voxels.device, _ROWS)
        self._sent: Any = None  # the factors in self._weights
        self._weights: Any = None
        self._half_factor: float | None = None

    def keep_half(self, sent: Any) -> None:
        """From now on keep the values at the vertices in 16 bits, for values from 0 to 1 that are always sent with these factors.

        The values are multiplied by a power of two: the largest sum at a vertex is between 2^14 and 2^15 then, and what gets lost below
        2^-24 is less than 1e-11 of it.

        Args:
            sent: (voxel) factors, or None for ones.
        """
        device, lattice = self.lattice.device, self.lattice
        rows, _ = self.splat(device.xp.ones((lattice.corner_vertex.shape[1], 1), dtype=np.float32), sent)
        largest = float(rows[: lattice.num_vertices].max())
        self._half_factor = math.ldexp(1.0, 15 - math.frexp(largest)[1])
        self._rows, self._sent, self._weights = Room(device, _ROWS), None, None

    @property
    def constants(self) -> dict[str, int]:
        """Return what kernels that take values at the vertices are compiled with."""
        return {} if self._half_factor is None else {"CRF_HALF": 1}

    def _weighed(self, sent: Any) -> Any:
        """Return the weights of the entries times the factors of their voxels, which are those of the normalization in every step."""
        if self._weights is None or self._sent is not sent:
            device, lists, factors = self.lattice.device, self.lattice.lists, self._factors(sent)
            num_entries = int(lists.entry_voxel.size)
            weights, self._weights = self._weights, None
            if weights is None or weights.dtype != factors.dtype:
                check_memory(device, float(factors.dtype.itemsize) * num_entries, "the weights of the lattice's entries")
                weights = device.xp.empty(num_entries, dtype=factors.dtype)
            constants = {"CRF_WIDTH": 1, **precision(factors.dtype)}
            arguments = (factors, lists.entry_voxel, lists.entry_weight, num_entries, weights)
            device.launch("lattice", "weigh_entries", constants, num_entries, *arguments)
            self._weights, self._sent = weights, sent  # not before they are there
        return self._weights

    def _factors(self, sent: Any) -> Any:
        """Return the factors of the voxels, with that of half precision."""
        if self._half_factor is None:
            return sent
        if sent is None:
            return self.lattice.device.xp.full(self.lattice.corner_vertex.shape[1], self._half_factor, dtype=np.float32)
        return sent * np.float32(self._half_factor)

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        device, num_voxels = self.lattice.device, values.shape[1]
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            *corners, amplitude = self.to_vertices(group, sent, transposed=transposed)
            arguments = (*corners, num_voxels, amplitude, received, weight, out, int(adds))
            device.launch("lattice", "slice_values", {**row_constants(values), **self.constants}, num_voxels, *arguments)

    def to_vertices(self, group: Any, sent: Any, *, transposed: bool = False) -> tuple[Any, Any, Any, int, float]:
        """Splat and blur one group of channels.

        Args:
            group: (voxel, width).
            sent: (voxel) factors, or None for ones.
            transposed: see `Filter.accumulate`.

        Returns:
            What a kernel needs in order to slice: the values at the vertices, which the next call overwrites; vertex and weight of each
            corner; their number per voxel; and the factor of what it interpolates.
        """
        lattice = self.lattice
        device, num_vertices = lattice.device, lattice.num_vertices
        rows, other = self.splat(group, sent)
        directions = range(lattice.num_features + 1)
        for j in reversed(directions) if transposed else directions:
            arguments = (rows, lattice.before[j], lattice.after[j], num_vertices, other)
            device.launch("lattice", "blur", {**row_constants(group), **self.constants}, num_vertices, *arguments)
            rows, other = other, rows
        amplitude = lattice.amplitude()
        if self._half_factor is not None:
            amplitude *= math.ldexp(1.0, len(directions)) / self._half_factor  # each blur halves
        return rows, lattice.corner_vertex, lattice.corner_weight, lattice.num_features + 1, amplitude

    def splat(self, group: Any, sent: Any) -> tuple[Any, Any]:
        """Add up the values at each vertex; return them, and room for as many. Arguments as in `to_vertices`."""
        device, lists, num_vertices = self.lattice.device, self.lattice.lists, self.lattice.num_vertices
        constants = {**row_constants(group), **self.constants}
        dtype = group.dtype if self._half_factor is None else np.dtype(np.float16)
        both = self._rows.array((lists.num_rows + num_vertices, group.shape[1]), dtype)
        rows, other = both[: lists.num_rows], both[lists.num_rows :]
        is_plain = sent is None and self._half_factor is None
        kernel, weights = ("splat", lists.entry_weight) if is_plain else ("splat_weighed", self._weighed(sent))
        arguments = (group, lists.entry_voxel, weights, lists.segments.begin, lists.segments.row, len(lists.segments), rows)
        if lists.group == 1:
            device.launch("lattice", f"{kernel}_alone", constants, len(lists.segments), *arguments)
        else:
            grouped = {**constants, "CRF_THREADS": SPLAT_THREADS, "CRF_GROUP": lists.group}
            device.launch_blocks("splat", kernel, grouped, -(-len(lists.segments) // (SPLAT_THREADS // lists.group)), *arguments)
        for pieces in lists.levels:
            device.launch("lattice", "sum_pieces", constants, len(pieces), pieces.begin, pieces.row, len(pieces), rows)
        return rows, other
