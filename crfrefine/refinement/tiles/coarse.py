"""Where labels of a network on a coarser grid take part, and the problem of its channels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.padding import leave_out
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.base.limits import run_all
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import CaseToRefine, Prepared, StreamedNetwork
from crfrefine.refinement.tiles.grid import LabelSets
from crfrefine.refinement.tiles.interpolated import CoarseChannels
from crfrefine.refinement.tiles.planning import (
    LARGEST_COARSE_SLAB,
    lazy_problem,
    mask_on_tiles,
    prepare_on_tiles,
)
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.survey import Thresholds, find_thresholds


def plan_coarse(network: StreamedNetwork, case: CaseToRefine) -> Prepared:
    """Prepare channels that stream by on a coarser network's grid, interpolated tile by tile.

    Voxels outside that grid are background. Errors are those of `plan_stream`.
    """
    spec = case.model
    bias = _bias(spec)
    temperature = spec.mean_field.temperature
    thresholds = find_thresholds(case.parameters.mean_field.label_threshold, spec)
    source, coarse_labels, note = CoarseChannels.of_stream(network, case, thresholds)
    covered = source.covered()
    mask = mask_on_tiles(case.image, source.grid)
    uncovered = None if covered.all() else ~covered
    mask, num_padding, notes = leave_out(uncovered, mask, "logits")

    # Labels that are the largest one somewhere tell how far below it the others are at most. All
    # may be present, or be the largest one without their bias, or matter, if some samples that a
    # tile depends on are high enough.
    likeliest = source.where_likeliest(coarse_labels, spec.mean_field.num_labels)
    source.ensure(likeliest, source.threads)
    lowest, sums = _best_of(source, likeliest, bias, covered, mask)
    depth_of_present = np.maximum(-temperature * thresholds.present, bias.max() - bias)
    depth_of_others = np.maximum(-temperature * thresholds.may_matter, depth_of_present)
    has_voxels = np.isfinite(lowest)
    lowest = np.where(has_voxels, lowest, np.float32(0.0))
    present = likeliest & has_voxels
    may_matter = np.empty_like(likeliest)
    for label in range(len(likeliest)):
        depth = lowest - (source.highest(label) + bias[label])
        present[label] |= has_voxels & (depth <= depth_of_present[label])
        may_matter[label] = has_voxels & (depth <= depth_of_others[label])

    presence = (present, may_matter)
    leaves_out = not thresholds.leave_out_nothing
    problem = lazy_problem(
        case, source, *presence, mask, thresholds.may_matter, checks_borders=leaves_out
    )
    problem = replace(problem, largest_slab=LARGEST_COARSE_SLAB)
    source.ensure(problem.sets.domains, source.threads)
    labels, problem, largest_sums = _interpolated(source, problem, sums, thresholds)
    labels[~covered] = 0
    labels = labels.reshape(network.grid_shape)
    largest_sums /= temperature
    prepared = prepare_on_tiles(problem, labels, largest_sums, case)
    prepared.notes = (note, *notes)
    prepared.num_padding = num_padding
    if uncovered is not None:
        prepared.unseen = uncovered.reshape(network.grid_shape)
    return prepared


def _bias(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the bias of each label, (L,)."""
    mean_field = spec.mean_field
    if mean_field.bias is None:
        return np.zeros(mean_field.num_labels, np.float32)
    return np.asarray(mean_field.bias, np.float32)


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

    def fill(layer: int) -> None:
        planes = grid.planes_of_layer(layer)
        part = grid.with_planes(planes.stop - planes.start)
        best = np.full(part.shape, -np.inf, np.float32)
        for label in map(int, np.flatnonzero(likeliest[:, layer].any(axis=(1, 2)))):
            tiles = likeliest[label, layer : layer + 1]
            tile_box = bounding_box(tiles)
            assert tile_box is not None
            box = part.voxels_in(tile_box)
            of_grid = (planes, *box[1:])
            logits = source.of_box(label, of_grid)
            logits += bias[label]
            is_more = part.to_voxels(tiles)[box] & (logits > best[box])
            np.copyto(best[box], logits, where=is_more)
        inside = None if mask is None else mask[planes]
        (sums[layer],) = part.reduced(np.add, best, np.float64, inside)
        best[~covered[planes]] = np.inf
        (lowest[layer],) = part.reduced(np.minimum, best, np.float32)

    jobs = [partial(fill, layer) for layer in range(grid.counts[0])]
    run_all(jobs, source.threads)
    return lowest, sums


def _interpolated(
    source: CoarseChannels, problem: TileProblem, sums: Float64, thresholds: Thresholds
) -> tuple[Labels, TileProblem, Float64]:
    """Return the label of the largest interpolated logit, the problem, and sums of logits.

    Labels are interpolated where they are possible, as in the sets of the given problem; the new
    one has those that are, and elsewhere its bounds say where they may matter. The label map is
    (*grid). The sums, (*tiles), are those of the largest logits inside the mask, bias included;
    `sums` has those of tiles where a single label is possible.
    """
    mask = problem.mask
    grid = problem.grid
    possible = problem.sets.domains
    bias = _bias(problem.spec)
    temperature = np.float32(problem.spec.mean_field.temperature)
    dtype = np.min_scalar_type(len(possible) - 1)
    labels: Labels = grid.to_voxels(problem.sets.settled.clip(0).astype(dtype))
    has_one_label = problem.sets.num_labels_of == 1
    if mask is not None:
        has_one_label &= grid.reduced(np.logical_or, mask, np.bool_)
    present = possible & has_one_label
    may_matter = present | (problem.may_matter & ~possible)
    largest_sums = sums.copy()

    def fill(layer: int) -> None:
        planes = grid.planes_of_layer(layer)
        part = grid.with_planes(planes.stop - planes.start)
        sets = LabelSets(part, np.ascontiguousarray(possible[:, layer : layer + 1]))
        if not sets.num_entries:
            return
        logits = source.of_entries(sets, 1, grid.tiles_in(planes).start)
        sets.engine(None, 1).decode(logits, labels[planes])
        logits += bias[sets.labels][:, None]
        inside = part.mask_of_tiles(None if mask is None else mask[planes], sets.tiles)
        starts = sets.first_entry[:-1]
        largest = np.maximum.reduceat(logits, starts, axis=0)
        largest_sums[layer].flat[sets.tiles] = largest.sum(axis=1, dtype=float, where=inside)

        # The logarithm of the largest probability of each entry, beside the others of its tile.
        tile_of_entry = np.repeat(np.arange(len(starts)), np.diff(sets.first_entry))
        logits = (logits - largest[tile_of_entry]) / temperature
        log_sums = np.log(np.add.reduceat(np.exp(logits), starts, axis=0))
        log_sums[~inside] = np.inf
        margins = (logits - log_sums[tile_of_entry]).max(axis=1)
        for label, (tiles, entries) in enumerate(sets.entries):
            of_label = margins[entries]
            present[label, layer].flat[tiles] = of_label > thresholds.present[label]
            may_matter[label, layer].flat[tiles] = of_label > thresholds.may_matter

    jobs = [partial(fill, layer) for layer in range(grid.counts[0])]
    run_all(jobs, source.threads)
    return labels, problem.with_presence(present, may_matter), largest_sums
