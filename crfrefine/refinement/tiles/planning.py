"""Which labels take part in which tiles, and how messages between them are computed.

A plan says whether tiles save work, and whether messages are direct sums or come from filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE, Box, share_reach, widen
from crfrefine.arrays.probabilities import leave_out
from crfrefine.base.array_types import Bool, Float64, Labels
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.specs import TRUNCATION_RADIUS, ModelSpec
from crfrefine.refinement.tiles.grid import (
    MAX_DIMS,
    TILE_VOXELS,
    Extents,
    LabelSets,
    TileGrid,
    num_rings,
)
from crfrefine.refinement.tiles.problem import (
    ChannelSource,
    DenseChannels,
    LabelMapChannels,
    ShareChannels,
    TilePlan,
    TileProblem,
)
from crfrefine.refinement.tiles.streaming import StreamedNetwork, survey_stream
from crfrefine.refinement.tiles.survey import Presence, Survey, Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.engines.base import GridImage
    from crfrefine.refinement.given import Case


def mask_on_tiles(image: GridImage, grid: TileGrid) -> Bool | None:
    """Return the image's mask on the three axes of a grid of tiles, C-contiguous."""
    if image.mask is None:
        return None
    return np.ascontiguousarray(image.mask).reshape(grid.shape)


def plan_array(
    source: DenseChannels,
    box: Box | None,
    image: GridImage,
    case: Case,
    *,
    is_interpolated: bool = False,
) -> tuple[TilePlan | None, Labels | None]:
    """Return the labels of each tile of a case in memory, or None if tiles save no work.

    The source has the channels as they are, (L, *grid) with at most MAX_DIMS axes; `image` is that
    of the mask's bounding box, normalized. Logits interpolated from a coarser grid are planned as
    those that stream (`plan_coarse`): the result must not depend on the memory. The second result
    is the network's label map, if the pass over the channels tells it.
    """
    values = source.values
    spec = case.model
    threads = case.context.threads
    threshold = case.parameters.mean_field.label_threshold
    thresholds = find_thresholds(threshold, spec)
    # Volumes are sums over all voxels, also where a label would take no part.
    keeps_volumes = spec.mean_field.volume_weight > 0.0
    has_kernels = bool(spec.kernels.kernels)
    if thresholds.leave_out_nothing or keeps_volumes or not has_kernels:
        return None, None

    channels = values[(slice(None), *(box or ()))]
    *strides, stride_of_row = channels.strides
    size = channels.itemsize
    # Voxels of a row are read one after the other.
    if stride_of_row != size or any(stride % size for stride in strides):
        channels = np.ascontiguousarray(channels)
    grid = TileGrid(channels.shape[1:])
    source = replace(source, values=channels.reshape(len(channels), *grid.shape))
    mask = None
    if image.mask is not None:
        mask = np.ascontiguousarray(image.mask).reshape(grid.shape)
        image = replace(image, mask=mask.reshape(channels.shape[1:]))
    can_sample = len(values) <= MAX_CROWDED_LABELS and grid.counts[0] >= MIN_LAYERS
    if is_interpolated:
        can_sample = False
    if can_sample and _is_crowded(grid, source, spec, mask, thresholds, threads):
        return None, None

    survey = Survey(grid, spec.mean_field, mask, threads)
    presence = _add_channels(survey, source, thresholds)
    labels = None
    if box is None and not source.is_probability:  # The smallest probabilities have one logarithm.
        dtype = np.min_scalar_type(len(values) - 1)
        labels = survey.labels.astype(dtype, copy=False).reshape(values.shape[1:])
    settled = float(thresholds.may_matter.min())
    problem = TileProblem(
        grid, source, presence, image, spec, threshold, settled=settled, precision=threshold
    )
    sets = problem.label_sets()
    if is_interpolated:
        problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
        return TilePlan(problem, sets, survey.best_by_tile(), box=box, labels=labels), labels
    is_direct = choose_tiles(problem, sets, threads, survey)
    if is_direct is None:
        return None, labels
    best = survey.best_by_tile()
    return TilePlan(problem, sets, best, is_direct, box=box, labels=labels), labels


