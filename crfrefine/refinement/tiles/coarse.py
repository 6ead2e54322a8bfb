"""Where labels of a network on a coarser grid take part, by its interpolated channels."""

from __future__ import annotations

from functools import partial

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.network import StreamedNetwork
from crfrefine.arrays.padding import leave_out
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.base.limits import run_all
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.grid import LabelSets, label_sets
from crfrefine.refinement.tiles.interpolated import CoarseChannels


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
