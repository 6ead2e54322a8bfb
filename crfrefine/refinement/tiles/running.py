"""The mean field of the C++ engine on label sets, at once or slab by slab.

Messages are direct sums, tile by tile, or come from the filters of a whole volume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box, widen
from crfrefine.base.array_types import Bool, Float32
from crfrefine.base.limits import format_size
from crfrefine.engines.base import (
    Backend,
    GridImage,
    MeanFieldReport,
    RunContext,
    default_origin,
    of_part,
)
from crfrefine.engines.cpu import CpuKernels
from crfrefine.errors import CapacityError, ConfigError
from crfrefine.refinement.tiles.grid import (
    MAX_DIMS,
    TILE,
    TILE_VOXELS,
    Extents,
    LabelSets,
    num_rings,
)
from crfrefine.refinement.tiles.planning import GROUP, sums_are_direct
from crfrefine.refinement.tiles.problem import DenseChannels, Slab, TileProblem
from crfrefine.refinement.tiles.survey import Presence

# Share of the threshold by which marginals of a row may have changed before it sends them again.
UNSENT = 0.05


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

    @classmethod
    def without_steps(cls, sets: LabelSets, values: Float32) -> RefinedTiles:
        """Return the result where no step could change the logits."""
        exceeds = np.zeros(len(values), np.uint8)
        return cls(sets, values, exceeds, MeanFieldReport(0, True, ()))


@dataclass(frozen=True)
class Method:
    """How a run on tiles is made."""

    backend: Backend  # builds the filters of a whole volume
    context: RunContext
    is_direct: bool  # whether messages are direct sums
    has_room: bool  # whether direct sums may copy the whole volume before the first step


_NONE = np.zeros(0, np.int32)


class Filters(NamedTuple):
    """The filters of a whole volume, whose channels some labels share, or direct sums."""

    names: tuple[str, ...]  # a line for each kernel
    built: Any = None  # the engine's own kernels; None means direct sums
    num_channels: int = 0
    of_entry: NDArray[np.int32] = _NONE  # (entries), the channel of each entry
    # (*tiles), the channel of the label of each settled tile; -1 means that a tile is not settled
    of_settled: NDArray[np.int32] = _NONE


def run_tiles(problem: TileProblem, sets: LabelSets, method: Method) -> RefinedTiles:
    """Run the mean field on label sets, at least one of them active."""
    context = method.context
    kernels = problem.spec.kernels
    run = problem.spec.mean_field
    engine = sets.engine(problem.mask, context.threads)
    logits = problem.source.of_entries(sets, context.threads)
    if run.bias is not None:
        bias = np.asarray(run.bias, np.float32)
        logits += bias[sets.labels][:, None]
    if not kernels.kernels:  # No message changes the logits.
        logits /= np.float32(run.temperature)
        return RefinedTiles.without_steps(sets, logits)

    # (active tiles, rows), a bit for each voxel, or filtered row, that is not settled
    is_open = np.empty((len(sets.tiles), math.prod(TILE[:2])), np.uint16)
    engine.open_voxels(logits, run.temperature, problem.settled, not method.is_direct, is_open)
    started = time.perf_counter()
    image = problem.normalized()
    filters = _choose_filters(problem, sets, image, is_open, method)
    bilateral, spatial = _bandwidths(problem)
    may_matter = None if problem.threshold is None else problem.presence.may_matter
    out = np.empty_like(logits)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    prepared = time.perf_counter()

    outcome = engine.run(
        kernels=filters.built,
        num_channels=filters.num_channels,
        of_entry=filters.of_entry,
        of_settled=filters.of_settled,
        image=image,
        bilateral=bilateral,
        spatial=spatial,
        normalization=kernels.normalization,
        model=run,
        open=is_open,
        num_voxels=problem.image.num_voxels,
        progress=context.progress,
        logits=logits,
        out=out,
        may_matter=may_matter,
        reach=problem.reach,
        threshold=problem.threshold or 0.0,
        exceeds=exceeds,
        unsent=UNSENT * problem.precision,
        has_room=method.has_room,
    )
    timings = {"build": prepared - started, "steps": time.perf_counter() - prepared}
    energy = tuple(outcome["energy"])
    report = MeanFieldReport(outcome["num_iterations"], outcome["converged"], energy, filters.names)
    return RefinedTiles(sets, out, exceeds, report, timings)


def _bandwidths(problem: TileProblem) -> tuple[list[tuple[list[float], list[float]]], list[float]]:
    """Return the bandwidths of appearance kernels and the spatial one; positions are in voxels.

    They are along three axes; without a spatial kernel the second result is empty.
    """
    kernels = problem.spec.kernels
    steps = kernels.distances(problem.image.spacing)
    bilateral = []
    spatial: list[float] = []
    for kernel in kernels.kernels:
        sigma = [1.0] * (MAX_DIMS - len(steps))
        for theta, step in zip(kernel.theta_position, steps, strict=True):
            sigma.append(theta / step)
        if kernel.theta_intensity is None:
            spatial = sigma
        else:
            bilateral.append((sigma, list(kernel.theta_intensity)))
    return bilateral, spatial


def _choose_filters(
    problem: TileProblem,
    sets: LabelSets,
    image: Float32,
    is_open: NDArray[np.uint16],
    method: Method,
) -> Filters:
    """Return direct sums, or the filters of the normalized image, (M, *grid).

    Filters are those of the rows with open voxels, and of all voxels that these receive from.
    """
    kernel_set = problem.spec.kernels
    if method.is_direct or not is_open.any():  # Without an open voxel there is nothing to filter.
        tiles = f"{len(sets.tiles)} of {sets.grid.num_tiles} tiles"
        labels = f"{sets.num_entries / len(sets.tiles):.1f} labels each"
        names = []
        for name in kernel_set.names:
            names.append(f"{name}: direct in {tiles}, {labels}")
        return Filters(tuple(names))

    num_channels, of_entry, of_settled = share_channels(sets, num_rings(problem.reach))
    near = rows_near(problem, sets, is_open)
    if problem.mask is not None:
        near &= problem.mask
    shape = problem.grid.shape[MAX_DIMS - len(problem.image.spacing) :]
    values = image.reshape(-1, *shape)
    guide: GridImage = replace(problem.image, values=values)
    origin = guide.origin or default_origin(guide)
    guide = replace(guide, mask=near.reshape(shape), origin=origin)
    # The last channel is for what takes part in no other.
    spec = replace(kernel_set, num_labels=num_channels + 1)
    kernels = method.backend.kernels(guide, spec, method.context)
    assert isinstance(kernels, CpuKernels)
    return Filters(kernels.filters, kernels.built, num_channels, of_entry, of_settled)


def rows_near(problem: TileProblem, sets: LabelSets, is_open: NDArray[np.uint16]) -> Bool:
    """Return (*grid), True within twice the reach of a row of a tile with an open voxel."""
    grid = problem.grid
    num_planes, num_rows, num_columns = grid.shape
    reach = problem.reach
    rows_of_tile = TILE[:2]
    by_tile = np.zeros((grid.num_tiles, *rows_of_tile), np.bool_)
    by_tile[sets.tiles] = is_open.reshape(-1, *rows_of_tile) != 0
    counts = grid.counts
    by_axis = by_tile.reshape(*counts, *rows_of_tile).transpose(0, 3, 1, 4, 2)
    rows = by_axis.reshape(-1, counts[1] * TILE[1], counts[2])
    rows = rows[:num_planes, :num_rows]
    near = widen(rows, (2 * reach[0], 2 * reach[1], 0))
    near = np.repeat(near, TILE[2], axis=-1)
    near = near[..., :num_columns]
    near = widen(near, (0, 0, 2 * reach[2]))
    return np.ascontiguousarray(near)


class _Part(NamedTuple):
    """A part of a label's domain that no message leaves."""

    label: int
    box: Box  # of tiles
    around: Bool  # (*box), the part and the tiles that its messages reach
    inside: Bool  # (*box), the part
    num_tiles: int


