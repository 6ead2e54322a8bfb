"""How much work a mean field on tiles is: whether tiles save any, and with which sums of messages.

Messages are direct sums, tile by tile, or come from filters of the whole volume.
"""

from __future__ import annotations

import math

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.sections import TRUNCATION_RADIUS
from crfrefine.refinement.tiles.grid import TILE_VOXELS, num_rings
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.survey import Survey

# voxels along an axis up to which sums are direct: else the copies of tiles outgrow the cache
MAX_DIRECT_REACH = 12
# Kinds of kernels that tiles have sums for; others are filtered as on a whole volume.
DIRECT_KINDS = frozenset({"bilateral", "spatial"})
BALL = 4.0 / 3.0 * math.pi  # volume of a ball of radius 1
# Pairs of a direct sum that take as long as a grid or a lattice for one voxel and up to GROUP
# channels; and for volumes that are streamed, where filters need arrays of all voxels around.
PAIRS_OF_FILTERS = 120
PAIRS_OF_LARGE_FILTERS = 400
GROUP = 4  # channels that are filtered together
# Share of the work with all labels below which tiles are used: with direct sums, with filters.
WORTH_TILES = 0.9
WORTH_CHANNELS = 0.5
# Share of a grid's rows that is filtered over that of uncertain voxels; work below which it is
# used.
ROWS_OF_UNCERTAIN = 6.0
WORTH_ROWS = 0.8


def count_pairs(problem: TileProblem) -> float:
    """Return the voxels in all windows; 0 if direct sums are asked for, infinite if impossible."""
    kernels = problem.spec.kernels
    if max(problem.reach) > MAX_DIRECT_REACH or kernels.filter not in ("auto", "truncated"):
        return math.inf
    if any(kernel.kind not in DIRECT_KINDS for kernel in kernels.kernels):
        return math.inf
    if kernels.filter == "truncated":
        return 0.0
    voxel = math.prod(kernels.distances(problem.image.spacing))
    windows = 0.0
    for kernel in kernels.bilateral:
        reach = [TRUNCATION_RADIUS * theta for theta in kernel.theta_position]
        windows += math.prod(reach)
    return BALL * windows / voxel


def sums_are_direct(problem: TileProblem) -> bool:
    """Return whether each voxel's window is summed directly.

    It is if that is asked for, or less work than a filter of all voxels around.
    """
    work = PAIRS_OF_LARGE_FILTERS * _filtered_tiles(problem)
    return count_pairs(problem) * len(problem.sets.tiles) <= work


def _num_tiles_around(problem: TileProblem) -> int:
    """Return the number of tiles that messages of active ones reach."""
    around = widen(problem.sets.active, num_rings(problem.reach))
    return int(np.count_nonzero(around))


def _filtered_tiles(problem: TileProblem) -> int:
    """Return the tiles around the active ones that filters take, once for each channel group."""
    most_labels = int(problem.sets.num_labels_of.max())
    num_groups = math.ceil(most_labels / GROUP)
    return _num_tiles_around(problem) * num_groups


def choose_tiles(problem: TileProblem, threads: int | None, survey: Survey) -> bool | None:
    """Return whether a case in memory has direct sums on tiles (True), or filters (False).

    None means that tiles save no work, and all labels take part everywhere.
    """
    sets = problem.sets
    if not sets.active.any():
        return True
    channels = problem.spec.mean_field.num_channels
    kernels = problem.spec.kernels
    num_voxels = problem.image.num_voxels
    if sets.num_entries * TILE_VOXELS >= WORTH_TILES * channels * num_voxels:
        return None
    name = kernels.filter
    if name == "auto" and kernels.bilateral:
        # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.

    pairs = count_pairs(problem) * len(sets.tiles) * TILE_VOXELS
    everywhere = float(math.ceil(channels / GROUP) * num_voxels)
    on_tiles = float(_filtered_tiles(problem) * TILE_VOXELS)
    fewest_filtered = min(on_tiles, everywhere)
    are_few_pairs = name == "truncated" or pairs <= PAIRS_OF_FILTERS * fewest_filtered
    if pairs < math.inf and are_few_pairs:
        return True
    if name == "grid":
        # A grid filters only the rows of uncertain voxels. Besides the steps the work is the
        # normalization, twice with all labels everywhere, and what settled voxels send, the last
        # label included.
        steps = kernels.num_iterations * channels
        most_labels = int(sets.num_labels_of.max())
        around = _num_tiles_around(problem) * TILE_VOXELS * (1 + most_labels)
        share = min(1.0, ROWS_OF_UNCERTAIN * survey.uncertain_share(problem.settled_below))
        if around + num_voxels * steps * share < WORTH_ROWS * num_voxels * (2 + steps):
            return False
    if on_tiles < WORTH_CHANNELS * everywhere:
        return False
    return None
