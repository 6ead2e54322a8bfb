"""Which labels take part in which tiles: of a case in memory, a label map, or channels that stream.

A plan says whether tiles save work, and starts from one pass over the channels. Messages are direct
sums, tile by tile, or come from filters of the whole volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.label_maps import (
    ABSENT_LOGIT,
    CONFIDENCE,
    Box,
    count_inside,
    share_reach,
)
from crfrefine.arrays.network import StreamedNetwork
from crfrefine.arrays.padding import leave_out
from crfrefine.base.array_types import Bool, Labels
from crfrefine.base.numerics import CHANNEL_GROUP
from crfrefine.engines.choices import (
    CROWDED,
    MAX_CROWDED_LABELS,
    MAX_PAIRS,
    MIN_LAYERS,
    PAIRS_OF_FILTERS,
    ROWS_OF_UNCERTAIN,
    SAMPLED_LAYERS,
    WORTH_CHANNELS,
    WORTH_ROWS,
    WORTH_TILES,
)
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.channels import ChannelSource, DenseChannels, LabelMapChannels
from crfrefine.refinement.tiles.grid import (
    MAX_DIMS,
    TILE,
    TILE_VOXELS,
    LabelSets,
    TileGrid,
    label_sets,
)
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.survey import Survey, Thresholds

# Most voxels of a slab of the output of a coarser network: filters of them take about 2 GiB.
LARGEST_COARSE_SLAB = 40_000_000


def plan_array(
    prepared: Prepared, mask_box: Box | None, case: CaseToRefine, *, is_interpolated: bool
) -> None:
    """Plan the tiles of a case in memory, which is prepared to be refined without tiles.

    It gets a `TileProblem` if tiles save work.

    Tiles cover the mask's bounding box. Logits interpolated from a coarser grid are planned as
    those that stream (`plan_coarse`): the result must not depend on the memory. The network's label
    map is set if the pass over the channels tells it.
    """
    spec = case.model
    threshold = case.parameters.mean_field.label_threshold
    if case.thresholds.leave_out_nothing:
        return

    channels = prepared.logits[(slice(None), *(mask_box or ()))]
    source = DenseChannels(channels, is_probability=prepared.is_probability)
    grid = source.grid
    image = prepared.image
    if mask_box is not None and prepared.box is None and image.mask is not None:
        values = image.values[(slice(None), *mask_box)]
        image = replace(image, values=values, mask=image.mask[mask_box])
    mask = grid.mask(image.mask)
    can_sample = len(source.values) <= MAX_CROWDED_LABELS and grid.counts[0] >= MIN_LAYERS
    if can_sample and not is_interpolated and _is_crowded(source, mask, case):
        return

    survey = _survey(source, mask, case)
    # The smallest probabilities have one logarithm.
    if mask_box is None and not source.is_probability and prepared.labels is None:
        prepared.labels = survey.label_map().reshape(prepared.logits.shape[1:])
    reach = spec.kernels.reach(image.spacing, grid.shape)
    presence = (survey.present, survey.may_matter)
    sets = label_sets(grid, *presence, reach)
    problem = TileProblem(source, sets, *presence, image, spec, threshold, survey.thresholds)
    if is_interpolated:
        problem = replace(problem, largest_slab=LARGEST_COARSE_SLAB)
    else:
        is_direct = choose_tiles(problem, case.context.threads, survey)
        if is_direct is None:
            return
        problem = replace(problem, is_direct=is_direct)
    prepared.problem = problem
    prepared.largest_sums = survey.largest_sums()
    prepared.box = mask_box


def _survey(source: DenseChannels, mask: Bool | None, case: CaseToRefine) -> Survey:
    """Return the survey of all channels, with labels marked where they are."""
    mean_field = case.model.mean_field
    survey = Survey(source.grid, mean_field, mask, case.thresholds, case.context.threads)
    survey.is_probability = source.is_probability
    for label, channel in enumerate(source.values):
        survey.add(label, channel)
    for label, margins in enumerate(survey.margins):
        # The bound was taken before later labels added to the sum.
        tiles = np.flatnonzero(margins > survey.thresholds.may_matter)
        survey.mark(label, tiles, source.values[label])
    return survey


def _is_crowded(source: DenseChannels, mask: Bool | None, case: CaseToRefine) -> bool:
    """Return whether a sample of the tiles has so many labels that tiles save no time."""
    planes = np.arange(source.grid.shape[0])
    is_sampled = planes // TILE[0] % SAMPLED_LAYERS == SAMPLED_LAYERS // 2
    inside = None if mask is None else mask[is_sampled]
    layers = DenseChannels(source.values[:, is_sampled], is_probability=source.is_probability)
    num_voxels = count_inside(inside, layers.grid.shape)
    if num_voxels == 0:
        return False
    survey = _survey(layers, inside, case)
    num_labels_of = survey.present.sum(axis=0)
    num_entries = int(num_labels_of[num_labels_of > 1].sum())
    work_everywhere = case.model.mean_field.num_channels * num_voxels
    return num_entries * TILE_VOXELS >= CROWDED * work_everywhere


def plan_stream(network: StreamedNetwork, case: CaseToRefine) -> Prepared:
    """Prepare channels that stream by, whose tiles are kept where labels may take part.

    Those on a coarser network's grid are interpolated tile by tile, and voxels outside that grid
    are background.

    Raises:
        InputError: values are not finite, of another kind, or equal nearly everywhere.
        CapacityError: the tiles that are kept take too much memory.
    """
    no_channel = np.zeros((0, *network.grid_shape), np.float32)
    prepared = Prepared(no_channel, case.image, case.image.mask)
    source: ChannelSource
    if network.interpolation is None:
        from crfrefine.refinement.tiles.streaming import survey_stream

        grid = TileGrid(network.grid_shape)
        reach = case.model.kernels.reach(case.image.spacing, grid.shape)
        mask = grid.mask(case.image.mask)
        survey, store, note = survey_stream(network, case, grid, mask, case.thresholds, reach)
        unseen = survey.padding()
        if unseen is not None:
            prepared.unseen = unseen.reshape(network.grid_shape)
        survey.mask, prepared.num_padding, notes = leave_out(unseen, mask, "logits")
        prepared.notes = (note, *notes)
        if survey.mask is not None:
            prepared.mask = survey.mask.reshape(network.grid_shape)
        prepared.largest_sums = survey.largest_sums()
        prepared.labels = survey.label_map().reshape(network.grid_shape)
        store.choose()
        source = store
        present = survey.present
        may_matter = survey.may_matter
    else:
        from crfrefine.refinement.tiles.coarse import plan_coarse

        source, present, may_matter = plan_coarse(prepared, network, case)
    prepared.problem = _problem_of(
        case, source, present, may_matter, prepared.mask, case.thresholds
    )
    return prepared


def _problem_of(
    case: CaseToRefine,
    source: ChannelSource,
    present: Bool,
    may_matter: Bool,
    mask: Bool | None,
    thresholds: Thresholds,
) -> TileProblem:
    """Return the problem of channels that are not in memory; arguments as its fields.

    Padding of the channels is not in this mask, (*grid), but may be in that of the image.
    """
    values = np.ascontiguousarray(case.image.values)
    # Padding of the logits is not a property of the image: intensities are normalized as if there
    # were no padding.
    maps = fit_intensity(values, case.parameters.intensity, case.image.mask)
    image = replace(case.image, values=values, mask=mask)
    kernels = case.model.kernels
    reach = kernels.reach(image.spacing, source.grid.shape)
    return TileProblem(
        source,
        label_sets(source.grid, present, may_matter, reach),
        present,
        may_matter,
        image,
        case.model,
        case.parameters.mean_field.label_threshold,
        thresholds,
        maps,
        None if kernels.network_spacing is None else LARGEST_COARSE_SLAB,
    )


def plan_label_map(numbers: Labels, sigma: Sequence[float] | None, case: CaseToRefine) -> Prepared:
    """Prepare a label map, whose labels take part near where they occur.

    That is within the kernels' reach, with the logit 0, or where they have a share in the map of a
    coarser network: `sigma` is then the result of `share_sigma`. The numbers are those of channels,
    (*grid) of at most three axes in storage order.
    """
    spec = case.model
    mean_field = spec.mean_field
    grid = TileGrid(numbers.shape)
    mask = grid.mask(case.image.mask)
    engine = grid.engine(case.context.threads)
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    reach = spec.kernels.reach(case.image.spacing, grid.shape)
    # Whether messages from where a label is missing penalize all labels by as much, which changes
    # no marginal. They do in a Potts model with one weight for all labels.
    is_plain = mean_field.is_potts and mean_field.num_channels < mean_field.num_labels
    if sigma is None:
        source = LabelMapChannels(labels, reach, None)
        confidence = CONFIDENCE
        settled_below = settled_bound(spec) if is_plain else -math.inf
    else:
        sigma = (*(0.0,) * (MAX_DIMS - len(sigma)), *sigma)
        source = LabelMapChannels(labels, share_reach(sigma), sigma)
        confidence = 0.0
        settled_below = float(case.thresholds.may_matter)

    near = np.array(source.reach)
    if not is_plain:
        # In a plain model messages from farther away change nothing; the energy lacks these pairs.
        near += reach
    inside = np.broadcast_to(np.True_, grid.shape) if mask is None else mask
    num_voxels = grid.reduced(np.add, inside, np.int64)  # of each tile
    present = np.zeros((mean_field.num_labels, *grid.counts), np.bool_)
    engine.mark_near(labels, tuple(near.tolist()), present.view(np.uint8))
    present &= num_voxels > 0  # tiles with voxels within reach of a label, and few others
    # No label is left out because its probability is low.
    thresholds = Thresholds(np.full(mean_field.num_labels, -math.inf), np.float64(settled_below))
    problem = _problem_of(case, source, present, present, case.image.mask, thresholds)
    # Of the only label of each settled tile, over the temperature. The sums of active tiles do not
    # count.
    logits = np.full(grid.counts, confidence / mean_field.temperature)
    if mean_field.bias is not None:
        # Tiles with several labels, or none, have the number -1.
        logits += np.append(mean_field.bias, 0.0)[problem.sets.settled] / mean_field.temperature
    if problem.num_pairs <= MAX_PAIRS:
        problem = replace(problem, is_direct=True)
    elif sigma is not None and spec.kernels.filter == "auto":
        # Few voxels of active tiles are open, which a filter of the whole volume uses better.
        problem = replace(problem, is_direct=False)
    if sigma is None and not spec.kernels.kernels:
        # Each voxel has only its own label within reach.
        problem = replace(problem, sets=LabelSets(grid, np.zeros_like(present)))
    return Prepared(
        np.zeros((0, *numbers.shape), np.float32),
        case.image,
        case.image.mask,
        labels=labels.reshape(numbers.shape),
        problem=problem,
        largest_sums=num_voxels * logits,
    )


def settled_bound(spec: ModelSpec) -> float:
    """Return `Thresholds.may_matter` of a label map: only labels that take part exceed it.

    It is minus infinity if weights or temperatures bring ABSENT_LOGIT near the other logits.
    """
    mean_field = spec.mean_field
    strength = float(np.abs(mean_field.weights).max(axis=1, initial=0.0).sum())
    temperature = mean_field.temperature
    if mean_field.bias is not None:
        difference = float(mean_field.bias.max() - mean_field.bias.min())
        strength += difference / temperature
    half = 0.5 * ABSENT_LOGIT / temperature
    if strength + math.log(mean_field.num_labels) + CONFIDENCE / temperature < -0.5 * half:
        return half
    return -math.inf


# ---- Whether tiles save work, and with which sums of messages


def choose_tiles(problem: TileProblem, threads: int | None, survey: Survey) -> bool | None:
    """Return whether a case in memory has direct sums on tiles (True), or filters (False).

    None means that tiles save no work, and all labels take part everywhere.
    """
    sets = problem.sets
    if not sets.active.any():
        return True
    channels = problem.spec.mean_field.num_channels
    kernels = problem.spec.kernels
    num_voxels = count_inside(survey.mask, survey.grid.shape)
    if sets.num_entries * TILE_VOXELS >= WORTH_TILES * channels * num_voxels:
        return None
    name = kernels.filter
    if name == "auto" and kernels.bilateral:
        # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.

    pairs = problem.num_pairs * len(sets.tiles) * TILE_VOXELS
    everywhere = math.ceil(channels / CHANNEL_GROUP) * num_voxels
    on_tiles = problem.num_filtered_tiles * TILE_VOXELS
    most_pairs = PAIRS_OF_FILTERS * min(on_tiles, everywhere)
    if pairs < math.inf and (name == "truncated" or pairs <= most_pairs):
        return True
    if name == "grid":
        # A grid filters only the rows of uncertain voxels. Besides the steps the work is the
        # normalization, twice with all labels everywhere, and what settled voxels send, the last
        # label included.
        steps = kernels.num_iterations * channels
        most_labels = int(sets.num_labels_of.max())
        around = problem.num_tiles_around * TILE_VOXELS * (1 + most_labels)
        share = min(1.0, ROWS_OF_UNCERTAIN * survey.uncertain_share())
        if around + num_voxels * steps * share < WORTH_ROWS * num_voxels * (2 + steps):
            return False
    if on_tiles < WORTH_CHANNELS * everywhere:
        return False
    return None
