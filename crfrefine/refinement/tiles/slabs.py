"""The slabs of a volume whose tiles do not fit into the memory that a run may take; `crfrefine.engines.slabs` has those of whole arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.memory import format_size
from crfrefine.engines.slabs import Slab, cut, halo_planes
from crfrefine.errors import CapacityError
from crfrefine.refinement.tiles.grid import TILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.label_sets import LabelSets
    from crfrefine.refinement.tiles.problem import TileProblem

BYTES_PER_ENTRY = 5 * 4 + 1
"""Per voxel of an entry: logits, marginals, their changes, messages or refined logits, and messages of settled rows; the mask."""

BYTES_OF_FILTERS = 160
"""Per voxel around active tiles, where whole-volume filters are used: values of four channels on their way, padded copies, normalization,
and the lattice of a usual image. docs/reference/math.md says what is measured."""


def halo_of(problem: TileProblem) -> int:
    """Return the number of planes on each side that the result of a plane can depend on, in whole tiles."""
    return halo_planes(problem.spec.mean_field.num_iterations, problem.reach[0], TILE[0])


def slab_bytes(problem: TileProblem, sets: LabelSets, slab: Slab, *, is_direct: bool) -> int:
    """Return an estimate of what a run on a slab takes."""
    rows = slice(slab.first // TILE[0], -(-slab.last // TILE[0]))
    plane = problem.grid.shape[1] * problem.grid.shape[2]
    voxels = (slab.last - slab.first) * plane
    entries = int(sets.num_labels_of[rows][sets.active[rows]].sum())
    image = 0 if problem.image.is_normalized else 4 * problem.image.num_modalities * voxels
    total = image + entries * math.prod(TILE) * BYTES_PER_ENTRY
    if is_direct:
        near = int(np.count_nonzero(sets.active[rows])) * math.prod(TILE)
        return total + min(3 * near, voxels) * 4 * len(problem.spec.kernels.kernels)
    return total + voxels * BYTES_OF_FILTERS


def plan_slabs(problem: TileProblem, sets: LabelSets, num_bytes: int | None, *, is_direct: bool) -> list[Slab]:
    """Return the slabs of a volume: as few of equal height as fit.

    Args:
        problem: the volume.
        sets: the labels of its tiles.
        num_bytes: what a run may take; None: any amount.
        is_direct: whether sums are direct.

    Raises:
        CapacityError: not even a slab of one tile's height fits; both numbers are told.
    """
    num_planes, halo = problem.grid.shape[0], halo_of(problem)
    rows = problem.grid.counts[0]
    needed = 0
    for count in range(1, rows + 1):
        height = math.ceil(rows / count) * TILE[0]
        slabs = cut(num_planes, height, halo)
        needed = max(slab_bytes(problem, sets, slab, is_direct=is_direct) for slab in slabs)
        if num_bytes is None or needed <= num_bytes:
            return slabs
    raise CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already, even in slabs of {TILE[0]} planes; "
        f"{format_size(max(0, num_bytes or 0))} are left; allow more memory (--max-memory), or use a mask or a smaller region"
    )


def rows_of(tiles: NDArray[np.bool_], slab: Slab) -> NDArray[np.bool_]:
    """Return the tiles, (…, *tiles), of the planes that take part in a slab."""
    return tiles[..., slab.first // TILE[0] : -(-slab.last // TILE[0]), :, :]
