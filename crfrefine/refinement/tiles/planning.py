"""Which labels take part in which tiles: of a case in memory, a label map, or channels that stream.

A plan says whether tiles save work, and starts from one pass over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE, Box, count_inside, share_reach
from crfrefine.arrays.padding import leave_out
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.engines.base import GridImage
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import Case, Prepared, StreamedNetwork
from crfrefine.refinement.tiles.channels import ChannelSource, DenseChannels, LabelMapChannels
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE_VOXELS, LabelSets, TileGrid
from crfrefine.refinement.tiles.problem import TileProblem, choose_tiles, count_pairs, label_sets
from crfrefine.refinement.tiles.streaming import survey_stream
from crfrefine.refinement.tiles.survey import Survey, Thresholds, find_thresholds

# Voxels of a coarser network's map that are refined at once: filters of them take about 2 GiB.
MAX_SHARED_VOXELS = 40_000_000


def plan_array(
    prepared: Prepared, mask_box: Box | None, case: Case, *, is_interpolated: bool
) -> None:
    """Plan the tiles of a case in memory, prepared to be refined without, if they save work.

    Tiles cover the mask's bounding box. Logits interpolated from a coarser grid are planned as
    those that stream (`plan_coarse`): the result must not depend on the memory. The network's label
    map is set if the pass over the channels tells it.
    """
    spec = case.model
    threshold = case.parameters.mean_field.label_threshold
    thresholds = find_thresholds(threshold, spec)
    if thresholds.leave_out_nothing:
        return

    channels = prepared.logits[(slice(None), *(mask_box or ()))]
    source = DenseChannels(channels, is_probability=prepared.is_probability)
    grid = source.grid
    image = prepared.image
    mask = None
    if image.mask is not None:
        box: Box = ()
        if mask_box is not None and prepared.box is None:
            box = mask_box
        inside = np.ascontiguousarray(image.mask[box])
        image = replace(image, values=image.values[(slice(None), *box)], mask=inside)
        mask = inside.reshape(grid.shape)
    can_sample = len(source.values) <= MAX_CROWDED_LABELS and grid.counts[0] >= MIN_LAYERS
    if can_sample and not is_interpolated and _is_crowded(source, mask, thresholds, case):
        return

    survey = _survey(source, mask, thresholds, case)
    # The smallest probabilities have one logarithm.
    if mask_box is None and not source.is_probability and prepared.labels is None:
        prepared.labels = survey.label_map().reshape(prepared.logits.shape[1:])
    present = survey.present
    may_matter = survey.may_matter
    sets = label_sets(grid, present, may_matter, spec.kernels.reach(image.spacing, grid.shape))
    settled_below = thresholds.settled_below
    problem = TileProblem(
        source, sets, present, may_matter, image, spec, threshold, settled_below=settled_below
    )
    if is_interpolated:
        problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    else:
        is_direct = choose_tiles(problem, case.context.threads, survey)
        if is_direct is None:
            return
        problem = replace(problem, is_direct=is_direct)
    prepared.problem = problem
    prepared.largest_sums = survey.largest_sums()
    prepared.box = mask_box


def mask_on_tiles(image: GridImage, grid: TileGrid) -> Bool | None:
    """Return the image's mask on the three axes of a grid of tiles, C-contiguous."""
    if image.mask is None:
        return None
    return np.ascontiguousarray(image.mask).reshape(grid.shape)


def _survey(source: DenseChannels, mask: Bool | None, thresholds: Thresholds, case: Case) -> Survey:
    """Return the survey of all channels, with labels marked where they are."""
    run = case.model.mean_field
    survey = Survey(source.grid, run, mask, thresholds, case.context.threads)
    survey.is_probability = source.is_probability
    for label, channel in enumerate(source.values):
        survey.add(label, channel)
    for label, margins in enumerate(survey.margins):
        # The bound was taken before later labels added to the sum.
        tiles = np.flatnonzero(margins > thresholds.may_matter[label])
        if len(tiles):
            survey.mark(label, source.values[label], tiles)
    return survey


# Every fifth layer of tiles shows whether label sets would hold nearly all labels, if they are few.
SAMPLED_LAYERS = 5
MIN_LAYERS = 13
MAX_CROWDED_LABELS = 8
# Share of the work with all labels everywhere from which on a sample rules out tiles.
CROWDED = 1.1


