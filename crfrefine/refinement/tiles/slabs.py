"""Slabs of planes for volumes whose tiles do not fit into the memory that a run may take.

Each slab has as many planes around it as messages can cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.memory import format_size
from crfrefine.errors import CapacityError
from crfrefine.refinement.tiles.grid import TILE

if TYPE_CHECKING:
    from crfrefine.refinement.tiles.label_sets import LabelSets
    from crfrefine.refinement.tiles.problem import TileProblem

BYTES_PER_ENTRY = 5 * 4 + 1
"""Per voxel of an entry: logits, marginals, their changes, messages or refined logits, and messages of settled rows; the mask."""

BYTES_OF_RESULT = 4
"""Per voxel of an entry of the whole volume, where it runs in slabs: the refined logits."""

BYTES_OF_FILTERS, BYTES_OF_MODALITY = 160, 40
"""Per voxel around active tiles, and for each modality after the first, where whole-volume filters are used:
values of four channels on their way, padded copies, normalization, and the lattice of a usual image.
See docs/reference/math.md for the measurements."""


@dataclass(frozen=True)
class Slab:
    """Planes of a volume."""

    start: int  # the first plane
    stop: int  # the end of the planes
    first: int  # the first plane that takes part in the computation
    last: int  # the end of those

    @property
    def extent(self) -> int:
        """Planes that take part."""
        return self.last - self.first


def halo_planes(num_iterations: int, reach: int) -> int:
    """Return the number of planes on each side that the result of a plane can depend on, a multiple of TILE[0].

    In each step messages come from within the reach, and their normalization from within the reach of those who send.
    """
    return math.ceil((num_iterations + 1) * reach / TILE[0]) * TILE[0]


def cuts(num_planes: int, halo: int) -> Iterator[list[Slab]]:
    """Yield the ways to cut a volume into slabs of equal height, whose last one may be lower; the fewest slabs come first."""
    rows = math.ceil(num_planes / TILE[0])
    for count in range(1, rows + 1):
        height = math.ceil(rows / count) * TILE[0]
        starts = range(0, num_planes, height)
        yield [Slab(s, min(s + height, num_planes), max(0, s - halo), min(s + height + halo, num_planes)) for s in starts]


def slab_bytes(problem: TileProblem, sets: LabelSets, slab: Slab, *, is_direct: bool) -> int:
    """Return an estimate of the memory of a run on a slab."""
    rows = slice(slab.first // TILE[0], -(-slab.last // TILE[0]))
    voxels = slab.extent * problem.grid.shape[1] * problem.grid.shape[2]
    entries = int(sets.num_labels_of[rows][sets.active[rows]].sum())
    image = 0 if problem.maps is None else 4 * len(problem.image.values) * voxels
    total = image + entries * math.prod(TILE) * BYTES_PER_ENTRY
    if is_direct:
        near = int(np.count_nonzero(sets.active[rows])) * math.prod(TILE)
        return total + min(3 * near, voxels) * 4 * len(problem.spec.kernels.kernels)
    return total + voxels * (BYTES_OF_FILTERS + BYTES_OF_MODALITY * (len(problem.image.values) - 1))


def _are_small(slabs: Sequence[Slab], problem: TileProblem, halo: int) -> bool:
    """Return whether slabs are as small as the problem asks for, or so low that the planes beside them take as long."""
    if problem.largest_slab is None or slabs[0].stop - slabs[0].start <= 2 * halo:
        return True
    return max(slab.extent for slab in slabs) * math.prod(problem.grid.shape[1:]) <= problem.largest_slab


def plan_slabs(problem: TileProblem, sets: LabelSets, num_bytes: int | None, *, is_direct: bool) -> list[Slab]:
    """Return as few slabs as fit into a number of bytes; None: any amount.

    Raises:
        CapacityError: not even a slab of one tile's height fits; the error has both numbers.
    """
    needed, num_iterations = 0, problem.spec.mean_field.num_iterations
    # In small slabs, messages of two steps must cross: messages from farther away changed no label of a CT.
    halo = halo_planes(num_iterations if problem.largest_slab is None else min(2, num_iterations), problem.reach[0])
    for slabs in cuts(problem.grid.shape[0], halo):
        needed = max(slab_bytes(problem, sets, slab, is_direct=is_direct) for slab in slabs)
        if len(slabs) > 1:  # Beside a slab, the refined logits of all slabs.
            needed += sets.num_entries * math.prod(TILE) * BYTES_OF_RESULT
        if (num_bytes is None or needed <= num_bytes) and _are_small(slabs, problem, halo):
            return slabs
    raise CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already, even in slabs of {TILE[0]} planes; "
        f"{format_size(max(0, num_bytes or 0))} are left; allow more memory (--max-memory), or use a mask or a smaller region"
    )
