"""Logits of a network on a coarser grid.

They are interpolated tile by tile, and only where a label may matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box, bounding_box, relative
from crfrefine.arrays.probabilities import leave_out, take_logarithms
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.base.limits import available_threads, run_all
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
from crfrefine.refinement.tiles.problem import ChannelSource, TilePlan, fill_by_rows
from crfrefine.refinement.tiles.streaming import StoredChannels, StreamedNetwork, survey_stream
from crfrefine.refinement.tiles.survey import Presence, Survey, Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.refinement.stored_case import StoredCase

# A label takes part in a tile if its probability is larger at a voxel that it is interpolated from.
MIN_PROBABILITY = 1e-4
# Nats below that down to which logits are kept: interpolation needs all neighbors.
MARGIN = 5.0


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
    # The sum of the two is a label's logit where none is kept.
    floor_of_voxels: Float32  # (*network's grid)
    floor_of_labels: NDArray[np.float32]  # (L,)
    padding: Bool | None  # (*network's grid), True where all labels count as 0; None means nowhere
    grid: TileGrid  # the tiles of the image from `first_plane` on
    interpolation: Interpolation
    threads: int
    first_plane: int = 0

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

    def coarse(self, label: int, box: Box) -> Float32:
        """Return a label's logits in a box of the network's grid."""
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
        floor = self.floor_of_voxels[box] + self.floor_of_labels[label]
        np.copyto(logits, floor, where=np.isnan(logits))
        if self.padding is not None:
            logits[self.padding[box]] = 0.0
        return logits


def plan_coarse(network: CoarseNetwork, case: StoredCase) -> TilePlan:
    """Return the labels that are present in each tile of the image.

    The channels stream by on the network's grid; voxels outside that grid are background. Errors
    are those of `plan_stream`.
    """
    spec = case.model
    run = spec.mean_field
    grid = TileGrid(network.grid_shape)
    thresholds = find_thresholds(case.parameters.mean_field.label_threshold, spec)
    present = np.minimum(thresholds.present, math.log(MIN_PROBABILITY))
    levels = Thresholds(present, np.minimum(thresholds.may_matter, present))
    # The threshold of kept tiles is lower: interpolation needs a label's logits beside the voxels
    # where it takes part, too.
    kept = Thresholds(levels.may_matter, levels.may_matter - MARGIN)
    coarse_grid = TileGrid(network.channels.grid_shape)
    reach = (network.interpolation.reach,) * 3
    survey, candidates, note = survey_stream(
        network.channels, coarse_grid, run, None, kept, case.context, reach
    )
    padding = survey.padding()
    if padding is not None:
        survey.mask, *_ = leave_out(padding, None, "logits")
    largest = survey.largest
    survey.release()
    store, presence = candidates.store(survey, reach, case.context)
    if padding is not None:
        largest[padding] = 0.0
    source = _source(network, case, survey, store, padding, kept)

    presence = _presence(source, spec, presence.present, levels)
    covered = _covered(network.interpolation, padding, grid)
    labels, best = _interpolated(source, presence.present, largest, covered, case.image.mask)
    mask = mask_on_tiles(case.image, grid)
    num_padding = 0
    notes = tuple[str, ...]()
    if not covered.all():
        mask, num_padding, notes = leave_out(~covered, mask, "logits")
    problem = lazy_problem(case, grid, source, presence, mask, thresholds)
    problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    return TilePlan(
        problem,
        problem.label_sets(),
        best / run.temperature,
        labels=labels.reshape(network.grid_shape),
        notes=(note, *notes),
        num_padding=num_padding,
    )


def _source(
    network: CoarseNetwork,
    case: StoredCase,
    survey: Survey,
    store: StoredChannels,
    padding: Bool | None,
    kept: Thresholds,
) -> CoarseChannels:
    """Return the channels that are kept, with bounds of the logits elsewhere."""
    temperature = np.float32(case.model.mean_field.temperature)
    floor_of_voxels = survey.log_sum * temperature
    if padding is not None:
        floor_of_voxels[padding] = 0.0
    floor_of_labels = temperature * kept.may_matter - _bias(case.model)
    grid = TileGrid(network.grid_shape)
    return CoarseChannels(
        store,
        floor_of_voxels,
        floor_of_labels.astype(np.float32),
        padding,
        grid,
        network.interpolation,
        case.context.threads or available_threads(),
    )


def _bias(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the bias of each label, (L,)."""
    run = spec.mean_field
    if run.bias is None:
        return np.zeros(run.num_labels, np.float32)
    return np.asarray(run.bias, np.float32)