def _is_crowded(
    source: DenseChannels, mask: Bool | None, thresholds: Thresholds, case: Case
) -> bool:
    """Return whether a sample of the tiles has so many labels that tiles save no time."""
    grid = source.grid
    num_entries = 0
    num_voxels = 0
    for number in range(SAMPLED_LAYERS // 2, grid.counts[0], SAMPLED_LAYERS):
        planes = grid.planes_of_layer(number)
        inside = None if mask is None else mask[planes]
        values = source.values[:, planes]
        layer = DenseChannels(values, is_probability=source.is_probability)
        survey = _survey(layer, inside, thresholds, case)
        num_labels_of = survey.present.sum(axis=0)
        num_entries += int(num_labels_of[num_labels_of > 1].sum())
        num_voxels += count_inside(inside, layer.grid.shape)
    if num_voxels == 0:
        return False
    work_everywhere = case.model.mean_field.num_channels * num_voxels
    return num_entries * TILE_VOXELS >= CROWDED * work_everywhere


def plan_stream(network: StreamedNetwork, case: Case) -> Prepared:
    """Prepare channels that stream by, whose tiles are kept where labels may take part.

    Raises:
        InputError: values are not finite, of another kind, or equal nearly everywhere.
        CapacityError: the tiles that are kept take too much memory.
    """
    spec = case.model
    grid = TileGrid(network.grid_shape)
    thresholds = find_thresholds(case.parameters.mean_field.label_threshold, spec)
    mask = mask_on_tiles(case.image, grid)
    survey, candidates, note = survey_stream(
        network, grid, spec.mean_field, mask, thresholds, case.context
    )
    survey.mask, num_padding, notes = leave_out(survey.padding(), mask, "logits")
    largest_sums = survey.largest_sums()
    labels = survey.label_map().reshape(network.grid_shape)
    survey.release()

    reach = spec.kernels.reach(case.image.spacing, grid.shape)
    store = candidates.store(survey, reach)
    presence = (survey.present, survey.may_matter)
    problem = lazy_problem(case, store, *presence, survey.mask, thresholds)
    prepared = prepare_on_tiles(problem, labels, largest_sums, case)
    prepared.notes = (note, *notes)
    prepared.num_padding = num_padding
    return prepared


def lazy_problem(
    case: Case,
    source: ChannelSource,
    present: Bool,
    may_matter: Bool,
    mask: Bool | None,
    thresholds: Thresholds | None,
) -> TileProblem:
    """Return the problem of channels that are not in memory; other arguments as its fields.

    The mask lacks the padding of the channels, unlike that of the image. Without thresholds no
    label was left out because its probability was low.
    """
    image = case.image
    # Padding of the logits is not a property of the image: intensities are normalized as if there
    # were no padding.
    maps = fit_intensity(image.values, case.parameters.intensity, image.mask)
    if mask is not None:
        mask = mask.reshape(image.values.shape[1:])
    image = replace(image, mask=mask)
    reach = case.model.kernels.reach(image.spacing, source.grid.shape)
    sets = label_sets(source.grid, present, may_matter, reach)
    threshold = case.parameters.mean_field.label_threshold
    problem = TileProblem(
        source, sets, present, may_matter, image, case.model, threshold, maps=maps
    )
    if thresholds is None:
        return replace(problem, checks_borders=False)
    checks_borders = not thresholds.leave_out_nothing
    settled_below = thresholds.settled_below
    return replace(problem, checks_borders=checks_borders, settled_below=settled_below)


def prepare_on_tiles(
    problem: TileProblem, labels: Labels, largest_sums: Float64, case: Case
) -> Prepared:
    """Return a case whose channels are not in memory, with the network's label map, (*grid).

    The sums are those of `Prepared`.
    """
    no_channel: Float32 = np.zeros((0, *labels.shape), np.float32)
    mask = problem.image.mask
    return Prepared(
        no_channel, case.image, mask, labels=labels, problem=problem, largest_sums=largest_sums
    )


# Voxels in the windows up to which a label map's sums are direct: half the time of the lattice.
MAX_PAIRS = 1000


def plan_label_map(numbers: Labels, sigma: Sequence[float] | None, case: Case) -> Prepared:
    """Prepare a label map, whose labels take part near where they occur.

    That is within the kernels' reach, with the logit 0, or where they have a share in the map of a
    coarser network: `sigma` is then the result of `share_sigma`. The numbers are those of channels,
    (*grid) of at most three axes in storage order.
    """
    spec = case.model
    grid = TileGrid(numbers.shape)
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    reach = spec.kernels.reach(case.image.spacing, grid.shape)
    # Whether messages from where a label is missing penalize all labels by as much, which changes
    # no marginal. They do in a Potts model with one weight for all labels.
    run = spec.mean_field
    is_plain = run.is_potts and run.num_channels < run.num_labels
    if sigma is None:
        source = LabelMapChannels(grid, labels, reach)
        confidence = CONFIDENCE
        settled_below = settled_bound(spec) if is_plain else -math.inf
    else:
        sigma = (*(0.0,) * (MAX_DIMS - len(sigma)), *sigma)
        source = LabelMapChannels(grid, labels, share_reach(sigma), sigma)
        confidence = 0.0
        threshold = case.parameters.mean_field.label_threshold
        settled_below = find_thresholds(threshold, spec).settled_below

    problem, voxels = _nearby_problem(source, settled_below, case, is_plain=is_plain)
    # Of the only label of each settled tile, over the temperature. The sums of active tiles do not
    # count.
    logits = np.full(grid.counts, confidence / run.temperature)
    if run.bias is not None:
        settled_label = problem.sets.settled
        bias = np.asarray(run.bias, np.float64)[settled_label]
        logits += np.where(settled_label < 0, 0.0, bias) / run.temperature
    if count_pairs(problem) <= MAX_PAIRS:
        problem = replace(problem, is_direct=True)
    elif sigma is not None and spec.kernels.filter == "auto":
        # Few voxels of active tiles are open, which a filter of the whole volume uses better.
        problem = replace(problem, is_direct=False)
    if sigma is not None:
        problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    elif not spec.kernels.kernels:  # Each voxel has only its own label within reach.
        nowhere = np.zeros_like(problem.present)
        problem = replace(problem, sets=LabelSets(grid, nowhere))
    return prepare_on_tiles(problem, labels.reshape(numbers.shape), voxels * logits, case)


def _nearby_problem(
    source: LabelMapChannels, settled_below: float, case: Case, *, is_plain: bool
) -> tuple[TileProblem, NDArray[np.int64]]:
    """Return the problem of labels near where they occur, and the voxels of each tile."""
    grid = source.grid
    near = source.reach
    if not is_plain:
        # In a plain model messages from farther away change nothing; the energy lacks these pairs.
        reach = case.model.kernels.reach(case.image.spacing, grid.shape)
        near = tuple(extent + more for extent, more in zip(near, reach, strict=True))
    mask = mask_on_tiles(case.image, grid)
    inside = np.broadcast_to(np.True_, grid.shape) if mask is None else mask
    voxels = grid.reduced(np.add, inside, np.int64)
    # tiles with voxels within reach of a label, and few others
    num_labels = case.model.mean_field.num_labels
    present = np.zeros((num_labels, *grid.counts), np.bool_)
    engine = grid.engine(case.context.threads)
    engine.mark_near(source.numbers, near, present.view(np.uint8))
    present &= voxels > 0
    image = replace(case.image, values=np.ascontiguousarray(case.image.values))
    problem = lazy_problem(replace(case, image=image), source, present, present, mask, None)
    return replace(problem, settled_below=settled_below), voxels


def settled_bound(spec: ModelSpec) -> float:
    """Return `TileProblem.settled_below` of a label map, which only labels that take part exceed.

    It is minus infinity if weights or temperatures bring ABSENT_LOGIT
    near the other logits.
    """
    run = spec.mean_field
    strength = float(np.abs(run.weights).max(axis=1, initial=0.0).sum())
    temperature = run.temperature
    if run.bias is not None:
        difference = float(run.bias.max() - run.bias.min())
        strength += difference / temperature
    half = 0.5 * ABSENT_LOGIT / temperature
    if strength + math.log(run.num_labels) + CONFIDENCE / temperature < -0.5 * half:
        return half
    return -math.inf
