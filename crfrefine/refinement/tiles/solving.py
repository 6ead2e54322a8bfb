"""Run the mean field on label sets, and check afterwards that nothing that mattered was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import MeanFieldReport, of_part
from crfrefine.refinement.tiles.choosing import sums_are_direct
from crfrefine.refinement.tiles.grid import TILE
from crfrefine.refinement.tiles.label_sets import LabelSets
from crfrefine.refinement.tiles.problem import rows_of
from crfrefine.refinement.tiles.running import RefinedTiles, nothing_refined, run_tiles
from crfrefine.refinement.tiles.slabs import Slab, plan_slabs

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
            found = run_tiles(problem, sets, backend, context, is_direct=is_direct)
        else:
            found = run_slabs(problem, sets, slabs, backend, context, is_direct=is_direct)
        exceeding = None if problem.threshold is None else found.exceeding()
        if exceeding is None:
            return found
        del found  # The next run needs its memory.
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
        found = run_tiles(part, part_sets, backend, own_context, is_direct=is_direct)
        own = np.searchsorted(sets.tiles, [row // TILE[0] * per_row for row in (slab.start, slab.stop + TILE[0] - 1)])
        inner = np.searchsorted(
            part_sets.tiles, [row // TILE[0] * per_row for row in (slab.start - slab.first, slab.stop - slab.first + TILE[0] - 1)]
        )
        to, source = slice(*sets.first_entry[own]), slice(*part_sets.first_entry[inner])
        values[to], exceeds[to] = found.values[source], found.exceeds[source]
        filters = filters or found.report.filters
        for stage, seconds in found.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        del part, found  # The next slab needs their memory.
    told = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    report = MeanFieldReport(run.num_iterations, False, (), told)
    return replace(nothing_refined(problem, sets), values=values, exceeds=exceeds, report=report, timings=timings)
