"""The mean field of the C++ engine on label sets: by direct sums tile by tile, or by the filters of a whole volume."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import widen
from crfrefine.base.array_types import Bool, Float32
from crfrefine.base.limits import format_size
from crfrefine.engines.base import Backend, MeanFieldReport, RunContext, default_origin, of_part
from crfrefine.engines.cpu import CpuKernels
from crfrefine.errors import CapacityError, ConfigError
from crfrefine.parameters.specs import KernelSpec
from crfrefine.refinement.tiles.grid import TILE, Extents, LabelSets, num_rings
from crfrefine.refinement.tiles.planning import GROUP, sums_are_direct
from crfrefine.refinement.tiles.problem import DenseChannels, Slab, TileProblem, rows_of

# Share of the threshold by which marginals of a row may have changed before it sends them again.
UNSENT = 0.05
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class RefinedTiles:
    """Refined logits of label sets."""

    sets: LabelSets  # the labels of each tile
    values: Float32  # (entries, voxels of a tile) float32
    # (entries), 1 where the label's marginal was above the threshold near its domain's border after
    # a step
    exceeds: NDArray[np.uint8]
    report: MeanFieldReport  # steps, energy and filters
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage


def run_tiles(
    problem: TileProblem,
    sets: LabelSets,
    backend: Backend,
    context: RunContext,
    *,
    is_direct: bool,
    has_room: bool,
) -> RefinedTiles:
    """Run the mean field on label sets, at least one of them active, by direct sums or by the filters that the model asks for."""
    # `has_room`: direct sums may make copies of the whole volume before the first step.
    spec = problem.spec.kernels
    run = problem.spec.mean_field
    engine = sets.engine(problem.mask, context.threads)
    logits = problem.source.of_entries(sets, context.threads)
    if run.bias is not None:
        logits += np.asarray(run.bias, np.float32)[sets.labels][:, None]
    if not spec.kernels:  # No message changes the logits.
        logits /= np.float32(run.temperature)
        none_exceeds = np.zeros(sets.num_entries, np.uint8)
        return RefinedTiles(sets, logits, none_exceeds, MeanFieldReport(0, True, ()))
    # (active tiles, rows of a tile), a bit for each voxel that is not settled; with filters of the
    # whole volume, a row is open if one of its voxels is.
    is_open = np.empty((len(sets.tiles), math.prod(TILE[:2])), np.uint16)
    engine.open_voxels(logits, run.temperature, problem.settled, not is_direct, is_open)
    started = time.perf_counter()
    image = problem.normalized()
    how = f"direct in {len(sets.tiles)} of {sets.grid.num_tiles} tiles, {sets.num_entries / len(sets.tiles):.1f} labels each"
    filters = tuple(f"{name}: {how}" for name in problem.spec.kernels.names)
    built = None
    shared = (0, _NONE, _NONE)
    if not is_direct and is_open.any():  # Without an open voxel there is nothing to filter.
        shared = share_channels(sets, num_rings(problem.reach))
        # Kernels of the voxels that matter: those of rows with open voxels, and of all that they
        # receive from.
        near = rows_near(problem, sets, is_open)
        if problem.mask is not None:
            near &= problem.mask
        dims = problem.grid.shape[3 - len(problem.image.spacing) :]
        guide = replace(problem.image, values=image.reshape(-1, *dims))
        guide = replace(
            guide, mask=near.reshape(dims), origin=guide.origin or default_origin(guide)
        )
        kernels = backend.kernels(guide, replace(spec, num_labels=shared[0] + 1), context)
        assert isinstance(kernels, CpuKernels)
        built = kernels.built
        filters = kernels.filters
    steps = spec.distances(problem.image.spacing)
    out = np.empty_like(logits)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    prepared = time.perf_counter()
    bilateral = [
        (_sigma(kernel, steps), list(kernel.theta_intensity or ())) for kernel in spec.bilateral
    ]
    spatial = [] if spec.spatial is None else _sigma(spec.spatial, steps)
    model = image, bilateral, spatial, spec.normalization, run
    voxels = is_open, problem.image.num_voxels, context.progress, logits, out
    may_matter = None if problem.threshold is None else problem.may_matter
    check = may_matter, problem.reach, problem.threshold or 0.0, exceeds
    outcome = engine.run(
        built, *shared, *model, *voxels, *check, UNSENT * problem.precision, has_room
    )
    report = MeanFieldReport(
        outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), filters
    )
    timings = {"build": prepared - started, "steps": time.perf_counter() - prepared}
    return RefinedTiles(sets, out, exceeds, report, timings)


def rows_near(problem: TileProblem, sets: LabelSets, is_open: NDArray[np.uint16]) -> Bool:
    """Return (*grid), True within twice the reach of a row of a tile with an open voxel."""
    grid = problem.grid
    reach = problem.reach
    open_rows = np.zeros((grid.num_tiles, *TILE[:2]), np.bool_)
    open_rows[sets.tiles] = is_open.reshape(-1, *TILE[:2]) != 0
    rows = open_rows.reshape(*grid.counts, *TILE[:2]).transpose(0, 3, 1, 4, 2)
    rows = rows.reshape(grid.counts[0] * TILE[0], grid.counts[1] * TILE[1], grid.counts[2])[
        : grid.shape[0], : grid.shape[1]
    ]
    near = np.repeat(widen(rows, (2 * reach[0], 2 * reach[1], 0)), TILE[2], axis=-1)[
        ..., : grid.shape[2]
    ]
    return np.ascontiguousarray(widen(near, (0, 0, 2 * reach[2])))


def _sigma(kernel: KernelSpec, steps: tuple[float, ...]) -> list[float]:
    """Return the standard deviation in voxels along the three axes."""
    return [1.0] * (3 - len(steps)) + [
        theta / step for theta, step in zip(kernel.theta_position, steps, strict=True)
    ]


def share_channels(
    sets: LabelSets, rings: Extents
) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """Spread labels over as few channels as a simple rule finds: labels share one where no message of one can reach the other's domain.

    Parts of a domain that messages can cross between, over so many rings of tiles, stay together.
    The parts of all domains, the largest first, each take the first channel in which no other label
    is within reach.

    Returns:
        (number of channels, that of each entry, that of the label of each settled tile), the latter
        (*tiles), -1: the tile is not settled.
    """
    from scipy import ndimage

    parts = []
    neighbors = np.ones((3, 3, 3), np.bool_)
    for label, tiles in enumerate(sets.domains):
        numbered, count = ndimage.label(widen(tiles, rings), structure=neighbors)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            around = numbered[box] == number
            inside = around & tiles[box]
            parts.append((-int(np.count_nonzero(inside)), label, number, box, around, inside))
    channels: list[NDArray[np.int32]] = []
    for _, label, _, box, around, inside in sorted(parts, key=lambda part: part[:3]):
        for channel in channels:
            held = channel[box][around]
            if ((held < 0) | (held == label)).all():
                break
        else:
            channel = np.full(sets.grid.counts, -1, np.int32)
            channels.append(channel)
        channel[box][inside] = label
    channels = _grouped(channels, sets.active)
    of_entry = np.empty(sets.num_entries, np.int32)
    of_settled = np.full(sets.grid.counts, -1, np.int32)
    for number, channel in enumerate(channels):
        of_settled[(sets.settled >= 0) & (channel == sets.settled)] = number
        for label in np.unique(channel[sets.active & (channel >= 0)]):
            tiles, entries = sets.entries[label]
            of_entry[entries[channel.flat[tiles] == label]] = number
    return len(channels), of_entry, of_settled


def _grouped(channels: list[NDArray[np.int32]], active: Bool) -> list[NDArray[np.int32]]:
    """Return the channels in an order in which those that are filtered together have labels in the same tiles."""
    # A group is filtered wherever one of its labels is. The last channel, which takes part in all
    # groups, stays: few tiles have it.
    tiles = [np.flatnonzero(active & (channel >= 0)) for channel in channels[:-1]]
    left = list(range(len(tiles)))
    grouped: list[NDArray[np.int32]] = []
    while left:
        if len(grouped) % GROUP == 0:
            in_group = np.zeros(active.size, np.bool_)
        shared = [np.count_nonzero(in_group[tiles[number]]) for number in left]
        number = left.pop(int(np.argmax(shared)))
        in_group[tiles[number]] = True
        grouped.append(channels[number])
    return grouped + channels[-1:]


MAX_REPEATS = 3  # runs after which a label whose domain is still too small takes part everywhere


def solve(
    problem: TileProblem,
    sets: LabelSets,
    backend: Backend,
    context: RunContext,
    *,
    is_direct: bool | None = None,
) -> RefinedTiles:
    """Run the mean field on the tiles with several labels, in slabs if it does not fit into memory at once."""
    # `is_direct`: None means whichever is less work. CapacityError: not even a slab fits.
    if problem.spec.mean_field.volume_weight > 0.0:  # Volumes are sums over all voxels.
        raise ConfigError(
            "volume.weight: volumes are not kept where labels are left out; set it or mean_field.label_threshold to 0"
        )
    repeats = 0
    while True:
        if not sets.active.any():
            values = np.zeros((0, math.prod(TILE)), np.float32)
            return RefinedTiles(sets, values, np.zeros(0, np.uint8), MeanFieldReport(0, True, ()))
        problem.source.ensure(sets.domains & sets.active, context.threads)
        is_direct = sums_are_direct(problem, sets) if is_direct is None else is_direct
        slabs = plan_slabs(
            problem,
            sets,
            None if context.num_bytes is None else context.num_bytes(),
            is_direct=is_direct,
        )
        has_room = isinstance(problem.source, DenseChannels)
        if len(slabs) == 1:
            # The copies are smaller than what the steps need for two labels at each voxel.
            has_room = has_room or sets.num_entries >= 2 * sets.grid.num_tiles
            refined = run_tiles(
                problem, sets, backend, context, is_direct=is_direct, has_room=has_room
            )
        else:
            refined = run_slabs(
                problem, sets, slabs, backend, context, is_direct=is_direct, has_room=has_room
            )
        # Where a label's marginal was not negligible near the border of its domain.
        if problem.threshold is None or not refined.exceeds.any():
            return refined
        exceeding = np.zeros_like(sets.domains)
        for label, (tiles, entries) in enumerate(sets.entries):
            exceeding[label].flat[tiles[refined.exceeds[entries] != 0]] = True
        del refined  # The next run needs its memory.
        repeats += 1
        if repeats >= MAX_REPEATS:
            exceeding[exceeding.any(axis=(1, 2, 3))] = True
        problem = replace(problem, present=problem.present | exceeding)
        sets = problem.label_sets()


def run_slabs(
    problem: TileProblem,
    sets: LabelSets,
    slabs: Sequence[Slab],
    backend: Backend,
    context: RunContext,
    *,
    is_direct: bool,
    has_room: bool,
) -> RefinedTiles:
    """Run the mean field slab by slab: with direct sums the same logits as at once, if all steps are taken."""
    # Convergence would have to be judged for all slabs together: all steps are taken, without an
    # energy.
    run = replace(problem.spec.mean_field, tolerance=0.0)
    problem = replace(problem, spec=replace(problem.spec, mean_field=run)).with_origin()
    values = np.empty((sets.num_entries, math.prod(TILE)), np.float32)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    timings: dict[str, float] = {}
    filters: tuple[str, ...] = ()
    for number, slab in enumerate(slabs):
        part = problem.in_slab(slab)
        part_sets = LabelSets(part.grid, rows_of(sets.domains, slab))
        if not part_sets.active.any():
            continue
        own_context = replace(
            context, progress=of_part(context.progress, number, len(slabs), "slab")
        )
        if own_context.progress is not None:
            own_context.progress("label sets", 0, 1)
        refined = run_tiles(
            part, part_sets, backend, own_context, is_direct=is_direct, has_room=has_room
        )
        to = sets.entries_in(slab.start, slab.stop)
        source = part_sets.entries_in(slab.start - slab.first, slab.stop - slab.first)
        values[to] = refined.values[source]
        exceeds[to] = refined.exceeds[source]
        filters = filters or refined.report.filters
        for stage, seconds in refined.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        del part, refined  # The next slab needs their memory.
    filters = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    return RefinedTiles(
        sets, values, exceeds, MeanFieldReport(run.num_iterations, False, (), filters), timings
    )


# Per voxel of an entry: logits, marginals, changes, two kinds of messages; the mask.
BYTES_PER_ENTRY = 5 * 4 + 1
# Per voxel of an entry of the whole volume, where it runs in slabs: the refined logits.
BYTES_OF_RESULT = 4
# Per voxel around active tiles, and for each modality after the first, with filters of the whole
# volume (docs/reference/math.md).
BYTES_OF_FILTERS = 160
BYTES_OF_MODALITY = 40


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


def plan_slabs(
    problem: TileProblem, sets: LabelSets, num_bytes: int | None, *, is_direct: bool
) -> list[Slab]:
    """Return as few slabs as fit into a number of bytes, where None means any amount.

    Raise CapacityError if no slab fits.
    """
    needed = 0
    num_iterations = problem.spec.mean_field.num_iterations
    # In each step messages, and their normalizations, come from within the reach; in small slabs
    # messages of two steps must cross: those from farther away changed no label of a CT.
    num_crossed = num_iterations if problem.largest_slab is None else min(2, num_iterations)
    halo = math.ceil((num_crossed + 1) * problem.reach[0] / TILE[0]) * TILE[0]
    num_planes = problem.grid.shape[0]
    rows = math.ceil(num_planes / TILE[0])
    for count in range(1, rows + 1):
        height = math.ceil(rows / count) * TILE[0]  # The last slab may be lower.
        starts = range(0, num_planes, height)
        slabs = [
            Slab(
                s, min(s + height, num_planes), max(0, s - halo), min(s + height + halo, num_planes)
            )
            for s in starts
        ]
        needed = max(slab_bytes(problem, sets, slab, is_direct=is_direct) for slab in slabs)
        if len(slabs) > 1:  # Beside a slab, the refined logits of all slabs.
            needed += sets.num_entries * math.prod(TILE) * BYTES_OF_RESULT
        size = max(slab.last - slab.first for slab in slabs) * math.prod(problem.grid.shape[1:])
        # In slabs as low as their halos, the planes beside them take as long.
        is_small = (
            problem.largest_slab is None
            or size <= problem.largest_slab
            or slabs[0].stop - slabs[0].start <= 2 * halo
        )
        if is_small and (num_bytes is None or needed <= num_bytes):
            return slabs
    raise CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already, even in slabs of {TILE[0]} planes; "
        f"{format_size(max(0, num_bytes or 0))} are left; allow more memory (--max-memory), or use a mask or a smaller region"
    )
