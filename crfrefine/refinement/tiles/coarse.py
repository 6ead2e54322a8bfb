"""Logits of a network on a coarser grid.

They are interpolated tile by tile, and only where a label may matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box, bounding_box, relative
from crfrefine.arrays.probabilities import leave_out, take_logarithms
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
from crfrefine.base.limits import available_threads
from crfrefine.base.workers import run_all
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.grid import (
    TILE,
    EntryNumbers,
    LabelSets,
    TileGrid,
    TileNumbers,
    tiles_around,
)
from crfrefine.refinement.tiles.planning import MAX_SHARED_VOXELS, lazy_problem, mask_on_tiles
from crfrefine.refinement.tiles.problem import ChannelSource, TilePlan, TileProblem, fill_by_rows
from crfrefine.refinement.tiles.streaming import StoredChannels, StreamedNetwork, survey_stream
from crfrefine.refinement.tiles.survey import Presence, Survey, Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.refinement.given import Case

# Nats by which a label may fall from a voxel of the network to the next before channels are read
# once more: interpolation needs a label's logits at all neighbors of where it may matter.
MARGIN = 32.0


@dataclass(frozen=True, eq=False)
class CoarseNetwork:
    """A network's output on another grid, whose axes are parallel to those of the image."""

    channels: StreamedNetwork  # on the network's grid, with three axes
    interpolation: Interpolation  # from that grid to the image's
    grid_shape: tuple[int, ...]  # of the image, in storage order
    # mm between voxels of that grid along each axis of the image
    network_spacing: tuple[float, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) for users."""
        return (self.channels.num_labels, *reversed(self.grid_shape))


@dataclass(eq=False)
class CoarseChannels(ChannelSource):
    """A network's logits, kept in some tiles of its grid, and interpolated where asked for."""

    store: StoredChannels
    padding: Bool | None  # (*network's grid), True where all labels count as 0; None means nowhere
    grid: TileGrid  # the tiles of the image from `first_plane` on
    interpolation: Interpolation
    threads: int
    first_plane: int = 0

    @property
    def num_bytes(self) -> int:
        """See `ChannelSource`."""
        return self.store.num_bytes

    @cached_property
    def windows(self) -> list[list[tuple[int, int]]]:
        """Along each axis, the samples that each tile of the image depends on; (0, 0) for none."""
        windows = []
        interpolation = self.interpolation
        for axis, (samples, _), tile in zip(
            interpolation.maps, interpolation.taps, TILE, strict=True
        ):
            of_axis = []
            for start in range(0, len(axis.inside), tile):
                part = slice(start, start + tile)
                if axis.inside[part].any():
                    first = int(samples[0, part].min())
                    last = int(samples[-1, part].max())
                    of_axis.append((first, last + 1))
                else:
                    of_axis.append((0, 0))
            windows.append(of_axis)
        return windows

    @cached_property
    def tile_windows(self) -> list[list[tuple[int, int]]]:
        """The tiles of the network's grid that hold the samples of `windows`."""
        tile_windows = []
        for source_axis, of_axis in zip(self.interpolation.axes, self.windows, strict=True):
            tile = TILE[source_axis]
            tile_windows.append([(first // tile, -(-end // tile)) for first, end in of_axis])
        return tile_windows

    @cached_property
    def overshoot(self) -> float:
        """The share of the range of its samples by which a value may lie above all of them."""
        largest_sum = 1.0
        for _, weights in self.interpolation.taps:
            largest_sum *= float(np.abs(weights).sum(axis=0).max())
        return max(0.0, (largest_sum - 1.0) / 2.0)

    def largest_of_tiles(self, values: Array, box: Box, initial: float) -> Array:
        """Return the largest of the values in a box of samples that each tile depends on, (*tiles).

        It is `initial` where a tile depends on none of them.
        """
        start = [box[axis].start for axis in self.interpolation.axes]
        by_axis = values.transpose(self.interpolation.axes)
        return _largest_in(by_axis, start, self.windows, initial)

    def largest_around(self, values: Float32) -> Float32:
        """Return the largest value of the network's tiles that each tile depends on, (*tiles)."""
        by_axis = values.transpose(self.interpolation.axes)
        return _largest_in(by_axis, (0, 0, 0), self.tile_windows, -np.inf)

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """See `ChannelSource`."""
        needed = domains
        for axis, (of_axis, source_axis) in enumerate(
            zip(self.tile_windows, self.interpolation.axes, strict=True)
        ):
            count = self.store.grid.counts[source_axis]
            tiles = np.moveaxis(needed, 1 + axis, 0)
            around = np.zeros((count, *tiles.shape[1:]), np.bool_)
            for source_tiles, (first, end) in zip(tiles, of_axis, strict=True):
                around[first:end] |= source_tiles
            needed = np.moveaxis(around, 0, 1 + axis)
        order = [1 + self.interpolation.axes.index(axis) for axis in range(3)]
        self.store.ensure(np.ascontiguousarray(needed.transpose(0, *order)), threads)

    def planes(self, start: int, stop: int) -> CoarseChannels:
        """See `ChannelSource`."""
        grid = self.grid.with_planes(stop - start)
        return replace(self, grid=grid, first_plane=self.first_plane + start)

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        values_of = partial(self.interpolation.of_box, partial(self.coarse, label))
        fill_by_rows(
            self.grid, self.first_plane, values_of, tiles, entries, out, threads=self.threads
        )

    def coarse(self, label: int, box: Box, missing: float = 0.0) -> Float32:
        """Return a label's logits in a box of the network's grid; `missing` where none are kept."""
        store = self.store
        grid = store.grid
        tiles, values = store.joined(label)
        places = np.stack(np.unravel_index(tiles, grid.counts))
        tile_box = tiles_around(box)
        first = np.array([[along.start] for along in tile_box])
        stop = np.array([[along.stop] for along in tile_box])
        is_around = (places >= first) & (places < stop)
        chosen = np.flatnonzero(is_around.all(axis=0))
        kept = values[chosen].astype(np.float32)
        if store.is_probability:
            take_logarithms(kept)

        around = grid.voxels_in(tile_box)
        part = TileGrid([along.stop - along.start for along in around])
        places_in_part = places[:, chosen] - first
        in_part = np.ravel_multi_index(tuple(places_in_part), part.counts)
        spread = part.spread(in_part, kept)
        logits = np.ascontiguousarray(spread[relative(box, around)])
        np.copyto(logits, np.float32(missing), where=np.isnan(logits))
        if self.padding is not None:
            logits[self.padding[box]] = 0.0
        return logits


def _largest_in(
    values: Array, start: Sequence[int], windows: list[list[tuple[int, int]]], initial: float
) -> Array:
    """Return the largest of the values in windows along each axis; `initial` without any."""
    for first, ends in zip(start, windows, strict=True):
        rows = []
        for low, high in ends:
            part = values[max(0, low - first) : max(0, high - first)]
            rows.append(part.max(axis=0, initial=initial))
        # The next axis comes first; after three axes the order is the first one.
        values = np.moveaxis(np.stack(rows), 0, -1)
    return values


def plan_coarse(network: CoarseNetwork, case: Case) -> TilePlan:
    """Return the labels that are present in each tile of the image.

    The channels stream by on the network's grid; voxels outside that grid are background. Errors
    are those of `plan_stream`.
    """
    spec = case.model
    grid = TileGrid(network.grid_shape)
    thresholds = find_thresholds(case.parameters.mean_field.label_threshold, spec)
    margin = MARGIN / spec.mean_field.temperature
    kept = Thresholds(thresholds.may_matter, thresholds.may_matter - margin)
    coarse_grid = TileGrid(network.channels.grid_shape)
    reach = (network.interpolation.reach,) * 3
    survey, candidates, note = survey_stream(
        network.channels, coarse_grid, spec.mean_field, None, kept, case.context, reach
    )
    padding = survey.padding()
    if padding is not None:
        survey.mask, *_ = leave_out(padding, None, "logits")
    coarse_labels = survey.labels
    survey.release()
    store, _ = candidates.store(survey, reach, case.context)
    threads = case.context.threads or available_threads()
    source = CoarseChannels(store, padding, grid, network.interpolation, threads)

    covered = _covered(network.interpolation, padding, grid)
    mask = mask_on_tiles(case.image, grid)
    num_padding = 0
    notes = tuple[str, ...]()
    if not covered.all():
        mask, num_padding, notes = leave_out(~covered, mask, "logits")
    likeliest = _where_likeliest(source, coarse_labels, spec.mean_field.num_labels)
    source.ensure(likeliest, threads)
    lowest, sums = _best_of(source, likeliest, _bias(spec), covered, mask)
    bounds = _bounds(source, survey, likeliest, lowest, spec, thresholds)
    problem = lazy_problem(case, grid, source, bounds, mask, thresholds)
    problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    possible = problem.label_sets().domains
    source.ensure(possible, threads)
    labels, presence, best = _interpolated(source, problem, possible, sums, thresholds)
    labels[~covered] = 0
    problem = replace(problem, presence=presence)
    return TilePlan(
        problem,
        problem.label_sets(),
        best / spec.mean_field.temperature,
        labels=labels.reshape(network.grid_shape),
        notes=(note, *notes),
        num_padding=num_padding,
    )


def _bias(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the bias of each label, (L,)."""
    run = spec.mean_field
    if run.bias is None:
        return np.zeros(run.num_labels, np.float32)
    return np.asarray(run.bias, np.float32)


def _where_likeliest(source: CoarseChannels, coarse_labels: Labels, num_labels: int) -> Bool:
    """Return (L, *tiles), where a label is the likeliest at a sample that a tile depends on."""
    from scipy import ndimage

    likeliest = np.zeros((num_labels, *source.grid.counts), np.bool_)
    # The first object has the number 1.
    boxes = ndimage.find_objects(coarse_labels + np.uint16(1), num_labels)
    for label, box in enumerate(boxes):
        if box is not None:
            is_label = coarse_labels[box] == label
            likeliest[label] = source.largest_of_tiles(is_label, box, False)
    return likeliest


def _best_of(
    source: CoarseChannels,
    likeliest: Bool,
    bias: NDArray[np.float32],
    covered: Bool,
    mask: Bool | None,
) -> tuple[Float32, Float64]:
    """Return the lowest value, and the sum, of the largest of some labels' logits in each tile.

    The logits have their bias. The lowest one, (*tiles), is that of covered voxels, and infinite
    without any; the sum, (*tiles), is that of voxels inside the mask.
    """
    grid = source.grid
    lowest = np.empty(grid.counts, np.float32)
    sums = np.empty(grid.counts)

    def fill(row: int) -> None:
        planes = grid.planes_of_row(row)
        part = grid.with_planes(planes.stop - planes.start)
        best = np.full(part.shape, -np.inf, np.float32)
        for label in map(int, np.flatnonzero(likeliest[:, row].any(axis=(1, 2)))):
            tiles = likeliest[label, row : row + 1]
            tile_box = bounding_box(tiles)
            assert tile_box is not None
            box = part.voxels_in(tile_box)
            of_grid = (planes, *box[1:])
            logits = source.interpolation.of_box(partial(source.coarse, label), of_grid)
            logits += bias[label]
            is_more = part.voxels(tiles)[box] & (logits > best[box])
            np.copyto(best[box], logits, where=is_more)
        inside = None if mask is None else mask[planes]
        (sums[row],) = part.reduced(np.add, best, np.float64, inside)
        best[~covered[planes]] = np.inf
        (lowest[row],) = part.reduced(np.minimum, best, np.float32)

    jobs = [partial(fill, row) for row in range(grid.counts[0])]
    run_all(jobs, source.threads)
    return lowest, sums


def _bounds(
    source: CoarseChannels,
    survey: Survey,
    likeliest: Bool,
    lowest: Float32,
    spec: ModelSpec,
    thresholds: Thresholds,
) -> Presence:
    """Return where labels may be present, or be the largest ones without their bias, or may matter.

    Elsewhere all samples that a tile depends on are far below `lowest`, the largest logits there.
    """
    bias = _bias(spec)
    # How far below the largest logit a label may be.
    of_present = np.maximum(-spec.mean_field.temperature * thresholds.present, bias.max() - bias)
    of_others = np.maximum(-spec.mean_field.temperature * thresholds.may_matter, of_present)
    has_voxels = np.isfinite(lowest)
    lowest = np.where(has_voxels, lowest, np.float32(0.0))
    smallest, largest = survey.ranges
    if survey.is_probability:
        take_logarithms(survey.ranges)
    next_to_padding = None
    if source.padding is not None:
        whole_grid = tuple(slice(0, extent) for extent in source.padding.shape)
        next_to_padding = source.largest_of_tiles(source.padding, whole_grid, False)

    bounds = Presence(likeliest & has_voxels, np.empty_like(likeliest))
    for label in range(len(likeliest)):
        highest = _highest_logits(source, label, largest[label])
        if next_to_padding is not None:  # Padding counts as 0.
            np.maximum(highest, 0.0, out=highest, where=next_to_padding)
        if source.overshoot > 0.0:
            deepest = -source.largest_around(-smallest[label])
            if next_to_padding is not None:
                np.minimum(deepest, 0.0, out=deepest, where=next_to_padding)
            highest += source.overshoot * np.maximum(highest - deepest, 0.0)
        depth = lowest - (highest + bias[label])
        bounds.present[label] |= has_voxels & (depth <= of_present[label])
        bounds.may_matter[label] = has_voxels & (depth <= of_others[label])
    return bounds


def _highest_logits(source: CoarseChannels, label: int, largest: Float32) -> Float32:
    """Return the largest sample of a label that each tile depends on, (*tiles).

    `largest` is the largest in each tile of the network's grid, for those that are not kept.
    """
    store = source.store
    tiles, _ = store.joined(label)
    is_kept = np.zeros(store.grid.counts, np.bool_)
    is_kept.flat[tiles] = True
    highest = source.largest_around(np.where(is_kept, -np.inf, largest))
    tile_box = bounding_box(is_kept)
    if tile_box is not None:
        box = store.grid.voxels_in(tile_box)
        logits = source.coarse(label, box, missing=-np.inf)
        np.maximum(highest, source.largest_of_tiles(logits, box, -np.inf), out=highest)
    return highest


def _covered(interpolation: Interpolation, padding: Bool | None, grid: TileGrid) -> Bool:
    """Return (*grid), True at voxels of the image on the network's grid, without its padding."""
    planes, rows, columns = [axis.inside for axis in interpolation.maps]
    covered = planes[:, None, None] & rows[:, None] & columns
    if padding is None:
        return covered

    def no_padding(box: Box) -> Float32:
        return (~padding[box]).astype(np.float32)

    linear = Interpolation(interpolation.grid_map, interpolation.nearest)
    for row in range(grid.counts[0]):
        of_row = grid.planes_of_row(row)
        box = (of_row, slice(0, grid.shape[1]), slice(0, grid.shape[2]))
        covered[of_row] &= linear.of_box(no_padding, box) > 0
    return covered


def _interpolated(
    source: CoarseChannels,
    problem: TileProblem,
    possible: Bool,
    sums: Float64,
    thresholds: Thresholds,
) -> tuple[Labels, Presence, Float64]:
    """Return the label of the largest interpolated logit, where labels are, and sums of logits.

    Labels are interpolated where they are possible, (L, *tiles); elsewhere the bounds of the
    problem say where they may matter. The label map is (*grid). The sums, (*tiles), are those of
    the largest logits inside the mask, bias included; `sums` has those of tiles where a single
    label is possible.
    """
    spec = problem.spec
    mask = problem.mask
    grid = problem.grid
    bias = _bias(spec)
    temperature = np.float32(spec.mean_field.temperature)
    labels: Labels = np.zeros(grid.shape, np.min_scalar_type(len(possible) - 1))
    may_matter = problem.presence.may_matter & ~possible
    presence = Presence(np.zeros_like(possible), may_matter)
    best = sums.copy()

    def fill(row: int) -> None:
        planes = grid.planes_of_row(row)
        part = source.planes(planes.start, planes.stop)
        sets = LabelSets(part.grid, np.ascontiguousarray(possible[:, row : row + 1]))
        settled = part.grid.voxels(sets.settled)
        labels[planes] = np.where(settled > 0, settled, 0)
        inside = np.ones(part.grid.shape, np.bool_) if mask is None else mask[planes]
        has_voxels = part.grid.reduced(np.logical_or, inside, np.bool_)
        is_single = (sets.num_labels_of == 1) & has_voxels
        of_row = presence.in_rows(slice(row, row + 1))
        for target in of_row:
            target |= sets.domains & is_single
        if not sets.num_entries:
            return

        logits = part.of_entries(sets, 1)
        sets.engine(None, 1).decode(logits, labels[planes])
        logits += bias[sets.labels][:, None]
        inside_tiles = part.grid.by_tile(inside, sets.tiles)
        margins, largest = _margins(logits, sets, inside_tiles, temperature)
        best[row].flat[sets.tiles] = largest.sum(axis=1, dtype=float, where=inside_tiles)
        for label, (tiles, entries) in enumerate(sets.entries):
            of_label = margins[entries]
            of_row.present[label].flat[tiles] = of_label > thresholds.present[label]
            of_row.may_matter[label].flat[tiles] = of_label > thresholds.may_matter[label]

    jobs = [partial(fill, row) for row in range(grid.counts[0])]
    run_all(jobs, source.threads)
    return labels, presence, best


def _margins(
    logits: Float32, sets: LabelSets, inside: Bool, temperature: np.float32
) -> tuple[Float32, Float32]:
    """Return the logarithm of each entry's largest probability, and the largest logits.

    The logits are (entries, voxels of a tile), bias included, the largest ones (active tiles,
    voxels of a tile), as the voxels `inside`, which count.
    """
    starts = sets.first_entry[:-1]
    number_of_tile = np.repeat(np.arange(len(starts)), np.diff(sets.first_entry))
    largest = np.maximum.reduceat(logits, starts, axis=0)
    logits = (logits - largest[number_of_tile]) / temperature
    log_sums = np.log(np.add.reduceat(np.exp(logits), starts, axis=0))
    log_sums[~inside] = np.inf
    margins: Float32 = (logits - log_sums[number_of_tile]).max(axis=1)
    return margins, largest
