"""The permutohedral lattice on the device.

Its vertices are packed into keys, found by a hash table that grows, and numbered in the order of
their keys, so that every run has the same bits; then values are splatted, blurred and sliced.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.engines.cuda.filters import FeatureSource, Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import Room, ceil_divide
from crfrefine.engines.cuda.simplices import (
    SLOTS_OF_BLOCK,
    THREADS,
    Simplices,
    estimated_vertices,
    words,
)
from crfrefine.errors import CapacityError

_ENTRIES_OF_LANE = 4  # of a list of mean length, that a thread of `splat` adds up
# Rows of all vertices, in bytes, that stay in a GPU's nearest memory for all: more directions in a
# launch of `blur` read them more often.
_NEAR_BYTES = 1 << 24
_EMPTY = np.uint64(2**64 - 1)
_MAX_TABLE_BITS = 32


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table for so many vertices.

    It stays at most half full even if there are a quarter more of them.
    """
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


class VertexTable:
    """The hash table of the keys of all corners, each at its slot.

    Attributes:
        bits: there are 2^bits slots, at most half of which are used.
        slots: (slot) number of a corner with the key, or `_EMPTY`.
        corner_slot: (corner) the slot of its key.
        num_vertices: the number of different keys.
        vertices: (word, vertex) the keys in ascending order, which numbers the vertices.
        slot_vertex: (slot) the vertex of each used slot.
    """

    def __init__(self, simplices: Simplices, keys: Any, bits: int) -> None:
        """Put every key into a table of 2^bits slots, or of more if these are too few.

        Then number the vertices. Raises CapacityError if there are too many.
        """
        xp = simplices.device.xp
        num_corners = keys.shape[1]
        self.corner_slot = xp.empty(num_corners, dtype=np.uint32)
        self.slots: Any = None
        while True:
            if bits > _MAX_TABLE_BITS:
                raise CapacityError(
                    "the lattice would have more than 2^31 vertices; use larger bandwidths, or a "
                    "mask"
                )
            num_slots = 2**bits
            num_blocks = ceil_divide(num_slots, SLOTS_OF_BLOCK)
            self.slots = xp.full(num_slots, _EMPTY, dtype=np.uint64)
            # Used slots of each block; the last number is not 0 if the table was too full.
            counts = xp.zeros(num_blocks + 1, dtype=np.uint64)
            simplices.launch(
                "insert_vertices",
                num_corners,
                **words("key", keys),
                num_corners=num_corners,
                table=self.slots,
                table_bits=bits,
                corner_slot=self.corner_slot,
                overflow=counts[num_blocks:],
            )
            simplices.launch(
                "count_vertices", num_blocks, table=self.slots, num_slots=num_slots, counts=counts
            )
            ends = xp.cumsum(counts, dtype=np.uint64)
            num_vertices, with_overflow = simplices.device.download(ends[-2:]).tolist()
            if with_overflow > num_vertices:
                bits += 2
            elif 2 * num_vertices <= num_slots:
                break
            else:
                bits = (2 * num_vertices - 1).bit_length()
            self.slots = None  # freed before a larger table is made
        self.bits = bits
        self.num_vertices: int = num_vertices

        used_slot = xp.empty(num_vertices, dtype=np.uint32)
        used = xp.empty((len(keys), num_vertices), dtype=np.uint64)
        self.vertices = xp.empty_like(used)
        simplices.launch(
            "list_vertices",
            num_blocks,
            table=self.slots,
            num_slots=num_slots,
            ends=ends,
            **words("key", keys),
            used_slot=used_slot,
            **words("used", used),
        )

        order = xp.argsort(used[0], kind="stable")
        if len(used) > 1:
            order = order[xp.argsort(used[1][order], kind="stable")]
        order = order.astype(np.int64, copy=False)
        self.slot_vertex = xp.empty(num_slots, dtype=np.uint32)
        simplices.launch(
            "number_slots",
            num_vertices,
            order=order,
            used_slot=used_slot,
            **words("used", used),
            num_vertices=num_vertices,
            slot_vertex=self.slot_vertex,
            **words("vertex", self.vertices),
        )