def share_channels(
    sets: LabelSets, rings: Extents
) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """Spread labels over as few channels as a simple rule finds.

    Return the number of channels, the channel of each entry, and that of the label of each settled
    tile, (*tiles), or -1.

    Labels share a channel where no message of one can reach the other's domain. Parts of a domain
    that messages can cross between, over so many rings of tiles, stay together. The parts of all
    domains, the largest first, each take the first channel in which no other label is within reach.
    """
    channels: list[NDArray[np.int32]] = []
    counts = sets.grid.counts
    for part in sorted(_parts_of_domains(sets, rings), key=lambda part: -part.num_tiles):
        for channel in channels:
            labels = channel[part.box][part.around]
            if ((labels < 0) | (labels == part.label)).all():
                break
        else:
            channel = np.full(counts, -1, np.int32)
            channels.append(channel)
        channel[part.box][part.inside] = part.label
    channels = _grouped(channels, sets.active)

    of_entry = np.empty(sets.num_entries, np.int32)
    of_settled = np.full(counts, -1, np.int32)
    for number, channel in enumerate(channels):
        is_here = (sets.settled >= 0) & (channel == sets.settled)
        of_settled[is_here] = number
        for label in np.unique(channel[sets.active & (channel >= 0)]):
            tiles, entries = sets.entries[label]
            is_here = channel.flat[tiles] == label
            of_entry[entries[is_here]] = number
    return len(channels), of_entry, of_settled


