"""The mean field on tiles as a whole: slab by slab where memory lacks, again where domains grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import grown, relative
from crfrefine.base.limits import case_too_large
from crfrefine.engines.base import (
    MeanFieldReport,
    MeanFieldResult,
    RunContext,
    of_part,
)
from crfrefine.engines.choices import PAIRS_OF_LARGE_FILTERS
from crfrefine.errors import ConfigError
from crfrefine.refinement.tiles.grid import TILE, TILE_VOXELS, LabelSets, tile_layers
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.running import run_tiles

MAX_REPEATS = 3  # runs after which a label whose domain is still too small takes part everywhere


def solve(problem: TileProblem, context: RunContext) -> tuple[LabelSets, MeanFieldResult]:
    """Run the mean field on the tiles with several labels; return the labels that took part, too.

    It runs slab by slab if it does not fit into memory at once. Where a label's marginal was not
    negligible near the border of its domain, the domain grows and all is run again.

    Raises:
        ConfigError: volumes are to be kept.
        CapacityError: not even a slab fits.
    """
    if problem.spec.mean_field.volume_weight > 0.0:  # Volumes are sums over all voxels.
        raise ConfigError(
            "volume.weight: volumes are not kept where labels are left out; set it or "
            "mean_field.label_threshold to 0"
        )
    repeats = 0
    while True:
        sets = problem.sets
        if not sets.active.any():
            nothing = np.zeros((0, TILE_VOXELS), np.float32)
            return sets, MeanFieldResult(nothing, MeanFieldReport(0, True, ()))
        problem.source.ensure(sets.domains & sets.active)
        if problem.is_direct is None:
            # Direct if that is asked for, or less work than a filter of all voxels around.
            work = PAIRS_OF_LARGE_FILTERS * problem.num_filtered_tiles
            is_direct = problem.num_pairs * len(sets.tiles) <= work
            problem = replace(problem, is_direct=is_direct)
        held = problem.source.num_bytes
        num_bytes = None if context.num_bytes is None else context.num_bytes - held
        slabs, needed = plan_slabs(problem, num_bytes)
        context.take(held + needed)
        if len(slabs) == 1:
            refined, exceeds = run_tiles(problem, context)
        else:
            refined, exceeds = run_slabs(problem, slabs, context)
        if not problem.checks_borders or not exceeds.any():
            return sets, refined

        exceeding = np.zeros_like(sets.domains)
        does_exceed = exceeds != 0
        tiles = sets.tiles[sets.tile_of_entry[does_exceed]]
        exceeding.reshape(len(exceeding), -1)[sets.labels[does_exceed], tiles] = True
        del refined  # The next run needs its memory.
        repeats += 1
        if repeats >= MAX_REPEATS:
            exceeding[exceeding.any(axis=(1, 2, 3))] = True
        problem = problem.with_presence(problem.present | exceeding, problem.may_matter)


def run_slabs(
    problem: TileProblem, slabs: Sequence[tuple[slice, slice]], context: RunContext
) -> tuple[MeanFieldResult, NDArray[np.uint8]]:
    """Run the mean field slab by slab; each, of some planes, comes with those of it and its halo.

    Returns what `run_tiles` returns for the whole. With direct sums the logits are the same, if all
    steps are taken.
    """
    # Convergence would have to be judged for all slabs together: all steps are taken, without an
    # energy.
    mean_field = replace(problem.spec.mean_field, tolerance=0.0)
    spec = replace(problem.spec, mean_field=mean_field)
    problem = replace(problem, spec=spec)
    sets = problem.sets
    logits = np.empty((sets.num_entries, TILE_VOXELS), np.float32)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    timings: dict[str, float] = {}
    filters: tuple[str, ...] = ()
    for number, (slab, planes) in enumerate(slabs):
        part = problem.in_slab(planes)
        if not part.sets.active.any():
            continue
        progress = of_part(context.progress, number, len(slabs), "slab")
        if progress is not None:
            progress("label sets", 0, 1)
        of_slab = context._replace(progress=progress)
        refined, exceeds_in_part = run_tiles(part, of_slab)

        target = sets.entries_in(slab)
        source = part.sets.entries_in(*relative((slab,), (planes,)))
        logits[target] = refined.logits[source]
        exceeds[target] = exceeds_in_part[source]
        filters = filters or refined.report.filters
        for stage, seconds in refined.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        del part, refined  # The next slab needs their memory.

    filters = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    report = MeanFieldReport(mean_field.num_iterations, False, (), filters)
    return MeanFieldResult(logits, report, timings), exceeds


# Per voxel of an entry: logits, marginals, changes, two kinds of messages; the mask.
BYTES_PER_ENTRY = 5 * 4 + 1
# Per voxel of an entry of the whole volume, where it runs in slabs: the refined logits.
BYTES_OF_RESULT = 4
# Per voxel around active tiles, and for each modality after the first, with filters of the whole
# volume (docs/reference/math.md).
BYTES_OF_FILTERS = 160
BYTES_OF_MODALITY = 40


def slab_bytes(problem: TileProblem, planes: slice) -> int:
    """Return an estimate of the memory of a run on some planes."""
    num_modalities = len(problem.image.values)
    sets = problem.sets
    voxels = (planes.stop - planes.start) * math.prod(problem.grid.shape[1:])
    entries = sets.entries_in(planes)
    total = int(entries.stop - entries.start) * TILE_VOXELS * BYTES_PER_ENTRY
    if problem.maps is not None:  # The normalized image.
        total += 4 * num_modalities * voxels
    if problem.is_direct:
        near = int(np.count_nonzero(sets.active[tile_layers(planes)])) * TILE_VOXELS
        num_kernels = len(problem.spec.kernels.kernels)
        num_copied = min(3 * near, voxels)
        return total + num_copied * 4 * num_kernels
    bytes_of_voxel = BYTES_OF_FILTERS + BYTES_OF_MODALITY * (num_modalities - 1)
    return total + voxels * bytes_of_voxel


def plan_slabs(
    problem: TileProblem, num_bytes: int | None
) -> tuple[list[tuple[slice, slice]], int]:
    """Return as few slabs as fit into a number of bytes, and the bytes of the largest one.

    A slab is its planes, and these with its halo. None means any number of bytes. Raise
    CapacityError if no slab fits.
    """
    needed = 0
    grid = problem.grid
    num_planes, *plane_shape = grid.shape
    # In each step messages, and their normalizations, come from within the reach; in small slabs
    # messages of two steps must cross: those from farther away changed no label of a CT.
    num_crossed = problem.spec.mean_field.num_iterations
    if problem.largest_slab is not None:
        num_crossed = min(2, num_crossed)
    reach = (num_crossed + 1) * problem.reach[0]
    halo = math.ceil(reach / TILE[0]) * TILE[0]
    largest_slab = problem.largest_slab or math.inf
    for count in range(1, grid.counts[0] + 1):
        num_layers = math.ceil(grid.counts[0] / count)
        slabs = []
        for slab in grid.slabs(num_layers):
            (with_halo,) = grown((slab,), (halo,), (num_planes,))
            slabs.append((slab, with_halo))
        needed = max(slab_bytes(problem, planes) for _, planes in slabs)
        if len(slabs) > 1:  # Beside a slab, the refined logits of all slabs.
            needed += problem.sets.num_entries * TILE_VOXELS * BYTES_OF_RESULT
        fits = num_bytes is None or needed <= num_bytes
        most_planes = max(planes.stop - planes.start for _, planes in slabs)
        are_small = most_planes * math.prod(plane_shape) <= largest_slab
        # In slabs as low as their halos, the planes beside them take as long.
        if fits and (are_small or num_layers * TILE[0] <= 2 * halo):
            return slabs, needed
    raise case_too_large(needed, num_bytes or 0, f", even in slabs of {TILE[0]} planes")