class Lattice(Filter):
    """Splat, blur, slice on the vertices that voxels need; see `Filter`.

    Attributes:
        num_features: D of the lattice, at least that of the image.
        num_vertices: K.
        vertices: (word, vertex) keys in ascending order.
        corner_vertex, corner_weight: (corner, voxel) vertex of each remainder, and its barycentric
            weight in 1 / 65535.
        entry_voxel, entry_weight: (entry) the same sorted by vertex, corner and voxel, as
            splatting reads them.
        begin: (vertex + 1) where the list of entries of each vertex begins.
        before, after: (direction, vertex) neighbors, -1 = absent.
    """

    def __init__(self, source: FeatureSource) -> None:
        """Build the lattice; raise CapacityError if it would be too large.

        Its hash table is first made for as many vertices as the newest lattice of so many points
        and fields had, or an estimate. The table's size changes no result.
        """
        super().__init__(source.device)
        simplices = Simplices(source)
        self.num_features = simplices.num_features
        num_corners = source.num_points * (self.num_features + 1)
        if num_corners >= 2**32:
            raise CapacityError(
                f"{source.num_points} voxels with {self.num_features + 1} vertices each are more "
                "than 2^32; use a mask"
            )
        expected = self.device.num_vertices.get(simplices.case)
        if expected is None:
            expected = estimated_vertices(source, simplices)
        self._find_vertices(source, simplices, table_bits_for(expected))
        # The hash table and the corners' keys are freed by now, before more is allocated.
        self._list_entries(simplices)
        self.device.remember_vertices(simplices.case, self.num_vertices)
        per_voxel = self.num_vertices / source.num_points
        self.description = f"lattice ({self.num_vertices} vertices, {per_voxel:.2g} per voxel)"
        # What slicing reads: arguments of `slice_values` and `update`.
        self._corners: Arguments = {
            "corner_vertex": self.corner_vertex,
            "corner_weight": self.corner_weight,
            "num_corners": self.num_features + 1,
            "amplitude": simplices.amplitude,
        }
        self._rows = Room(self.device.xp)
        # Threads of `splat` that share a vertex, whose list has so many entries on average.
        mean_length = self.entry_voxel.size / self.num_vertices
        self._lanes = 1
        while self._lanes < THREADS and self._lanes * _ENTRIES_OF_LANE < mean_length:
            self._lanes *= 2

    def _find_vertices(self, source: FeatureSource, simplices: Simplices, table_bits: int) -> None:
        """Find the vertices of all corners, their keys and their neighbors."""
        xp = self.device.xp
        keys, self.corner_weight = simplices.find(source.features)
        table = VertexTable(simplices, keys, table_bits)
        self.num_vertices = table.num_vertices
        self.vertices = table.vertices

        shape = (self.num_features + 1, self.num_vertices)
        self.after = xp.empty(shape, dtype=np.int32)
        self.before = xp.full(shape, -1, dtype=np.int32)
        self.corner_vertex = xp.empty(self.corner_weight.shape, dtype=np.uint32)
        num_corners = self.corner_vertex.size
        simplices.launch(
            "link_vertices",
            num_corners,
            **words("vertex", self.vertices),
            num_vertices=self.num_vertices,
            **words("key", keys),
            table=table.slots,
            table_bits=table.bits,
            slot_vertex=table.slot_vertex,
            shift=simplices.shift,
            remainder_bits=simplices.widths[0],
            after=self.after,
            before=self.before,
            corner_slot=table.corner_slot,
            num_corners=num_corners,
            corner_vertex=self.corner_vertex,
        )

    def _list_entries(self, simplices: Simplices) -> None:
        """Sort the corners by their vertices, and turn them into lists."""
        xp = self.device.xp
        num_corners = self.corner_vertex.size
        vertex = self.corner_vertex.reshape(-1)
        order = xp.argsort(vertex, kind="stable").astype(np.int64, copy=False)
        self.entry_voxel = xp.empty(num_corners, dtype=np.uint32)
        self.entry_weight = xp.empty(num_corners, dtype=np.uint16)
        self.begin = xp.empty(self.num_vertices + 1, dtype=np.int64)
        simplices.launch(
            "list_entries",
            num_corners,
            order=order,
            corner_vertex=vertex,
            num_corners=num_corners,
            num_voxels=self.corner_vertex.shape[1],
            corner_weight=self.corner_weight,
            entry_voxel=self.entry_voxel,
            entry_weight=self.entry_weight,
            vertex_begin=self.begin,
        )

    def filter_until_last(self, group: Any, channel_weight: Any) -> Arguments:
        """Splat and blur; see `Filter.filter_until_last`."""
        to_slice = self._blurred(group, self.sent_scale, transposed=False)
        return {**to_slice, "slice_scale": self.scale, "slice_weight": channel_weight}

    def filter_group(
        self, group: Any, sent: Any, output: Arguments, *, transposed: bool = False
    ) -> None:
        """Splat, blur and slice."""
        num_voxels = len(group)
        self.device.launch(
            "lattice",
            "slice_values",
            {"CRF_WIDTH": group.shape[1], "CRF_THREADS": THREADS},
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
        constants = {"CRF_WIDTH": width, "CRF_THREADS": THREADS}

        self.device.launch(
            "lattice",
            "splat",
            constants,
            ceil_divide(num_vertices * self._lanes, THREADS),
            values=group,
            sent=sent,
            entry_voxel=self.entry_voxel,
            entry_weight=self.entry_weight,
            begin=self.begin,
            num_vertices=num_vertices,
            lanes=self._lanes,
            rows=rows,
        )

        num_directions = self.num_features + 1
        # With three directions, a launch reads up to 27 rows for a vertex where three launches read
        # 9.
        at_once = 3 if rows.nbytes <= _NEAR_BYTES else 2
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
        return {"vertex_rows": rows, **self._corners}
