"""Which labels take part in which tiles, whether these save work, and whether messages are direct sums or come from filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE, Box, share_reach, widen
from crfrefine.arrays.probabilities import leave_out
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.specs import REACH, ModelSpec
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE, LabelSets, TileGrid, num_rings
from crfrefine.refinement.tiles.problem import (
    ChannelSource,
    DenseChannels,
    LabelMapChannels,
    ShareChannels,
    TileProblem,
)
from crfrefine.refinement.tiles.streaming import StreamedNetwork, survey_stream
from crfrefine.refinement.tiles.survey import Survey, Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.engines.base import GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The inputs of a run on tiles."""

    problem: TileProblem  # the volume
    sets: LabelSets  # the labels of its tiles
    # (*tiles), sum over the voxels inside the mask of the largest logit, bias included, over the
    # temperature
    best: Float64
    is_direct: bool | None  # whether sums are direct; None means whichever is less work
    box: Box | None = None  # the part of the grid that tiles cover; None means all of it
    # (*grid), the network's label map; None means that it is to be found
    labels: Labels | None = None
    notes: tuple[str, ...] = ()  # notes for the user, one sentence each
    num_padding: int = 0  # voxels in the mask where all logits were equal


def plan_array(
    values: Float32,
    box: Box | None,
    image: GridImage,
    spec: ModelSpec,
    threshold: float,
    threads: int | None,
    *,
    is_probability: bool,
) -> tuple[TilePlan | None, Labels | None]:
    """Return the labels of each tile of a case in memory, and the network's label map if the pass over the channels tells it."""
    # The values are (L, *grid); `image` is that of the mask's bounding box, normalized. None: no
    # tiles.
    num_dims = values.ndim - 1
    thresholds = find_thresholds(threshold, spec)
    # Volumes are sums over all voxels, also where a label would take no part.
    if (
        thresholds.leave_out_nothing
        or spec.mean_field.volume_weight > 0.0
        or not spec.kernels.kernels
        or num_dims > MAX_DIMS
    ):
        return None, None
    channels = values if box is None else values[(slice(None), *box)]
    grid = TileGrid(channels.shape[1:])
    if channels.strides[-1] != channels.itemsize or any(
        stride % channels.itemsize for stride in channels.strides
    ):
        channels = np.ascontiguousarray(channels)  # Voxels of a row are read one after the other.
    source = DenseChannels(channels.reshape(len(channels), *grid.shape), is_probability)
    inside = None if image.mask is None else np.ascontiguousarray(image.mask).reshape(grid.shape)
    is_sampled = len(values) <= MAX_CROWDED_LABELS and grid.counts[0] >= MIN_LAYERS
    if is_sampled and _is_crowded(grid, source, spec, inside, thresholds, threads):
        return None, None
    survey, present, may_matter = _survey(grid, source, spec, inside, thresholds, threads)
    labels = None
    if box is None and not is_probability:  # The smallest probabilities have one logarithm.
        labels = survey.labels.reshape(values.shape[1:]).astype(
            np.min_scalar_type(len(values) - 1), copy=False
        )
    image = replace(image, mask=None if inside is None else inside.reshape(image.values.shape[1:]))
    settled = float(thresholds.may_matter.min())
    problem = TileProblem(
        grid,
        source,
        present,
        may_matter,
        image,
        spec,
        threshold,
        settled=settled,
        precision=threshold,
    )
    sets = problem.label_sets()
    is_direct = choose_tiles(problem, sets, threads, survey) if sets.active.any() else True
    if is_direct is None:
        return None, labels
    return TilePlan(problem, sets, survey.best_by_tile(), is_direct, box=box, labels=labels), labels


