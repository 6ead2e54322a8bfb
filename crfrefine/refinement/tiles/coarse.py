"""Where labels of a network on a coarser grid take part, and the problem of its channels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box, whole
from crfrefine.arrays.padding import leave_out
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.base.limits import available_threads, run_all
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import Case, Prepared, StreamedNetwork
from crfrefine.refinement.tiles.grid import LabelSets, TileGrid
from crfrefine.refinement.tiles.interpolated import CoarseChannels
from crfrefine.refinement.tiles.planning import (
    MAX_SHARED_VOXELS,
    lazy_problem,
    mask_on_tiles,
    prepare_on_tiles,
)
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.streaming import survey_stream
from crfrefine.refinement.tiles.survey import Survey, Thresholds, find_thresholds

# Nats by which a label may fall from a voxel of the network to the next before channels are read
# once more: interpolation needs a label's logits at all neighbors of where it may matter.
MARGIN = 32.0


def plan_coarse(network: StreamedNetwork, case: Case) -> Prepared:
    """Return the labels that are present in each tile of the image.

    The channels stream by on the network's grid; voxels outside that grid are background. Errors
    are those of `plan_stream`.
    """
    interpolation = network.interpolation
    assert interpolation is not None
    spec = case.model
    grid = TileGrid(network.grid_shape)
    thresholds = find_thresholds(case.parameters.mean_field.label_threshold, spec)
    margin = MARGIN / spec.mean_field.temperature
    kept = Thresholds(thresholds.may_matter, thresholds.may_matter - margin)
    coarse_grid = TileGrid(interpolation.grid_map.source_shape)
    reach = (interpolation.reach,) * 3
    survey, candidates, note = survey_stream(
        network, coarse_grid, spec.mean_field, None, kept, case.context, reach
    )
    padding = survey.padding()
    survey.mask, *_ = leave_out(padding, None, "logits")
    coarse_labels = survey.labels
    survey.release()
    store = candidates.store(survey, reach)
    threads = case.context.threads or available_threads()
    source = CoarseChannels(store, padding, grid, interpolation, threads)

    covered = source.covered()
    mask = mask_on_tiles(case.image, grid)
    uncovered = None if covered.all() else ~covered
    mask, num_padding, notes = leave_out(uncovered, mask, "logits")
    likeliest = source.where_likeliest(coarse_labels, spec.mean_field.num_labels)
    source.ensure(likeliest, threads)
    lowest, sums = _best_of(source, likeliest, _bias(spec), covered, mask)
    present, may_matter = _bounds(source, survey, likeliest, lowest, spec, thresholds)
    problem = lazy_problem(case, source, present, may_matter, mask, thresholds)
    problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    source.ensure(problem.sets.domains, threads)
    labels, problem, largest_sums = _interpolated(source, problem, sums, thresholds)
    labels[~covered] = 0
    labels = labels.reshape(network.grid_shape)
    largest_sums /= spec.mean_field.temperature
    prepared = prepare_on_tiles(problem, labels, largest_sums, case)
    prepared.notes = (note, *notes)
    prepared.num_padding = num_padding
    return prepared


def _bias(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the bias of each label, (L,)."""
    run = spec.mean_field
    if run.bias is None:
        return np.zeros(run.num_labels, np.float32)
    return np.asarray(run.bias, np.float32)


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


def _bounds(
    source: CoarseChannels,
    survey: Survey,
    likeliest: Bool,
    lowest: Float32,
    spec: ModelSpec,
    thresholds: Thresholds,
) -> tuple[Bool, Bool]:
    """Return where labels may be present, or be the largest ones without their bias, or may matter.

    They are (L, *tiles) each. Elsewhere all samples that a tile depends on are far below `lowest`,
    the largest logits there.
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
        grid = whole(source.padding.shape)
        next_to_padding = source.largest_of_tiles(source.padding, grid, False)

    present = likeliest & has_voxels
    may_matter = np.empty_like(likeliest)
    for label in range(len(likeliest)):
        highest = source.highest(label, largest[label])
        if next_to_padding is not None:  # Padding counts as 0.
            np.maximum(highest, 0.0, out=highest, where=next_to_padding)
        if source.overshoot > 0.0:
            deepest = -source.largest_around(-smallest[label])
            if next_to_padding is not None:
                np.minimum(deepest, 0.0, out=deepest, where=next_to_padding)
            highest += source.overshoot * np.maximum(highest - deepest, 0.0)
        depth = lowest - (highest + bias[label])
        present[label] |= has_voxels & (depth <= of_present[label])
        may_matter[label] = has_voxels & (depth <= of_others[label])
    return present, may_matter


def _interpolated(
    source: CoarseChannels, problem: TileProblem, sums: Float64, thresholds: Thresholds
) -> tuple[Labels, TileProblem, Float64]:
    """Return the label of the largest interpolated logit, the problem, and sums of logits.

    Labels are interpolated where they are possible, as in the sets of the given problem; the new
    one has those that are, and elsewhere its bounds say where they may matter. The label map is
    (*grid). The sums, (*tiles), are those of the largest logits inside the mask, bias included;
    `sums` has those of tiles where a single label is possible.
    """
    spec = problem.spec
    mask = problem.mask
    grid = problem.grid
    possible = problem.sets.domains
    bias = _bias(spec)
    temperature = np.float32(spec.mean_field.temperature)
    labels: Labels = np.zeros(grid.shape, np.min_scalar_type(len(possible) - 1))
    present = np.zeros_like(possible)
    may_matter = problem.may_matter & ~possible
    largest_sums = sums.copy()

    def fill(layer: int) -> None:
        planes = grid.planes_of_layer(layer)
        of_layer = slice(layer, layer + 1)
        part = grid.with_planes(planes.stop - planes.start)
        sets = LabelSets(part, np.ascontiguousarray(possible[:, of_layer]))
        settled = part.to_voxels(sets.settled)
        labels[planes] = np.where(settled > 0, settled, 0)
        inside = np.ones(part.shape, np.bool_) if mask is None else mask[planes]
        has_voxels = part.reduced(np.logical_or, inside, np.bool_)
        is_single = (sets.num_labels_of == 1) & has_voxels
        present[:, of_layer] |= sets.domains & is_single
        may_matter[:, of_layer] |= sets.domains & is_single
        if not sets.num_entries:
            return

        logits = source.of_entries(sets, 1, grid.tiles_in(planes).start)
        sets.engine(None, 1).decode(logits, labels[planes])
        logits += bias[sets.labels][:, None]
        inside_tiles = part.mask_of_tiles(inside, sets.tiles)
        margins, largest = _margins(logits, sets, inside_tiles, temperature)
        sums_of_tiles = largest.sum(axis=1, dtype=float, where=inside_tiles)
        largest_sums[layer].flat[sets.tiles] = sums_of_tiles
        for label, (tiles, entries) in enumerate(sets.entries):
            of_label = margins[entries]
            present[label, layer].flat[tiles] = of_label > thresholds.present[label]
            may_matter[label, layer].flat[tiles] = of_label > thresholds.may_matter[label]

    jobs = [partial(fill, layer) for layer in range(grid.counts[0])]
    run_all(jobs, source.threads)
    return labels, problem.with_presence(present, may_matter), largest_sums


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
