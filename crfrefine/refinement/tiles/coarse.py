"""Logits of a network on a coarser grid: interpolated tile by tile, and only where a label may matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box, bounding_box
from crfrefine.arrays.probabilities import leave_out, take_logarithms
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.array_types import Bool, Float32, Labels
from crfrefine.base.limits import available_threads, run_all
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid
from crfrefine.refinement.tiles.planning import MAX_SHARED_VOXELS, TilePlan, lazy_problem
from crfrefine.refinement.tiles.problem import ChannelSource, fill_by_rows
from crfrefine.refinement.tiles.streaming import StoredChannels, StreamedNetwork, survey_stream
from crfrefine.refinement.tiles.survey import Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.engines.base import GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters

# A label takes part in a tile if its probability is larger at a voxel that it is interpolated from.
MIN_PROBABILITY = 1e-4
# Nats below that down to which logits are kept: interpolation needs all neighbors.
MARGIN = 5.0


@dataclass(frozen=True, eq=False)
class CoarseNetwork:
    """A network's output on a grid of its own, whose axes are parallel to those of the image."""

    channels: StreamedNetwork  # on the network's grid, with three axes
    interpolation: Interpolation  # from that grid to the image's
    grid_shape: tuple[int, ...]  # of the image, in storage order
    # mm between voxels of that grid along each axis of the image
    network_spacing: tuple[float, ...] | None = None