def _add_channels(survey: Survey, source: DenseChannels, thresholds: Thresholds) -> Presence:
    """Add all channels to a survey, and return where labels are."""
    survey.is_probability = source.is_probability
    for label, channel in enumerate(source.values):
        survey.add(label, channel)
    nowhere = np.zeros(survey.margins.shape, np.bool_)
    presence = Presence(nowhere, nowhere.copy())
    for label, margins in enumerate(survey.margins):
        # The bound was taken before later labels added to the sum.
        tiles = np.flatnonzero(margins > thresholds.may_matter[label])
        if len(tiles):
            exact = survey.margins_of(label, source.values[label], tiles)
            is_present = exact > thresholds.present[label]
            presence.present[label].flat[tiles] = is_present
            matters = exact > thresholds.may_matter[label]
            presence.may_matter[label].flat[tiles] = matters
    return presence


# Every fifth layer of tiles shows whether label sets would hold nearly all labels, if they are few.
SAMPLED_LAYERS = 5
MIN_LAYERS = 13
MAX_CROWDED_LABELS = 8
# Share of the work with all labels everywhere from which on a sample rules out tiles.
CROWDED = 1.1


def _is_crowded(
    grid: TileGrid,
    source: DenseChannels,
    spec: ModelSpec,
    mask: Bool | None,
    thresholds: Thresholds,
    threads: int | None,
) -> bool:
    """Return whether a sample of the tiles has so many labels that tiles save no time."""
    num_entries = 0
    num_voxels = 0
    for row in range(SAMPLED_LAYERS // 2, grid.counts[0], SAMPLED_LAYERS):
        planes = grid.planes_of_row(row)
        layer = grid.with_planes(planes.stop - planes.start)
        inside = None if mask is None else mask[planes]
        channels = source.planes(planes.start, planes.stop)
        survey = Survey(layer, spec.mean_field, inside, threads)
        presence = _add_channels(survey, channels, thresholds)
        num_labels_of = presence.present.sum(axis=0)
        num_entries += int(num_labels_of[num_labels_of > 1].sum())
        if inside is None:
            num_voxels += math.prod(layer.shape)
        else:
            num_voxels += int(np.count_nonzero(inside))
    if num_voxels == 0:
        return False
    work_everywhere = spec.mean_field.num_channels * num_voxels
    return num_entries * TILE_VOXELS >= CROWDED * work_everywhere


def plan_stream(network: StreamedNetwork, case: Case) -> TilePlan:
    """Return the labels that are present in each tile of channels that stream by.

    Their tiles are kept.

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
    num_padding = 0
    notes = tuple[str, ...]()
    padding = survey.padding()
    if padding is not None:
        survey.mask, num_padding, notes = leave_out(padding, mask, "logits")
    best = survey.best_by_tile()
    dtype = np.min_scalar_type(network.num_labels - 1)
    labels = survey.labels.astype(dtype, copy=False).reshape(network.grid_shape)
    survey.release()

    reach = spec.kernels.reach(case.image.spacing, grid.shape)
    store, presence = candidates.store(survey, reach, case.context)
    problem = lazy_problem(case, grid, store, presence, survey.mask, thresholds)
    return TilePlan(
        problem,
        problem.label_sets(),
        best,
        labels=labels,
        notes=(note, *notes),
        num_padding=num_padding,
    )


def lazy_problem(
    case: Case,
    grid: TileGrid,
    source: ChannelSource,
    presence: Presence,
    mask: Bool | None,
    thresholds: Thresholds,
) -> TileProblem:
    """Return the problem of channels that are not in memory.

    The mask lacks the padding of the channels, unlike that of the image.
    """
    image = case.image
    # Padding of the logits is not a property of the image: intensities are normalized as if there
    # were no padding.
    maps = fit_intensity(image.values, case.parameters.intensity, image.mask)
    threshold = case.parameters.mean_field.label_threshold
    if mask is not None:
        mask = mask.reshape(image.values.shape[1:])
    settled = float(thresholds.may_matter.min())
    image = replace(image, mask=mask)
    return TileProblem(
        grid,
        source,
        presence,
        image,
        case.model,
        threshold=None if thresholds.leave_out_nothing else threshold,
        maps=maps,
        settled=settled,
        precision=threshold,
    )


# Voxels in the windows up to which a label map's sums are direct: half the time of the lattice.
MAX_PAIRS = 1000
# Voxels of a coarser network's map that are refined at once: filters of them take about 2 GiB.
MAX_SHARED_VOXELS = 40_000_000


def plan_label_map(numbers: Labels, case: Case) -> TilePlan:
    """Return where the labels of a label map take part.

    Labels take part within the kernels' reach of where they occur, with the logit 0. The numbers
    are those of channels, (*grid) of at most three axes in storage order.
    """
    spec = case.model
    grid = TileGrid(numbers.shape)
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    reach = spec.kernels.reach(case.image.spacing, grid.shape)
    source = LabelMapChannels(labels, reach, 0, len(labels))
    settled = settled_probability(spec) if _is_plain(spec) else -math.inf
    problem, voxels = _nearby_problem(case, grid, source, reach, np.array(settled))
    sets = problem.label_sets()
    best = voxels * _logits_of_settled(sets, spec, CONFIDENCE)
    if not spec.kernels.kernels:  # Each voxel has only its own label within reach.
        sets = LabelSets(grid, np.zeros_like(sets.domains))
    is_direct = True if _pairs(problem) <= MAX_PAIRS else None
    return TilePlan(problem, sets, best, is_direct, labels=labels.reshape(numbers.shape))


def plan_shares(numbers: Labels, sigma: Sequence[float], case: Case) -> TilePlan:
    """Return where the labels of a coarser network's map take part: where they have a share.

    `sigma` is the result of `share_sigma`; the numbers are those of `plan_label_map`.
    """
    spec = case.model
    grid = TileGrid(numbers.shape)
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    leading = (0.0,) * (MAX_DIMS - len(sigma))
    sigma = (*leading, *sigma)
    source = ShareChannels(labels, sigma, 0, len(labels))
    settled = find_thresholds(case.parameters.mean_field.label_threshold, spec).may_matter
    problem, voxels = _nearby_problem(case, grid, source, share_reach(sigma), settled)
    problem = replace(problem, largest_slab=MAX_SHARED_VOXELS)
    sets = problem.label_sets()
    best = voxels * _logits_of_settled(sets, spec, 0.0)
    is_direct = None
    if _pairs(problem) <= MAX_PAIRS:
        is_direct = True
    elif spec.kernels.filter == "auto":
        # Few voxels of active tiles are open, which a filter of the whole volume uses better.
        is_direct = False
    return TilePlan(problem, sets, best, is_direct, labels=labels.reshape(numbers.shape))


def _is_plain(spec: ModelSpec) -> bool:
    """Return whether messages from where a label is missing penalize all labels by as much.

    That changes no marginal. They do in a Potts model with one weight for all labels.
    """
    run = spec.mean_field
    return run.is_potts and run.num_channels < run.num_labels


def _nearby_problem(
    case: Case,
    grid: TileGrid,
    source: LabelMapChannels | ShareChannels,
    near: Extents,
    settled: Float64,
) -> tuple[TileProblem, NDArray[np.int64]]:
    """Return the problem of labels near where they occur, and the voxels of each tile."""
    spec = case.model
    if not _is_plain(spec):
        # In a plain model messages from farther away change nothing; the energy lacks these pairs.
        reach = spec.kernels.reach(case.image.spacing, grid.shape)
        near = tuple(extent + more for extent, more in zip(near, reach, strict=True))
    mask = mask_on_tiles(case.image, grid)
    inside = np.broadcast_to(np.True_, grid.shape) if mask is None else mask
    voxels = grid.reduced(np.add, inside, np.int64)
    # tiles with voxels within reach of a label, and few others
    num_labels = spec.mean_field.num_labels
    present = np.zeros((num_labels, *grid.counts), np.bool_)
    engine = grid.engine(case.context.threads)
    engine.mark_near(source.numbers, near, present.view(np.uint8))
    present &= voxels > 0
    image = replace(case.image, values=np.ascontiguousarray(case.image.values))
    # No label was left out because its probability was low.
    thresholds = Thresholds(settled, settled, leave_out_nothing=True)
    presence = Presence(present, present)
    stored = replace(case, image=image)
    return lazy_problem(stored, grid, source, presence, mask, thresholds), voxels


def _logits_of_settled(sets: LabelSets, spec: ModelSpec, confidence: float) -> Float64:
    """Return the logit of the only label of each settled tile over the temperature, (*tiles)."""
    run = spec.mean_field
    logits = np.full(sets.grid.counts, confidence / run.temperature)
    if run.bias is not None:
        settled = sets.settled
        bias = np.asarray(run.bias, np.float64)
        of_settled = np.where(settled < 0, 0.0, bias[settled])
        logits += of_settled / run.temperature
    return logits


def settled_probability(spec: ModelSpec) -> float:
    """Return a bound that only labels that take part exceed: the logarithm of a probability.

    Other labels stay below it. It is minus infinity if weights or temperatures bring ABSENT_LOGIT
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


# voxels along an axis up to which sums are direct: else the copies of tiles outgrow the cache
MAX_DIRECT_REACH = 12
BALL = 4.0 / 3.0 * math.pi  # volume of a ball of radius 1
# Pairs of a direct sum that take as long as a grid or a lattice for one voxel and up to GROUP
# channels; and for volumes that are streamed, where filters need arrays of all voxels around.
PAIRS_OF_FILTERS = 120
PAIRS_OF_LARGE_FILTERS = 400
GROUP = 4  # channels that are filtered together
# Share of the work with all labels below which tiles are used: with direct sums, with filters.
WORTH_IT = 0.9
WORTH_CHANNELS = 0.5
# Share of a grid's rows that is filtered over that of uncertain voxels; work below which it is
# used.
ROWS_OF_UNCERTAIN = 6.0
WORTH_ROWS = 0.8


def _pairs(problem: TileProblem) -> float:
    """Return the voxels in all windows; 0 if direct sums are asked for, infinite if impossible."""
    kernels = problem.spec.kernels
    if max(problem.reach) > MAX_DIRECT_REACH or kernels.filter not in ("auto", "truncated"):
        return math.inf
    if kernels.filter == "truncated":
        return 0.0
    voxel = math.prod(kernels.distances(problem.image.spacing))
    windows = 0.0
    for kernel in kernels.bilateral:
        reach = [TRUNCATION_RADIUS * theta for theta in kernel.theta_position]
        windows += math.prod(reach)
    return BALL * windows / voxel


def sums_are_direct(problem: TileProblem, sets: LabelSets) -> bool:
    """Return whether each voxel's window is summed directly.

    It is if that is asked for, or less work than a filter of all voxels around.
    """
    work = PAIRS_OF_LARGE_FILTERS * _filtered_tiles(problem, sets)
    return _pairs(problem) * len(sets.tiles) <= work


def _num_tiles_around(problem: TileProblem, sets: LabelSets) -> int:
    """Return the number of tiles that messages of active ones reach."""
    around = widen(sets.active, num_rings(problem.reach))
    return int(np.count_nonzero(around))


def _filtered_tiles(problem: TileProblem, sets: LabelSets) -> int:
    """Return the tiles around the active ones that filters take, once for each channel group."""
    most_labels = int(sets.num_labels_of.max())
    num_groups = math.ceil(most_labels / GROUP)
    return _num_tiles_around(problem, sets) * num_groups


def choose_tiles(
    problem: TileProblem, sets: LabelSets, threads: int | None, survey: Survey
) -> bool | None:
    """Return whether a case in memory has direct sums on tiles, or filters (False).

    None means no tiles.
    """
    if not sets.active.any():
        return True
    channels = problem.spec.mean_field.num_channels
    kernels = problem.spec.kernels
    num_voxels = problem.image.num_voxels
    if sets.num_entries * TILE_VOXELS >= WORTH_IT * channels * num_voxels:
        return None
    name = kernels.filter
    if name == "auto" and kernels.bilateral:
        # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.

    pairs = _pairs(problem) * len(sets.tiles) * TILE_VOXELS
    everywhere = float(math.ceil(channels / GROUP) * num_voxels)
    on_tiles = float(_filtered_tiles(problem, sets) * TILE_VOXELS)
    fewest_filtered = min(on_tiles, everywhere)
    are_few_pairs = name == "truncated" or pairs <= PAIRS_OF_FILTERS * fewest_filtered
    if pairs < math.inf and are_few_pairs:
        return True
    if name == "grid" and _saves_rows(problem, sets, survey):
        return False
    if on_tiles < WORTH_CHANNELS * everywhere:
        return False
    return None


def _saves_rows(problem: TileProblem, sets: LabelSets, survey: Survey) -> bool:
    """Return whether a grid that filters only the rows of uncertain voxels is less work.

    Besides the steps the work is the normalization, twice with all labels everywhere, and what
    settled voxels send, the last label included.
    """
    num_voxels = problem.image.num_voxels
    steps = problem.spec.kernels.num_iterations * problem.spec.mean_field.num_channels
    num_around = _num_tiles_around(problem, sets) * TILE_VOXELS
    share = min(1.0, ROWS_OF_UNCERTAIN * survey.uncertain_share(problem.settled))
    most_labels = int(sets.num_labels_of.max())
    work = num_around * (1 + most_labels) + num_voxels * steps * share
    return work < WORTH_ROWS * num_voxels * (2 + steps)