def _presence(source: CoarseChannels, spec: ModelSpec, near: Bool, levels: Thresholds) -> Presence:
    """Return where labels are in the image's tiles; `near` has the tiles of the network's grid."""
    bias = _bias(spec)
    temperature = np.float32(spec.mean_field.temperature)
    interpolation = source.interpolation
    windows = _windows(interpolation, source.grid)
    num_labels = len(near)
    nowhere = np.zeros((num_labels, *source.grid.counts), np.bool_)
    presence = Presence(nowhere, nowhere.copy())

    def find_tiles(label: int) -> None:
        tiles = bounding_box(near[label])
        if tiles is None:
            return
        box = source.store.grid.voxels_in(tiles)
        margins = source.coarse(label, box) - source.floor_of_voxels[box]
        margins = (margins + bias[label]) / temperature
        level = (margins > levels.may_matter[label]).astype(np.uint8)
        level += margins > levels.present[label]
        if source.padding is not None:
            level[source.padding[box]] = 0
        start = [box[axis].start for axis in interpolation.axes]
        highest = _highest(level.transpose(interpolation.axes), start, windows)
        presence.may_matter[label] = highest > 0
        presence.present[label] = highest > 1

    jobs = [partial(find_tiles, label) for label in range(num_labels)]
    run_all(jobs, source.threads)
    return presence


def _windows(interpolation: Interpolation, grid: TileGrid) -> list[list[tuple[int, int]]]:
    """Return, along each axis, the samples that each tile is interpolated from; (0, 0) for none."""
    windows = []
    for axis, (samples, _), tile in zip(interpolation.maps, interpolation.taps, TILE, strict=True):
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


def _highest(
    levels: NDArray[np.uint8], start: Sequence[int], windows: list[list[tuple[int, int]]]
) -> NDArray[np.uint8]:
    """Return the highest level that each tile is interpolated from, (*tiles), of those in a box."""
    for first, ends in zip(start, windows, strict=True):
        rows = []
        for low, high in ends:
            start_of_part = max(0, low - first)
            part = levels[start_of_part : max(0, high - first)]
            rows.append(part.max(axis=0, initial=0))
        # The next axis comes first; after three axes the order is the first one.
        levels = np.moveaxis(np.stack(rows), 0, -1)
    return levels


def _box_of_row(grid: TileGrid, row: int) -> Box:
    """Return the voxels of a row of tiles."""
    num_rows, num_columns = grid.shape[1:]
    return grid.planes_of_row(row), slice(0, num_rows), slice(0, num_columns)


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
        box = _box_of_row(grid, row)
        covered[box] &= linear.of_box(no_padding, box) > 0
    return covered


def _interpolated(
    source: CoarseChannels, domains: Bool, largest: Float32, covered: Bool, mask: Bool | None
) -> tuple[Labels, Float64]:
    """Return the label of the largest interpolated logit, and the sum of the largest logits.

    The label map is (*grid), the sums are those inside the mask, (*tiles), and right for tiles with
    a single label. `largest` has the largest logits on the network's grid.
    """
    grid = source.grid
    dtype = np.min_scalar_type(len(domains) - 1)
    labels: Labels = np.zeros(grid.shape, dtype)
    best = np.zeros(grid.counts)

    def fill(row: int) -> None:
        box = _box_of_row(grid, row)
        planes = box[0]
        part = source.planes(planes.start, planes.stop)
        domains_of_row = np.ascontiguousarray(domains[:, row : row + 1])
        sets = LabelSets(part.grid, domains_of_row)
        settled = part.grid.voxels(sets.settled)
        labels[planes] = np.where(settled > 0, settled, 0)
        if sets.num_entries:
            logits = part.of_entries(sets, 1)
            sets.engine(None, 1).decode(logits, labels[planes])

        sums = source.interpolation.of_box(lambda coarse_box: largest[coarse_box], box)
        counts = covered[planes]
        if mask is not None:
            counts = counts & mask.reshape(grid.shape)[planes]
        (of_row,) = part.grid.reduced(np.add, sums, np.float64, counts)
        best[row] = of_row

    jobs = [partial(fill, row) for row in range(grid.counts[0])]
    run_all(jobs, source.threads)
    labels[~covered] = 0
    return labels, best