@dataclass(eq=False)
class CoarseChannels(ChannelSource):
    """A network's logits, kept in some tiles of its own grid, and interpolated where they are asked for."""

    store: StoredChannels
    # (*network's grid) and (L,): their sum is a label's logit where none is kept
    floors: tuple[Float32, NDArray[np.float32]]
    padding: Bool | None  # (*network's grid), True where all labels count as 0; None means nowhere
    grid: TileGrid  # the tiles of the image from `first_plane` on
    interpolation: Interpolation
    threads: int
    first_plane: int = 0

    def planes(self, start: int, stop: int) -> CoarseChannels:
        """See `ChannelSource`."""
        return replace(
            self,
            grid=TileGrid((stop - start, *self.grid.shape[1:])),
            first_plane=self.first_plane + start,
        )

    def fill_entries(
        self,
        engine: Any,
        label: int,
        tiles: NDArray[np.int64],
        entries: NDArray[np.int64],
        out: Float32,
    ) -> None:
        """See `ChannelSource`."""
        values_of = partial(self.interpolation.of_box, partial(self.coarse, label))
        fill_by_rows(
            self.grid, self.first_plane, values_of, tiles, entries, out, threads=self.threads
        )

    def coarse(self, label: int, box: Box) -> Float32:
        """Return a label's logits in a box of the network's grid."""
        grid = self.store.grid
        tiles, values = self.store.joined(label)
        places = np.stack(np.unravel_index(tiles, grid.counts))
        first = np.array([axis.start // tile for axis, tile in zip(box, TILE, strict=True)])
        stop = np.array([-(-axis.stop // tile) for axis, tile in zip(box, TILE, strict=True)])
        some = np.flatnonzero(((places >= first[:, None]) & (places < stop[:, None])).all(axis=0))
        start = first * TILE
        part = TileGrid(tuple(np.minimum(stop * TILE, grid.shape) - start))
        inner = np.ravel_multi_index(tuple(places[:, some] - first[:, None]), part.counts)
        kept = values[some].astype(np.float32)
        if self.store.is_probability:
            take_logarithms(kept)
        spread = part.spread(inner, kept)
        logits = np.ascontiguousarray(
            spread[
                tuple(
                    slice(a.start - s, a.stop - s) for a, s in zip(box, start.tolist(), strict=True)
                )
            ]
        )
        by_voxel, by_label = self.floors
        np.copyto(logits, by_voxel[box] + by_label[label], where=np.isnan(logits))
        if self.padding is not None:
            logits[self.padding[box]] = 0.0
        return logits


def plan_coarse(
    network: CoarseNetwork,
    image: GridImage,
    spec: ModelSpec,
    parameters: CrfParameters,
    context: RunContext,
) -> TilePlan:
    """Return the labels that are present in each tile of the image, from channels that stream by on the network's grid."""
    # Voxels outside the network's grid are background. Errors are those of `plan_stream`.
    run = spec.mean_field
    threads = context.threads or available_threads()
    coarse_grid = TileGrid(network.channels.grid_shape)
    grid = TileGrid(network.grid_shape)
    interpolation = network.interpolation
    wanted = find_thresholds(parameters.mean_field.label_threshold, spec)
    present_above = np.minimum(wanted.present, math.log(MIN_PROBABILITY))
    matters_above = np.minimum(wanted.may_matter, present_above)
    # A lower threshold for what is kept: a label's logits go on beside the voxels where it takes
    # part.
    kept_above = matters_above - MARGIN
    kept = Thresholds(matters_above, kept_above)
    reach = (interpolation.reach,) * 3
    survey, candidates, note = survey_stream(
        network.channels, coarse_grid, run, None, kept, context, reach
    )
    padding = survey.padding()
    if padding is not None:
        survey.mask, *_ = leave_out(padding, None, "logits")
    largest = survey.largest
    temperature = np.float32(run.temperature)
    if run.bias is None:
        bias = np.zeros(run.num_labels, np.float32)
    else:
        bias = np.asarray(run.bias, np.float32)
    survey.release()
    store, near, _ = candidates.store(survey, reach, context)
    by_voxel = survey.log_sum * temperature
    if padding is not None:
        by_voxel[padding] = 0.0
        largest[padding] = 0.0
    floors = by_voxel, (temperature * kept_above - bias).astype(np.float32)
    source = CoarseChannels(store, floors, padding, grid, interpolation, threads)

    present, may_matter = np.zeros((2, run.num_labels, *grid.counts), np.bool_)
    windows = _windows(interpolation, grid)

    def find_tiles(label: int) -> None:
        tiles = bounding_box(near[label])
        if tiles is None:
            return
        box = tuple(
            slice(along.start * tile, min(along.stop * tile, extent))
            for along, tile, extent in zip(tiles, TILE, coarse_grid.shape, strict=True)
        )
        margins = (source.coarse(label, box) - by_voxel[box] + bias[label]) / temperature
        levels = (margins > matters_above[label]).astype(np.uint8)
        levels += margins > present_above[label]
        if padding is not None:
            levels[padding[box]] = 0
        highest = _highest(
            levels.transpose(interpolation.axes),
            [box[axis].start for axis in interpolation.axes],
            windows,
        )
        may_matter[label] = highest > 0
        present[label] = highest > 1

    run_all([partial(find_tiles, label) for label in range(run.num_labels)], threads)
    covered = _covered(interpolation, padding, grid)
    labels, best = _interpolated(source, present, largest, covered, image.mask, threads)
    inside = None if image.mask is None else np.ascontiguousarray(image.mask).reshape(grid.shape)
    num_padding = 0
    notes = tuple[str, ...]()
    if not covered.all():
        inside, num_padding, notes = leave_out(~covered, inside, "logits")
    problem = lazy_problem(
        grid, source, (present, may_matter), image, inside, spec, parameters, wanted
    )
    problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    stored = labels.reshape(network.grid_shape)
    return TilePlan(
        problem,
        problem.label_sets(),
        best / run.temperature,
        None,
        labels=stored,
        notes=(note, *notes),
        num_padding=num_padding,
    )


def _windows(interpolation: Interpolation, grid: TileGrid) -> list[list[tuple[int, int]]]:
    """Return, along each axis of the image, the samples that each tile is interpolated from.

    None where a tile is outside of them.
    """
    windows = []
    for axis, (samples, _), tile in zip(interpolation.maps, interpolation.taps, TILE, strict=True):
        inside = axis.inside
        parts = [slice(start, start + tile) for start in range(0, len(inside), tile)]
        ends = [(int(samples[0, part].min()), int(samples[-1, part].max()) + 1) for part in parts]
        windows.append(
            [end if inside[part].any() else (0, 0) for end, part in zip(ends, parts, strict=True)]
        )
    return windows


def _highest(
    levels: NDArray[np.uint8], start: Sequence[int], windows: list[list[tuple[int, int]]]
) -> NDArray[np.uint8]:
    """Return the highest level that each tile of the image is interpolated from, (*tiles)."""
    # `levels` are those of a box that begins at `start`, in the image's order of axes; 0 elsewhere.
    for first, ends in zip(start, windows, strict=True):
        rows = [
            levels[max(0, low - first) : max(0, high - first)].max(axis=0, initial=0)
            for low, high in ends
        ]
        # The next axis comes first; after three axes the order is the first one.
        levels = np.moveaxis(np.stack(rows), 0, -1)
    return levels


def _covered(interpolation: Interpolation, padding: Bool | None, grid: TileGrid) -> Bool:
    """Return (*grid), True at the voxels of the image that lie on the network's grid, and not in its padding alone."""
    along = [axis.inside for axis in interpolation.maps]
    covered = along[0][:, None, None] & along[1][:, None] & along[2]
    if padding is not None:
        linear = Interpolation(interpolation.grid_map, interpolation.nearest)
        for start in range(0, grid.shape[0], TILE[0]):
            box = (
                slice(start, min(start + TILE[0], grid.shape[0])),
                *(slice(0, extent) for extent in grid.shape[1:]),
            )
            covered[box] &= (
                linear.of_box(lambda source_box: (~padding[source_box]).astype(np.float32), box) > 0
            )
    return covered


def _interpolated(
    source: CoarseChannels,
    domains: Bool,
    largest: Float32,
    covered: Bool,
    mask: Bool | None,
    threads: int,
) -> tuple[Labels, NDArray[np.float64]]:
    """Return the label of the largest interpolated logit, (*grid), and the sum of the largest logits inside the mask, (*tiles)."""
    # `largest`: the largest logits on the network's grid. Sums are right for tiles with a single
    # label.
    grid = source.grid
    labels: Labels = np.zeros(grid.shape, np.min_scalar_type(len(domains) - 1))
    best = np.zeros(grid.counts)

    def fill(row: int) -> None:
        planes = slice(row * TILE[0], min((row + 1) * TILE[0], grid.shape[0]))
        part = source.planes(planes.start, planes.stop)
        sets = LabelSets(part.grid, np.ascontiguousarray(domains[:, row : row + 1]))
        only = part.grid.voxels(sets.settled)
        labels[planes] = np.where(only > 0, only, 0)
        if sets.num_entries:
            sets.engine(None, 1).decode(part.of_entries(sets, 1), labels[planes])
        box = (planes, *(slice(0, extent) for extent in grid.shape[1:]))
        sums = source.interpolation.of_box(lambda source_box: largest[source_box], box)
        if mask is None:
            counts = covered[planes]
        else:
            counts = covered[planes] & mask.reshape(grid.shape)[planes]
        best[row] = part.grid.reduced(np.add, sums, np.float64, counts)[0]

    run_all([partial(fill, row) for row in range(grid.counts[0])], threads)
    labels[~covered] = 0
    return labels, best
