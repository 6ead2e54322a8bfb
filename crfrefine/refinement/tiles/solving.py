"""Run the mean field on label sets, and check afterwards that nothing that mattered was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.limits import format_size
from crfrefine.engines.base import MeanFieldReport, of_part
from crfrefine.errors import CapacityError
from crfrefine.refinement.tiles.grid import TILE, LabelSets
from crfrefine.refinement.tiles.planning import sums_are_direct
from crfrefine.refinement.tiles.problem import Slab, rows_of
from crfrefine.refinement.tiles.running import RefinedTiles, nothing_refined, run_tiles

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend, RunContext
    from crfrefine.refinement.tiles.problem import TileProblem


MAX_REPEATS = 3
"""Runs after which a label whose domain is still too small takes part everywhere."""


def solve(problem: TileProblem, sets: LabelSets, backend: Backend, context: RunContext, *, is_direct: bool | None = None) -> RefinedTiles:
    """Run the mean field on the tiles with several labels, in slabs if it does not fit into memory at once.

    Sums are direct, or filters of the whole volume are used; without a choice, whichever is less work. CapacityError: not even a slab fits.
    """
    problem.spec.mean_field.check_tiles()
    repeats = 0
    while True:
        if not sets.active.any():
            return nothing_refined(problem, sets)
        problem.source.ensure(sets.domains & sets.active, context.threads)
        is_direct = sums_are_direct(problem, sets) if is_direct is None else is_direct
        slabs = plan_slabs(problem, sets, None if context.num_bytes is None else context.num_bytes(), is_direct=is_direct)
        if len(slabs) == 1:
            refined = run_tiles(problem, sets, backend, context, is_direct=is_direct)
        else:
            refined = run_slabs(problem, sets, slabs, backend, context, is_direct=is_direct)
        # Where a label's marginal was not negligible near the border of its domain.
        exceeding = None if problem.threshold is None else sets.flagged(refined.exceeds)
        if exceeding is None:
            return refined
        del refined  # The next run needs its memory.
        repeats += 1
        if repeats >= MAX_REPEATS:
            exceeding[exceeding.any(axis=(1, 2, 3))] = True
        problem = replace(problem, present=problem.present | exceeding)
        sets = problem.label_sets()


def run_slabs(
    problem: TileProblem, sets: LabelSets, slabs: Sequence[Slab], backend: Backend, context: RunContext, *, is_direct: bool
) -> RefinedTiles:
    """Run the mean field slab by slab: with direct sums the same logits as at once, if all steps are taken.

    Each slab takes all steps, because convergence would have to be judged for all slabs together; there is no energy either.
    """
    run = replace(problem.spec.mean_field, tolerance=0.0)
    problem = replace(problem, spec=replace(problem.spec, mean_field=run)).with_origin()
    values = np.empty((sets.num_entries, math.prod(TILE)), np.float32)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    per_row = problem.grid.counts[1] * problem.grid.counts[2]
    timings: dict[str, float] = {}
    filters: tuple[str, ...] = ()
    for number, slab in enumerate(slabs):
        part = problem.in_slab(slab)
        part_sets = LabelSets(part.grid, rows_of(sets.domains, slab))
        if not part_sets.active.any():
            continue
        own_context = replace(context, progress=of_part(context.progress, number, len(slabs), "slab"))
        if own_context.progress is not None:
            own_context.progress("label sets", 0, 1)
        refined = run_tiles(part, part_sets, backend, own_context, is_direct=is_direct)
        own = np.searchsorted(sets.tiles, [row // TILE[0] * per_row for row in (slab.start, slab.stop + TILE[0] - 1)])
        inner = np.searchsorted(
            part_sets.tiles, [row // TILE[0] * per_row for row in (slab.start - slab.first, slab.stop - slab.first + TILE[0] - 1)]
        )
        to, source = slice(*sets.first_entry[own]), slice(*part_sets.first_entry[inner])
        values[to], exceeds[to] = refined.values[source], refined.exceeds[source]
        filters = filters or refined.report.filters
        for stage, seconds in refined.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        del part, refined  # The next slab needs their memory.
    filters = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    report = MeanFieldReport(run.num_iterations, False, (), filters)
    return replace(nothing_refined(problem, sets), values=values, exceeds=exceeds, report=report, timings=timings)


BYTES_PER_ENTRY = 5 * 4 + 1
"""Per voxel of an entry: logits, marginals, their changes, messages or refined logits, and messages of settled rows; the mask."""

BYTES_OF_RESULT = 4
"""Per voxel of an entry of the whole volume, where it runs in slabs: the refined logits."""

BYTES_OF_FILTERS, BYTES_OF_MODALITY = 160, 40
"""Per voxel around active tiles, and for each modality after the first, where whole-volume filters are used:
values of four channels on their way, padded copies, normalization, and the lattice of a usual image.
See docs/reference/math.md for the measurements."""


def slab_bytes(problem: TileProblem, sets: LabelSets, slab: Slab, *, is_direct: bool) -> int:
    """Return an estimate of the memory of a run on a slab."""
    rows = slice(slab.first // TILE[0], -(-slab.last // TILE[0]))
    voxels = (slab.last - slab.first) * problem.grid.shape[1] * problem.grid.shape[2]
    entries = int(sets.num_labels_of[rows][sets.active[rows]].sum())
    image = 0 if problem.maps is None else 4 * len(problem.image.values) * voxels
    total = image + entries * math.prod(TILE) * BYTES_PER_ENTRY
    if is_direct:
        near = int(np.count_nonzero(sets.active[rows])) * math.prod(TILE)
        return total + min(3 * near, voxels) * 4 * len(problem.spec.kernels.kernels)
    return total + voxels * (BYTES_OF_FILTERS + BYTES_OF_MODALITY * (len(problem.image.values) - 1))


def plan_slabs(problem: TileProblem, sets: LabelSets, num_bytes: int | None, *, is_direct: bool) -> list[Slab]:
    """Return as few slabs as fit into a number of bytes, where None means any amount; raise CapacityError if no slab fits."""
    needed, num_iterations = 0, problem.spec.mean_field.num_iterations
    # In each step messages come from within the reach, and their normalization from within the reach of those who send.
    # In small slabs, messages of two steps must cross: messages from farther away changed no label of a CT.
    num_crossed = num_iterations if problem.largest_slab is None else min(2, num_iterations)
    halo = math.ceil((num_crossed + 1) * problem.reach[0] / TILE[0]) * TILE[0]
    num_planes = problem.grid.shape[0]
    rows = math.ceil(num_planes / TILE[0])
    for count in range(1, rows + 1):
        height = math.ceil(rows / count) * TILE[0]  # The last slab may be lower.
        starts = range(0, num_planes, height)
        slabs = [Slab(s, min(s + height, num_planes), max(0, s - halo), min(s + height + halo, num_planes)) for s in starts]
        needed = max(slab_bytes(problem, sets, slab, is_direct=is_direct) for slab in slabs)
        if len(slabs) > 1:  # Beside a slab, the refined logits of all slabs.
            needed += sets.num_entries * math.prod(TILE) * BYTES_OF_RESULT
        size = max(slab.last - slab.first for slab in slabs) * math.prod(problem.grid.shape[1:])
        # In slabs as low as their halos, the planes beside them take as long.
        is_small = problem.largest_slab is None or size <= problem.largest_slab or slabs[0].stop - slabs[0].start <= 2 * halo
        if is_small and (num_bytes is None or needed <= num_bytes):
            return slabs
    raise CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already, even in slabs of {TILE[0]} planes; "
        f"{format_size(max(0, num_bytes or 0))} are left; allow more memory (--max-memory), or use a mask or a smaller region"
    )
