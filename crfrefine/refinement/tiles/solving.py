"""Run the mean field on label sets, and check afterwards that nothing that mattered was left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.memory import format_size
from crfrefine.engines.base import MeanFieldReport, of_part
from crfrefine.engines.grid_image import FeatureOrigin
from crfrefine.engines.slabs import Slab, cuts, halo_planes
from crfrefine.engines.volume import check_tiles
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.choosing import sums_are_direct
from crfrefine.refinement.tiles.grid import TILE, TileGrid
from crfrefine.refinement.tiles.image import TileImage
from crfrefine.refinement.tiles.label_sets import LabelSets, find_domains, num_rings
from crfrefine.refinement.tiles.running import RefinedTiles, Settings, pack, run_tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.base import Backend
    from crfrefine.refinement.tiles.problem import TileProblem


MOST_REPEATS = 3
"""Runs after which a label whose domain is still too small takes part everywhere."""


def solve(
    problem: TileProblem, backend: Backend, settings: Settings, *, is_direct: bool | None = None, sets: LabelSets | None = None
) -> RefinedTiles | None:
    """Run the mean field on the tiles with several labels, in slabs if it does not fit into memory at once.

    Args:
        problem: the volume.
        backend: the engine.
        settings: how.
        is_direct: whether sums are direct, else filters of the whole volume are used; None: what is less work.
        sets: result of `label_sets` for this volume; None: they are found.

    Returns:
        The refined tiles; None if every tile inside the mask is settled.

    Raises:
        CapacityError: not even a slab fits.
    """
    check_tiles(problem.spec.mean_field)
    repeats = 0
    while True:
        sets = sets or label_sets(problem)
        if not sets.active.any():
            return None
        problem.source.ensure(sets.domains & sets.active, settings.threads)
        is_direct = sums_are_direct(problem, sets) if is_direct is None else is_direct
        num_bytes = None if settings.num_bytes is None else settings.num_bytes()
        slabs = plan_slabs(problem, sets, num_bytes, is_direct=is_direct)
        if len(slabs) == 1:
            found = run_tiles(problem, pack(problem, sets, settings.threads, is_direct=is_direct), backend, settings, is_direct=is_direct)
        else:
            found = run_slabs(problem, sets, slabs, backend, settings, is_direct=is_direct)
        if problem.threshold is None:
            return found
        exceeding = found.exceeding()
        if exceeding is None:
            return found
        repeats += 1
        if repeats >= MOST_REPEATS:
            exceeding[exceeding.any(axis=(1, 2, 3))] = True
        problem, sets = dataclasses.replace(problem, present=problem.present | exceeding), None


def run_slabs(
    problem: TileProblem, sets: LabelSets, slabs: Sequence[Slab], backend: Backend, settings: Settings, *, is_direct: bool
) -> RefinedTiles:
    """Run the mean field slab by slab: with direct sums the same logits as at once, if all steps are taken.

    Each slab takes all steps, because convergence would have to be judged for all slabs together; there is no energy either.
    """
    run = dataclasses.replace(problem.spec.mean_field, tolerance=0.0)
    spec = ModelSpec(problem.spec.kernels, run)
    origin = problem.origin or FeatureOrigin(first_inside(problem), problem.image.lowest(problem.mask))
    values = np.empty((sets.num_entries, math.prod(TILE)), np.float32)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    per_row = problem.grid.counts[1] * problem.grid.counts[2]
    timings: dict[str, float] = {}
    filters: tuple[str, ...] = ()
    for number, slab in enumerate(slabs):
        grid = TileGrid((slab.last - slab.first, *problem.grid.shape[1:]))
        position = (origin.position[0] - slab.first, *origin.position[1:])
        part = dataclasses.replace(
            problem,
            grid=grid,
            source=problem.source.planes(slab.first, slab.last),
            present=rows_of(problem.present, slab),
            may_matter=rows_of(problem.may_matter, slab),
            mask=None if problem.mask is None else np.ascontiguousarray(problem.mask[slab.first : slab.last]),
            image=TileImage(problem.image.planes(slab.first, slab.last)),
            spec=spec,
            origin=dataclasses.replace(origin, position=position),
        )
        part_sets = LabelSets(grid, rows_of(sets.domains, slab))
        if not part_sets.active.any():
            continue
        own_settings = dataclasses.replace(settings, progress=of_part(settings.progress, number, len(slabs), "slab"))
        if own_settings.progress is not None:
            own_settings.progress("label sets", 0, 1)
        found = run_tiles(part, pack(part, part_sets, settings.threads, is_direct=is_direct), backend, own_settings, is_direct=is_direct)
        own = np.searchsorted(sets.tiles, [row // TILE[0] * per_row for row in (slab.start, slab.stop + TILE[0] - 1)])
        inner = np.searchsorted(
            part_sets.tiles, [row // TILE[0] * per_row for row in (slab.start - slab.first, slab.stop - slab.first + TILE[0] - 1)]
        )
        to, source = slice(*sets.first_entry[own]), slice(*part_sets.first_entry[inner])
        values[to], exceeds[to] = found.values[source], found.exceeds[source]
        filters = filters or found.report.filters
        for stage, seconds in found.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
    told = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    return RefinedTiles(sets, values, exceeds, problem.mask, MeanFieldReport(run.num_iterations, False, (), told), timings)


def first_inside(problem: TileProblem) -> tuple[int, ...]:
    """Return the first corner of the mask's bounding box, one index per axis of the original grid."""
    if problem.mask is None:
        return (0,) * problem.num_dims
    box = bounding_box(problem.mask)
    assert box is not None
    return tuple(axis.start for axis in box)[3 - problem.num_dims :]


def label_sets(problem: TileProblem) -> LabelSets:
    """Return the labels of each tile."""
    return LabelSets(problem.grid, find_domains(problem.present, problem.may_matter, num_rings(problem.reach)))


# The slabs of a volume whose tiles do not fit into the memory that a run may take; `crfrefine.engines.slabs` has those of whole arrays.

BYTES_PER_ENTRY = 5 * 4 + 1
"""Per voxel of an entry: logits, marginals, their changes, messages or refined logits, and messages of settled rows; the mask."""

BYTES_OF_FILTERS = 160
"""Per voxel around active tiles, where whole-volume filters are used: values of four channels on their way, padded copies, normalization,
and the lattice of a usual image. docs/reference/math.md says what is measured."""


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
    needed, halo = 0, halo_planes(problem.spec.mean_field.num_iterations, problem.reach[0])
    for slabs in cuts(problem.grid.shape[0], halo):
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
