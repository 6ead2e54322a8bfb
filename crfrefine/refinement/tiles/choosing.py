"""Whether a case is computed on tiles, and whether its messages are direct sums or come from filters of the whole volume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.specs import REACH
from crfrefine.refinement.tiles.grid import TILE, num_rings

if TYPE_CHECKING:
    from crfrefine.refinement.tiles.grid import LabelSets
    from crfrefine.refinement.tiles.problem import TileProblem

MAX_DIRECT_REACH = 12
"""Voxels along an axis up to which sums are direct; the copies of a tile's surroundings would outgrow the processor's cache."""

BALL = 4.0 / 3.0 * math.pi
"""Volume of a ball of radius 1."""

PAIRS_OF_FILTERS = 120
"""Pairs of a direct sum that take as long as a grid or a lattice for one voxel and up to GROUP channels."""

PAIRS_OF_LARGE_FILTERS = 400
"""The same for volumes that are streamed: filters need arrays of all voxels around the active tiles, which direct sums do not."""

GROUP = 4
"""Channels that are filtered together."""

WORTH_IT, WORTH_CHANNELS = 0.9, 0.5
"""Share of the work with all labels everywhere below which tiles are used: with direct sums, and with filters of the whole volume, for
which values are copied to and from tiles."""

ROWS_OF_UNCERTAIN, WORTH_ROWS = 6.0, 0.8
"""Share of a grid's rows that is filtered after the first step, over the share of uncertain voxels; and the share of the work with all
labels everywhere below which a grid is used on tiles."""


def window_voxels(problem: TileProblem) -> float:
    """Return the number of voxels in the windows of all appearance kernels together."""
    steps = problem.spec.kernels.distances(problem.image.spacing)
    return sum(
        BALL * math.prod(REACH * theta / step for theta, step in zip(kernel.theta_position, steps, strict=True))
        for kernel in problem.spec.kernels.bilateral
    )


def sums_are_direct(problem: TileProblem, sets: LabelSets) -> bool:
    """Return whether each voxel's window is summed directly: if that is less work than a filter of all voxels around, or asked for."""
    name = problem.spec.kernels.filter
    if max(problem.reach) > MAX_DIRECT_REACH or name not in ("auto", "truncated"):
        return False
    pairs = window_voxels(problem) * np.count_nonzero(sets.active)
    return bool(name == "truncated" or pairs <= PAIRS_OF_LARGE_FILTERS * _filtered_tiles(problem, sets))


def _filtered_tiles(problem: TileProblem, sets: LabelSets) -> int:
    """Return the tiles around the active ones that filters take, once for each group of channels."""
    num_around = np.count_nonzero(widen(sets.active, num_rings(problem.reach)))
    return int(num_around) * math.ceil(int(sets.num_labels_of.max()) / GROUP)


def choose_tiles(problem: TileProblem, sets: LabelSets, threads: int | None, uncertain: float) -> bool | None:
    """Return how a case in memory is computed: True for direct sums on tiles, False for filters on tiles, None for all labels everywhere.

    `uncertain` is the share of voxels inside the mask where the network is not certain.
    """
    tile, channels, kernels = math.prod(TILE), problem.spec.mean_field.num_channels, problem.spec.kernels
    num_voxels = problem.image.num_voxels
    if sets.num_entries * tile >= WORTH_IT * channels * num_voxels:
        return None
    name = kernels.filter
    if name == "auto" and kernels.bilateral:  # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.
    everywhere = float(math.ceil(channels / GROUP) * num_voxels)
    on_tiles = float(_filtered_tiles(problem, sets) * tile)
    if max(problem.reach) <= MAX_DIRECT_REACH and kernels.filter in ("auto", "truncated"):
        pairs = window_voxels(problem) * np.count_nonzero(sets.active) * tile
        if name == "truncated" or pairs <= PAIRS_OF_FILTERS * min(on_tiles, everywhere):
            return True
    if name == "grid":
        # Besides the steps: normalization, twice with all labels everywhere, and what settled voxels send, the last label included.
        steps = kernels.num_iterations * channels
        num_around = np.count_nonzero(widen(sets.active, num_rings(problem.reach))) * tile
        work = num_around * (1 + int(sets.num_labels_of.max())) + num_voxels * steps * min(1.0, ROWS_OF_UNCERTAIN * uncertain)
        if work < WORTH_ROWS * num_voxels * (2 + steps):
            return False
    return False if on_tiles < WORTH_CHANNELS * everywhere else None
