"""Channels on a network's coarser grid, and where their labels take part.

They are interpolated tile by tile, where they are asked for.
"""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np

from crfrefine.arrays.label_maps import Box, bounding_box, relative
from crfrefine.arrays.network import StreamedNetwork
from crfrefine.arrays.padding import leave_out
from crfrefine.arrays.resampling import Interpolation
from crfrefine.arrays.softmax import take_logarithms
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Integers, Labels
from crfrefine.base.limits import available_threads, run_all
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.channels import BoxedChannels
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid, label_sets, tiles_around
from crfrefine.refinement.tiles.streaming import survey_stream
from crfrefine.refinement.tiles.survey import Thresholds

# Nats by which a label may fall from a voxel of the network to the next before channels are read
# once more: interpolation needs a label's logits at all neighbors of where it may matter.
MARGIN = 32.0
FIRST_CORNER = (slice(0, 0),) * 3


class CoarseChannels(BoxedChannels):
    """A network's logits, kept in some tiles of its grid, and interpolated where asked for.

    Attributes:
        bias: (L,) float32, that of each label.
        store: the channels in some tiles of the network's grid.
        ranges: (2, L, *network's tiles), the smallest and the largest logit of a label in a tile.
        padding: (*network's grid), True where all labels count as 0; None means nowhere.
        grid: the tiles of the image.
        thresholds: those of labels in the image's tiles.
        labels: (*network's grid), the label of the largest logit.
        note: on the kind of the channels.
    """

    def __init__(self, network: StreamedNetwork, case: CaseToRefine) -> None:
        """Let channels stream by, and keep them where labels may take part.

        Errors are those of `plan_stream`.
        """
        interpolation = network.interpolation
        assert interpolation is not None
        self.interpolation = interpolation
        self.thresholds = thresholds = case.thresholds
        self.mean_field = mean_field = case.model.mean_field
        self.threads = case.context.threads or available_threads()
        self.grid = TileGrid(network.grid_shape)
        grid = TileGrid(interpolation.grid_map.source_shape)
        reach = (interpolation.reach,) * 3
        lowest = thresholds.may_matter - MARGIN / mean_field.temperature
        kept = Thresholds(np.full(mean_field.num_labels, thresholds.may_matter), lowest)
        survey, self.store, self.note = survey_stream(network, case, grid, None, kept, reach)
        self.padding = survey.padding()
        survey.mask, *_ = leave_out(self.padding, None, "logits")
        self.labels = survey.labels
        self.store.choose()
        self.num_bytes = self.store.num_bytes
        self.bias = np.asarray(survey.bias, np.float32)
        self.ranges = self.store.ranges
        if survey.is_probability:
            take_logarithms(self.ranges)

    @cached_property
    def windows(self) -> list[Integers]:
        """Along each axis, (tiles, 2), the samples from one to another that each tile depends on.

        They end before they begin, at 0, for tiles of the image outside the network's grid.
        """
        windows = []
        interpolation = self.interpolation
        inside_along = interpolation.grid_map.inside_along
        for inside, (samples, _), tile in zip(inside_along, interpolation.taps, TILE, strict=True):
            starts = np.arange(0, len(inside), tile)
            first = np.minimum.reduceat(samples[0], starts)
            end = np.maximum.reduceat(samples[-1], starts) + 1
            end *= np.logical_or.reduceat(inside, starts)
            windows.append(np.stack([first, end], axis=1))
        return windows

    @cached_property
    def tile_windows(self) -> list[Integers]:
        """The tiles of the network's grid that hold the samples of `windows`."""
        tile_windows = []
        for source_axis, window in zip(self.interpolation.axes, self.windows, strict=True):
            tile = TILE[source_axis]
            first, end = window.T
            tile_windows.append(np.stack([first // tile, -(-end // tile)], axis=1))
        return tile_windows

    @cached_property
    def overshoot(self) -> float:
        """The share of the range of its samples by which a value may lie above all of them."""
        largest_sum = 1.0
        for _, weights in self.interpolation.taps:
            largest_sum *= float(np.abs(weights).sum(axis=0).max())
        return max(0.0, (largest_sum - 1.0) / 2.0)

    def largest_in(
        self,
        windows: list[Integers],
        values: Array,
        initial: float,
        box: Box = FIRST_CORNER,
    ) -> Array:
        """Return the largest value of the window of each tile of the image, (*tiles).

        The values lie on the network's grid from the start of a box on, or are those of its tiles.
        In windows without one it is `initial`.
        """
        largest = values.transpose(self.interpolation.axes)
        for source_axis, of_axis in zip(self.interpolation.axes, windows, strict=True):
            rows = []
            for first, end in (of_axis - box[source_axis].start).clip(0):
                rows.append(largest[first:end].max(axis=0, initial=initial))
            # The next axis comes first; after three axes the order is the first one.
            largest = np.moveaxis(np.stack(rows), 0, -1)
        return largest

    def ensure(self, domains: Bool) -> None:
        """See `ChannelSource`."""
        axes = self.interpolation.axes
        needed = np.moveaxis(domains, 0, -1)
        for source_axis, of_axis in zip(axes, self.tile_windows, strict=True):
            count = self.store.grid.counts[source_axis]
            around = np.zeros((count, *needed.shape[1:]), np.bool_)
            for tiles, (first, end) in zip(needed, of_axis, strict=True):
                around[first:end] |= tiles
            # The next axis comes first; after three axes that of the labels does.
            needed = np.moveaxis(around, 0, -1)
        order = 1 + np.argsort(axes)
        self.store.ensure(np.ascontiguousarray(needed.transpose(0, *order)))
        self.num_bytes = self.store.num_bytes

    def of_box(self, label: int, box: Box) -> Float32:
        """Return a label's logits in a box of the image's grid."""
        return self.interpolation.of_box(partial(self.coarse, label), box)

    def coarse(self, label: int, box: Box, missing: float = 0.0) -> Float32:
        """Return a label's logits in a box of the network's grid; `missing` where none are kept."""
        store = self.store
        grid = store.grid
        tiles, values = store.joined(label)
        tile_box = tiles_around(box)
        around = grid.voxels_in(tile_box)
        part = TileGrid([along.stop - along.start for along in around])
        _, in_part, chosen = np.intersect1d(
            grid.numbers[tile_box], tiles, assume_unique=True, return_indices=True
        )
        kept = values[chosen].astype(np.float32)
        if store.is_probability:
            take_logarithms(kept)
        scattered = part.scatter(in_part, kept, missing)
        logits = np.ascontiguousarray(scattered[relative(box, around)])
        if self.padding is not None:
            logits[self.padding[box]] = 0.0
        return logits

    def covered(self) -> Bool:
        """Return (*grid), True at voxels on the network's grid, without its padding."""
        covered = self.interpolation.grid_map.all_inside()
        if self.padding is None:
            return covered

        has_scores = (~self.padding).astype(np.float32)
        linear = Interpolation(self.interpolation.grid_map, self.interpolation.nearest)
        for planes in self.grid.slabs():
            box = (planes, slice(None), slice(None))
            covered[planes] &= linear.of_box(has_scores.__getitem__, box) > 0
        return covered

    def where_likeliest(self) -> Bool:
        """Return (L, *tiles), where a label is the likeliest at a sample that a tile depends on.

        The labels of the samples are then forgotten.
        """
        from scipy import ndimage

        coarse_labels = self.labels
        del self.labels
        num_labels = self.mean_field.num_labels
        likeliest = np.zeros((num_labels, *self.grid.counts), np.bool_)
        # The first object has the number 1.
        boxes = ndimage.find_objects(coarse_labels + np.uint16(1), num_labels)
        for label, box in enumerate(boxes):
            if box is not None:
                is_label = coarse_labels[box] == label
                likeliest[label] = self.largest_in(self.windows, is_label, False, box)
        return likeliest

    @cached_property
    def _next_to_padding(self) -> Bool:
        """(*tiles), True where a tile depends on padding."""
        if self.padding is None:
            return np.zeros(self.grid.counts, np.bool_)
        return self.largest_in(self.windows, self.padding, False)

    def highest(self, label: int) -> Float32:
        """Return an upper bound of a label's logits in each tile, (*tiles)."""
        smallest, largest = self.ranges[:, label]
        tiles, _ = self.store.joined(label)
        is_kept = np.zeros(self.store.grid.counts, np.bool_)
        is_kept.flat[tiles] = True
        not_kept = np.where(is_kept, -np.inf, largest)
        highest = self.largest_in(self.tile_windows, not_kept, -np.inf)
        tile_box = bounding_box(is_kept)
        if tile_box is not None:
            box = self.store.grid.voxels_in(tile_box)
            logits = self.coarse(label, box, missing=-np.inf)
            of_kept = self.largest_in(self.windows, logits, -np.inf, box)
            np.maximum(highest, of_kept, out=highest)
        # Padding counts as 0.
        np.maximum(highest, 0.0, out=highest, where=self._next_to_padding)
        if self.overshoot > 0.0:
            deepest = -self.largest_in(self.tile_windows, -smallest, -np.inf)
            np.minimum(deepest, 0.0, out=deepest, where=self._next_to_padding)
            highest += self.overshoot * np.maximum(highest - deepest, 0.0)
        return highest


def plan_coarse(
    prepared: Prepared, network: StreamedNetwork, case: CaseToRefine
) -> tuple[CoarseChannels, Bool, Bool]:
    """Fill a case with what channels that stream by on a coarser network's grid tell.

    Return the channels, and (L, *tiles) where labels are present and where they may matter. Errors
    are those of `plan_stream`.
    """
    source = CoarseChannels(network, case)
    covered = source.covered()
    if not covered.all():
        prepared.unseen = ~covered.reshape(network.grid_shape)
    prepared.mask, prepared.num_padding, notes = leave_out(prepared.unseen, prepared.mask, "logits")
    prepared.notes = (source.note, *notes)
    mask = source.grid.mask(prepared.mask)

    # Labels that are the largest one somewhere tell how far below it the others are at most. All
    # may be present, or be the largest one without their bias, or matter, if some samples that a
    # tile depends on are high enough.
    likeliest = source.where_likeliest()
    source.ensure(likeliest)
    lowest, largest_sums = _best_of(source, likeliest, covered, mask)
    bias = source.bias
    thresholds = case.thresholds
    temperature = case.model.mean_field.temperature
    depth_of_present = np.maximum(-temperature * thresholds.present, bias.max() - bias)
    depth_of_others = np.maximum(-temperature * thresholds.may_matter, depth_of_present)
    has_voxels = np.isfinite(lowest)
    lowest = np.where(has_voxels, lowest, 0.0)
    present = likeliest & has_voxels
    may_matter = np.empty_like(likeliest)
    for label in range(len(likeliest)):
        depth = lowest - (source.highest(label) + bias[label])
        present[label] |= has_voxels & (depth <= depth_of_present[label])
        may_matter[label] = has_voxels & (depth <= depth_of_others[label])

    # Where labels are possible, interpolated logits tell more than these bounds.
    reach = case.model.kernels.reach(case.image.spacing, source.grid.shape)
    possible = label_sets(source.grid, present, may_matter, reach)
    source.ensure(possible.domains)
    has_one_label = possible.num_labels_of == 1
    if mask is not None:
        has_one_label &= source.grid.reduced(np.logical_or, mask, np.bool_)
    present = possible.domains & has_one_label
    may_matter = present | (may_matter & ~possible.domains)
    labels = _interpolated(source, possible, mask, largest_sums, present, may_matter)
    labels[~covered] = 0
    prepared.labels = labels.reshape(network.grid_shape)
    prepared.largest_sums = largest_sums / temperature
    return source, present, may_matter


def _best_of(
    source: CoarseChannels, likeliest: Bool, covered: Bool, mask: Bool | None
) -> tuple[Float32, Float64]:
    """Return the lowest value, and the sum, of the largest of some labels' logits in each tile.

    The logits have their bias. The lowest one, (*tiles), is that of covered voxels, and infinite
    without any; the sum, (*tiles), is that of voxels inside the mask.
    """
    grid = source.grid
    lowest = np.empty(grid.counts, np.float32)
    sums = np.empty(grid.counts)

    def fill(layer: int, planes: slice) -> None:
        part = grid.with_planes(planes)
        best = np.full(part.shape, -np.inf, np.float32)
        for label in map(int, np.flatnonzero(likeliest[:, layer].any(axis=(1, 2)))):
            tiles = likeliest[label, layer : layer + 1]
            tile_box = bounding_box(tiles)
            assert tile_box is not None
            box = part.voxels_in(tile_box)
            of_grid = (planes, *box[1:])
            logits = source.of_box(label, of_grid)
            logits += source.bias[label]
            is_more = part.to_voxels(tiles)[box] & (logits > best[box])
            np.copyto(best[box], logits, where=is_more)
        inside = None if mask is None else mask[planes]
        (sums[layer],) = part.reduced(np.add, best, np.float64, inside)
        best[~covered[planes]] = np.inf
        (lowest[layer],) = part.reduced(np.minimum, best, np.float32)

    jobs = [partial(fill, *numbered) for numbered in enumerate(grid.slabs())]
    run_all(jobs, source.threads)
    return lowest, sums


def _interpolated(
    source: CoarseChannels,
    possible: LabelSets,
    mask: Bool | None,
    largest_sums: Float64,
    present: Bool,
    may_matter: Bool,
) -> Labels:
    """Return the label of the largest interpolated logit, (*grid), where labels are possible.

    In tiles with several of these labels, where they are present, and where they may matter,
    (L, *tiles) each, is marked in place, and so are the sums, (*tiles), of the largest logits
    inside the mask, bias included.
    """
    thresholds = source.thresholds
    grid = source.grid
    temperature = source.mean_field.temperature
    dtype = np.min_scalar_type(len(present) - 1)
    labels: Labels = grid.to_voxels(possible.settled.clip(0).astype(dtype))

    def fill(layer: int, planes: slice) -> None:
        part = grid.with_planes(planes)
        sets = LabelSets(part, np.ascontiguousarray(possible.domains[:, layer : layer + 1]))
        if not sets.num_entries:
            return
        logits = source.of_entries(sets, 1, grid.tiles_in(planes).start)
        sets.engine(None, 1).decode(logits, labels[planes])
        logits += source.bias[sets.labels][:, None]
        inside = sets.voxels_inside(None if mask is None else mask[planes])
        starts = sets.first_entry[:-1]
        largest = np.maximum.reduceat(logits, starts, axis=0)
        largest_sums[layer].flat[sets.tiles] = largest.sum(axis=1, dtype=float, where=inside)

        # The logarithm of the largest probability of each entry, beside the others of its tile.
        logits = (logits - largest[sets.tile_of_entry]) / temperature
        log_sums = np.log(np.add.reduceat(np.exp(logits), starts, axis=0))
        log_sums[~inside] = np.inf
        margins = (logits - log_sums[sets.tile_of_entry]).max(axis=1)
        where = (sets.labels, layer, sets.tiles[sets.tile_of_entry])
        by_layer = (len(present), grid.counts[0], -1)
        present.reshape(by_layer)[where] = margins > thresholds.present[sets.labels]
        may_matter.reshape(by_layer)[where] = margins > thresholds.may_matter

    jobs = [partial(fill, *numbered) for numbered in enumerate(grid.slabs())]
    run_all(jobs, source.threads)
    return labels