def _parts_of_domains(sets: LabelSets, rings: Extents) -> list[_Part]:
    """Return the parts of all labels' domains, label by label."""
    from scipy import ndimage

    neighbors = np.ones((3, 3, 3), np.bool_)
    parts = []
    for label, domain in enumerate(sets.domains):
        reached = widen(domain, rings)
        numbered, count = ndimage.label(reached, structure=neighbors)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            around = numbered[box] == number
            inside = around & domain[box]
            num_tiles = int(np.count_nonzero(inside))
            parts.append(_Part(label, box, around, inside, num_tiles))
    return parts


def _grouped(channels: list[NDArray[np.int32]], active: Bool) -> list[NDArray[np.int32]]:
    """Return the channels in an order in which groups have labels in the same tiles.

    Channels of a group are filtered together, wherever one of their labels is. The last channel,
    which takes part in all groups, stays: few tiles have it.
    """
    tiles = [np.flatnonzero(active & (channel >= 0)) for channel in channels[:-1]]
    left = list(range(len(tiles)))
    grouped: list[NDArray[np.int32]] = []
    while left:
        if len(grouped) % GROUP == 0:  # A group begins.
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
    """Run the mean field on the tiles with several labels.

    It runs slab by slab if it does not fit into memory at once. Where a label's marginal was not
    negligible near the border of its domain, the domain grows and all is run again. Messages are
    direct sums with `is_direct`, come from filters with False, and are less work with None.

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
        if not sets.active.any():
            nothing = np.zeros((0, TILE_VOXELS), np.float32)
            return RefinedTiles.without_steps(sets, nothing)
        problem.source.ensure(sets.domains & sets.active, context.threads)
        if is_direct is None:
            is_direct = sums_are_direct(problem, sets)
        held = problem.source.num_bytes
        num_bytes = None if context.num_bytes is None else context.num_bytes - held
        slabs, needed = plan_slabs(problem, sets, num_bytes, is_direct=is_direct)
        context.take(held + needed)
        is_in_memory = isinstance(problem.source, DenseChannels)
        if len(slabs) == 1:
            # The steps need more memory than the copies with two labels at each voxel.
            has_room = is_in_memory or sets.num_entries >= 2 * sets.grid.num_tiles
            refined = run_tiles(problem, sets, Method(backend, context, is_direct, has_room))
        else:
            method = Method(backend, context, is_direct, is_in_memory)
            refined = run_slabs(problem, sets, slabs, method)
        if problem.threshold is None or not refined.exceeds.any():
            return refined

        exceeding = np.zeros_like(sets.domains)
        for label, (tiles, entries) in enumerate(sets.entries):
            exceeds = refined.exceeds[entries] != 0
            exceeding[label].flat[tiles[exceeds]] = True
        del refined  # The next run needs its memory.
        repeats += 1
        if repeats >= MAX_REPEATS:
            exceeding[exceeding.any(axis=(1, 2, 3))] = True
        present, may_matter = problem.presence
        problem = replace(problem, presence=Presence(present | exceeding, may_matter))
        sets = problem.label_sets()


def run_slabs(
    problem: TileProblem, sets: LabelSets, slabs: Sequence[Slab], method: Method
) -> RefinedTiles:
    """Run the mean field slab by slab.

    With direct sums the logits are the same as at once, if all steps are taken.
    """
    # Convergence would have to be judged for all slabs together: all steps are taken, without an
    # energy.
    run = replace(problem.spec.mean_field, tolerance=0.0)
    spec = replace(problem.spec, mean_field=run)
    problem = replace(problem, spec=spec).with_origin()
    values = np.empty((sets.num_entries, TILE_VOXELS), np.float32)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    timings: dict[str, float] = {}
    filters: tuple[str, ...] = ()
    for number, slab in enumerate(slabs):
        part = problem.in_slab(slab)
        part_sets = LabelSets(part.grid, sets.domains[:, slab.rows])
        if not part_sets.active.any():
            continue
        progress = of_part(method.context.progress, number, len(slabs), "slab")
        if progress is not None:
            progress("label sets", 0, 1)
        context = replace(method.context, progress=progress)
        refined = run_tiles(part, part_sets, replace(method, context=context))

        target = sets.entries_in(slab.start, slab.stop)
        first = slab.first
        source = part_sets.entries_in(slab.start - first, slab.stop - first)
        values[target] = refined.values[source]
        exceeds[target] = refined.exceeds[source]
        filters = filters or refined.report.filters
        for stage, seconds in refined.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        del part, refined  # The next slab needs their memory.

    filters = tuple(f"{line}, in {len(slabs)} slabs" for line in filters)
    report = MeanFieldReport(run.num_iterations, False, (), filters)
    return RefinedTiles(sets, values, exceeds, report, timings)


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
    num_modalities = len(problem.image.values)
    active = sets.active[slab.rows]
    voxels = slab.num_planes * math.prod(problem.grid.shape[1:])
    num_labels_of = sets.num_labels_of[slab.rows]
    entries = int(num_labels_of[active].sum())
    total = entries * TILE_VOXELS * BYTES_PER_ENTRY
    if problem.maps is not None:  # The normalized image.
        total += 4 * num_modalities * voxels
    if is_direct:
        near = int(np.count_nonzero(active)) * TILE_VOXELS
        num_kernels = len(problem.spec.kernels.kernels)
        num_copied = min(3 * near, voxels)
        return total + num_copied * 4 * num_kernels
    bytes_of_voxel = BYTES_OF_FILTERS + BYTES_OF_MODALITY * (num_modalities - 1)
    return total + voxels * bytes_of_voxel


def plan_slabs(
    problem: TileProblem, sets: LabelSets, num_bytes: int | None, *, is_direct: bool
) -> tuple[list[Slab], int]:
    """Return as few slabs as fit into a number of bytes, where None means any amount.

    And how many of them they take. Raise CapacityError if no slab fits.
    """
    needed = 0
    # In each step messages, and their normalizations, come from within the reach; in small slabs
    # messages of two steps must cross: those from farther away changed no label of a CT.
    num_crossed = problem.spec.mean_field.num_iterations
    if problem.largest_slab is not None:
        num_crossed = min(2, num_crossed)
    reach = (num_crossed + 1) * problem.reach[0]
    halo = math.ceil(reach / TILE[0]) * TILE[0]
    num_planes = problem.grid.shape[0]
    num_rows = problem.grid.counts[0]
    for count in range(1, num_rows + 1):
        height = math.ceil(num_rows / count) * TILE[0]  # The last slab may be lower.
        slabs = []
        for start in range(0, num_planes, height):
            stop = min(start + height, num_planes)
            last = min(start + height + halo, num_planes)
            slabs.append(Slab(start, stop, max(0, start - halo), last))
        needed = max(slab_bytes(problem, sets, slab, is_direct=is_direct) for slab in slabs)
        if len(slabs) > 1:  # Beside a slab, the refined logits of all slabs.
            needed += sets.num_entries * TILE_VOXELS * BYTES_OF_RESULT
        fits = num_bytes is None or needed <= num_bytes
        if fits and _are_small(problem, slabs, halo):
            return slabs, needed
    raise CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already, even in "
        f"slabs of {TILE[0]} planes; {format_size(max(0, num_bytes or 0))} are left; allow more "
        "memory (--max-memory), or use a mask or a smaller region"
    )


def _are_small(problem: TileProblem, slabs: Sequence[Slab], halo: int) -> bool:
    """Return whether slabs are as small as the problem asks for, or as low as is sensible."""
    if problem.largest_slab is None:
        return True
    # In slabs as low as their halos, the planes beside them take as long.
    if slabs[0].stop - slabs[0].start <= 2 * halo:
        return True
    voxels_of_plane = math.prod(problem.grid.shape[1:])
    return max(slab.num_planes for slab in slabs) * voxels_of_plane <= problem.largest_slab