def _survey(
    grid: TileGrid,
    source: DenseChannels,
    spec: ModelSpec,
    mask: Bool | None,
    thresholds: Thresholds,
    threads: int | None,
) -> tuple[Survey, Bool, Bool]:
    """Return the survey of channels, and (L, *tiles) where labels are present and where they may matter."""
    survey = Survey(grid, spec.mean_field, mask, threads, is_probability=source.is_probability)
    for label, channel in enumerate(source.values):
        survey.add(label, channel)
    present, may_matter = np.zeros((2, *survey.margins.shape), np.bool_)
    for label, margins in enumerate(survey.margins):
        # The bound was taken before later labels added to the sum.
        tiles = np.flatnonzero(margins > thresholds.may_matter[label])
        if len(tiles):
            exact = survey.margins_of(label, source.values[label], tiles)
            present[label].flat[tiles] = exact > thresholds.present[label]
            may_matter[label].flat[tiles] = exact > thresholds.may_matter[label]
    return survey, present, may_matter


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
    """Return whether so many labels are present in a sample of the tiles that tiles save nothing.

    Only time depends on it.
    """
    num_entries = num_voxels = 0
    for start in range(SAMPLED_LAYERS // 2 * TILE[0], grid.shape[0], SAMPLED_LAYERS * TILE[0]):
        stop = min(start + TILE[0], grid.shape[0])
        layer = TileGrid((stop - start, *grid.shape[1:]))
        inside = None if mask is None else mask[start:stop]
        num_labels_of = _survey(
            layer, source.planes(start, stop), spec, inside, thresholds, threads
        )[1].sum(axis=0)
        num_entries += int(num_labels_of[num_labels_of > 1].sum())
        num_voxels += math.prod(layer.shape) if inside is None else int(np.count_nonzero(inside))
    return (
        num_voxels > 0
        and num_entries * math.prod(TILE) >= CROWDED * spec.mean_field.num_channels * num_voxels
    )


def plan_stream(
    network: StreamedNetwork,
    image: GridImage,
    spec: ModelSpec,
    parameters: CrfParameters,
    context: RunContext,
) -> TilePlan:
    """Return the labels that are present in each tile of channels that stream by.

    Their tiles are kept.
    """
    # Raises InputError (not finite, of another kind, equal nearly everywhere) or CapacityError.
    grid = TileGrid(network.grid_shape)
    threshold = parameters.mean_field.label_threshold
    thresholds = find_thresholds(threshold, spec)
    inside = None if image.mask is None else np.ascontiguousarray(image.mask).reshape(grid.shape)
    survey, candidates, note = survey_stream(
        network, grid, spec.mean_field, inside, thresholds, context
    )
    num_padding = 0
    notes = tuple[str, ...]()
    padding = survey.padding()
    if padding is not None:
        survey.mask, num_padding, notes = leave_out(padding, inside, "logits")
    best = survey.best_by_tile()
    inside = survey.mask
    labels = survey.labels.astype(np.min_scalar_type(network.num_labels - 1), copy=False).reshape(
        network.grid_shape
    )
    survey.release()
    store, present, may_matter = candidates.store(
        survey, spec.kernels.reach(image.spacing, grid.shape), context
    )
    problem = lazy_problem(
        grid, store, (present, may_matter), image, inside, spec, parameters, thresholds
    )
    return TilePlan(
        problem,
        problem.label_sets(),
        best,
        None,
        labels=labels,
        notes=(note, *notes),
        num_padding=num_padding,
    )


def lazy_problem(
    grid: TileGrid,
    source: ChannelSource,
    where: tuple[Bool, Bool],
    image: GridImage,
    inside: Bool | None,
    spec: ModelSpec,
    parameters: CrfParameters,
    thresholds: Thresholds,
) -> TileProblem:
    """Return the problem of channels that are not in memory.

    `where` labels are present, and may matter; `inside` without padding.
    """
    threshold = parameters.mean_field.label_threshold
    return TileProblem(
        grid,
        source,
        *where,
        replace(image, mask=None if inside is None else inside.reshape(image.values.shape[1:])),
        spec,
        None if thresholds.leave_out_nothing else threshold,
        # Padding of the logits is not a property of the image: intensities are normalized as if
        # there were no padding.
        fit_intensity(image.values, parameters.intensity, image.mask),
        settled=float(thresholds.may_matter.min()),
        precision=threshold,
    )


# Voxels in the windows up to which a label map's sums are direct: half the time of the lattice.
MAX_PAIRS = 1000
# Voxels of a coarser network's map that are refined at once: filters of them take about 2 GiB.
MAX_SHARED_VOXELS = 40_000_000


def plan_label_map(
    numbers: Labels,
    image: GridImage,
    spec: ModelSpec,
    parameters: CrfParameters,
    threads: int | None,
    sigma: Sequence[float] | None,
) -> TilePlan:
    """Return where the labels of a label map take part: within the kernels' reach of where they occur, with the logit 0."""
    # With the `sigma` of a coarser network labels take part where they have a share. The numbers
    # are those of channels, (*grid) of at most three axes in storage order.
    grid = TileGrid(numbers.shape)
    run = spec.mean_field
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    inside = None if image.mask is None else np.ascontiguousarray(image.mask).reshape(grid.shape)
    reach = spec.kernels.reach(image.spacing, grid.shape)
    # Messages from farther away penalize all labels by the same amount, which changes no marginal,
    # in a Potts model with one weight for all labels. The energy then lacks these pairs.
    is_plain = run.is_potts and run.num_channels < run.num_labels
    farther = (0,) * MAX_DIMS if is_plain else reach
    if sigma is None:
        source = LabelMapChannels(labels, reach, 0, len(labels))
        near = reach
        confidence = CONFIDENCE
        settled = np.array(settled_probability(spec) if is_plain else -math.inf)
    else:
        sigma = (*(0.0,) * (MAX_DIMS - len(sigma)), *sigma)
        source = ShareChannels(labels, sigma, 0, len(labels))
        near = share_reach(sigma)
        confidence = 0.0
        settled = find_thresholds(parameters.mean_field.label_threshold, spec).may_matter
    extents = tuple(extent + more for extent, more in zip(near, farther, strict=True))
    voxels = grid.reduced(
        np.add, np.broadcast_to(np.True_, grid.shape) if inside is None else inside, np.int64
    )
    # tiles with voxels within reach of a label, and few others
    present = np.zeros((run.num_labels, *grid.counts), np.bool_)
    grid.engine(threads).mark_near(labels, extents, present.view(np.uint8))
    present &= voxels > 0
    image = replace(image, values=np.ascontiguousarray(image.values))
    # No label was left out because its probability was low.
    thresholds = Thresholds(settled, settled, leave_out_nothing=True)
    problem = lazy_problem(
        grid, source, (present, present), image, inside, spec, parameters, thresholds
    )
    problem = replace(problem, largest_slab=None if sigma is None else MAX_SHARED_VOXELS)
    sets = problem.label_sets()
    # The logit of the only label of a settled tile.
    own = np.full(grid.counts, confidence / run.temperature)
    if run.bias is not None:
        own += (
            np.where(sets.settled < 0, 0.0, np.asarray(run.bias, np.float64)[sets.settled])
            / run.temperature
        )
    if (
        sigma is None and not spec.kernels.kernels
    ):  # Each voxel has only its own label within reach.
        sets = LabelSets(grid, np.zeros_like(sets.domains))
    is_direct = None
    if _pairs(problem) <= MAX_PAIRS:
        is_direct = True
    elif spec.kernels.filter == "auto" and sigma is not None:
        # Few voxels of active tiles are open, which a filter of the whole volume uses better.
        is_direct = False
    return TilePlan(problem, sets, voxels * own, is_direct, labels=labels.reshape(numbers.shape))


def settled_probability(spec: ModelSpec) -> float:
    """Return the logarithm of a probability that all labels have where they take part, and no others: those stay where they are."""
    # Minus infinity if weights or temperatures bring ABSENT_LOGIT near the other logits.
    run = spec.mean_field
    strength = float(np.abs(run.weights).max(axis=1, initial=0.0).sum())
    if run.bias is not None:
        strength += float(run.bias.max() - run.bias.min()) / run.temperature
    half = 0.5 * ABSENT_LOGIT / run.temperature
    if strength + math.log(run.num_labels) + CONFIDENCE / run.temperature < -0.5 * half:
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
    """Return the voxels in the windows of all appearance kernels: 0 if direct sums are asked for, infinite if there are none."""
    kernels = problem.spec.kernels
    if max(problem.reach) > MAX_DIRECT_REACH or kernels.filter not in ("auto", "truncated"):
        return math.inf
    voxel = math.prod(kernels.distances(problem.image.spacing))
    windows = sum(
        math.prod(REACH * theta for theta in kernel.theta_position) for kernel in kernels.bilateral
    )
    if kernels.filter == "truncated":
        return 0.0
    return BALL * windows / voxel


def sums_are_direct(problem: TileProblem, sets: LabelSets) -> bool:
    """Return whether each voxel's window is summed directly: if that is less work than a filter of all voxels around, or asked for."""
    return _pairs(problem) * len(sets.tiles) <= PAIRS_OF_LARGE_FILTERS * _filtered_tiles(
        problem, sets
    )


def _filtered_tiles(problem: TileProblem, sets: LabelSets) -> int:
    """Return the tiles around the active ones that filters take, once for each group of channels."""
    num_around = np.count_nonzero(widen(sets.active, num_rings(problem.reach)))
    return int(num_around) * math.ceil(int(sets.num_labels_of.max()) / GROUP)


def choose_tiles(
    problem: TileProblem, sets: LabelSets, threads: int | None, survey: Survey
) -> bool | None:
    """Return whether a case in memory has direct sums on tiles, or filters (False).

    None means no tiles.
    """
    tile = math.prod(TILE)
    channels = problem.spec.mean_field.num_channels
    kernels = problem.spec.kernels
    num_voxels = problem.image.num_voxels
    if sets.num_entries * tile >= WORTH_IT * channels * num_voxels:
        return None
    name = kernels.filter
    if (
        name == "auto" and kernels.bilateral
    ):  # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.
    everywhere = float(math.ceil(channels / GROUP) * num_voxels)
    on_tiles = float(_filtered_tiles(problem, sets) * tile)
    pairs = _pairs(problem) * len(sets.tiles) * tile
    if pairs < math.inf and (
        name == "truncated" or pairs <= PAIRS_OF_FILTERS * min(on_tiles, everywhere)
    ):
        return True
    if name == "grid":
        # Besides the steps: normalization, twice with all labels everywhere, and what settled
        # voxels send, the last label included.
        steps = kernels.num_iterations * channels
        num_around = np.count_nonzero(widen(sets.active, num_rings(problem.reach))) * tile
        share = min(1.0, ROWS_OF_UNCERTAIN * survey.uncertain_share(problem.settled))
        work = num_around * (1 + int(sets.num_labels_of.max())) + num_voxels * steps * share
        if work < WORTH_ROWS * num_voxels * (2 + steps):
            return False
    if on_tiles < WORTH_CHANNELS * everywhere:
        return False
    return None
