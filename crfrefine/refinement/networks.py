"""A network's output in any form, prepared for refining: checked, without padding, its image normalized, its tiles planned."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import (
    ABSENT_LOGIT,
    CONFIDENCE,
    Box,
    bounding_box,
    channel_numbers,
    count_labels,
    one_hot_logits,
    share_logits,
    share_sigma,
    take_part_nearby,
    widen,
)
from crfrefine.arrays.probabilities import (
    MIN_PROBABILITY,
    SUM_TOLERANCE,
    describe_padding,
    find_padding,
    identify_array,
    leave_out,
    take_logarithms,
)
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, RegionScheme, identify_regions, take_log_odds
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.limits import memory_limit, require_memory
from crfrefine.engines.base import Backend, GridImage, RunContext
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.strokes import STRENGTH, STRENGTH_OF_LABELS, STRENGTH_OF_SHARES, Edits, StrokeModel, Strokes
from crfrefine.refinement.tiles.coarse import CoarseNetwork, plan_coarse
from crfrefine.refinement.tiles.grid import MAX_DIMS
from crfrefine.refinement.tiles.planning import TilePlan, plan_array, plan_label_map, plan_stream
from crfrefine.refinement.tiles.streaming import StreamedNetwork

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters

# Share of the grid below which the mask's bounding box is refined by itself: the voxels outside
# cost one pass of reading and writing.
WORTH_IT = 0.9
MAX_LOGIT = 1e34  # well below float32's 3.4e38: differences and sums over labels must fit too
_MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    values: NDArray[np.floating[Any]]  # (L, *grid) logits or probabilities, or (R, *grid) log-odds or probabilities of regions
    input_type: str = "logits"  # "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None means that they are labels
    network_spacing: tuple[float, ...] | None = None  # mm between voxels of the network, if interpolated; None means unknown


@dataclass(frozen=True, eq=False)
class LabelMapNetwork:
    """A label map instead of a network's output: only labels that occur take part, and if there are many, only near where they occur."""

    labels: Labels  # (*grid), in an unsigned type
    channels: Sequence[int]  # the labels that occur, background, and at least two (`crfrefine.arrays.label_maps.channels_of`)
    num_labels: int  # L, background included, as values per label in the parameters have it
    # mm between voxels of the network that made the map, one number or one per axis; "auto" means that blocks in the map show it.
    # None means that each voxel's label is taken as it is.
    network_spacing: ArrayLike | None = None

    def with_strokes(self, strokes: Strokes | None) -> LabelMapNetwork:
        """Return the map with a channel for each drawn label, too."""
        if strokes is None:
            return self
        drawn = {*self.channels, *strokes.labels.tolist()}
        return replace(self, channels=tuple(sorted(drawn)), num_labels=max(self.num_labels, max(drawn) + 1))


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork | CoarseNetwork


def layout_of(network: Network) -> tuple[tuple[int, ...], StorageOrder]:
    """Return the shape (channels, *grid) of a network's output for users, and the order it is stored in."""
    if isinstance(network, ArrayNetwork):
        return network.values.shape, StorageOrder.of_memory(network.values[0])
    if isinstance(network, LabelMapNetwork):
        return (len(network.channels), *network.labels.shape), StorageOrder.of_memory(network.labels)
    num_channels = network.channels.num_labels if isinstance(network, CoarseNetwork) else network.num_labels
    return (num_channels, *network.grid_shape[::-1]), StorageOrder(tuple(range(len(network.grid_shape)))[::-1])


@dataclass(frozen=True, eq=False)
class Prepared:
    """The inputs of a refinement, in storage order."""

    logits: Float32  # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    image: GridImage  # of the box, normalized; without logits in memory that of the tiles counts
    plan: TilePlan | None  # the labels of the tiles; None means all labels everywhere
    mask: Bool | None = None  # (*grid), True inside the mask and outside the padding; None means everywhere
    box: Box | None = None  # the part of the grid that is refined without tiles; None means all of it
    labels: Labels | None = None  # (*grid) the network's label map; None means that it is still to be made from the logits
    num_padding: int = 0  # voxels in the mask that are padding
    notes: tuple[str, ...] = ()  # notes for the user, one sentence each
    is_probability: bool = False  # whether `logits` are probabilities of labels, whose logarithm is still to be taken
    are_regions: bool = False  # whether the channels are regions
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage
    # (L,), voxels that each label gains by strokes before the mean field; None means none, or that no volumes are kept
    gained: NDArray[np.int64] | None = None


def prepare_channels(
    network: LabelMapNetwork | StreamedNetwork | CoarseNetwork,
    order: StorageOrder,
    case: GridImage,
    models: Sequence[ModelSpec],
    parameters: CrfParameters,
    backend: Backend,
    context: RunContext,
    strokes: Strokes | None = None,
) -> Prepared:
    """Prepare a label map, or channels that are not in memory, in storage order; all but label maps with few labels have tiles."""
    if isinstance(network, StreamedNetwork):
        plan = plan_stream(network, case, models[0], parameters, context)
    elif isinstance(network, CoarseNetwork):
        plan = plan_coarse(network, case, models[0], parameters, context)
    else:
        labels = np.ascontiguousarray(order.to_storage(network.labels))
        numbers, spacing = channel_numbers(labels, network.channels), models[0].kernels.network_spacing
        sigma = None if spacing is None else share_sigma(spacing, case.spacing)
        logits = _logits_of_labels(numbers, len(network.channels), sigma, case, models[0], parameters, backend)
        if logits is not None:
            in_memory = ArrayNetwork(order.to_user(logits))
            return prepare_array(in_memory, order, case, models, parameters, backend, context, labels=numbers, strokes=strokes)
        _check_temperature(models, -ABSENT_LOGIT)
        _finite_range(backend, case.values, "image", context.threads)
        plan = plan_label_map(numbers, case, models[0], parameters, context.threads, sigma)
    assert plan.labels is not None
    nothing, gained, problem = np.zeros((0, *plan.labels.shape), np.float32), None, plan.problem
    if strokes is not None:
        strength = _stroke_strength(models[0], is_label_map=isinstance(network, LabelMapNetwork))
        spacing = (*(1.0,) * (MAX_DIMS - len(case.spacing)), *case.spacing)

        def normalized(box: Box) -> Float32:
            return problem.normalized(box[0].start, box[0].stop)[(slice(None), slice(None), *box[1:])]

        model = StrokeModel(parameters.strokes, spacing, problem.mask, normalized, strength)
        labels = plan.labels.reshape(problem.grid.shape)
        lifts_absent = isinstance(network, LabelMapNetwork)
        edits = Edits.of_labels(strokes.on_tiles(), model, labels, models[0].mean_field.num_labels, lifts_absent=lifts_absent)
        plan, gained = edits.edit_plan(plan, counts_gains=parameters.volume.match_input)
    mask = plan.problem.image.mask
    return Prepared(nothing, case, plan, mask, labels=plan.labels, num_padding=plan.num_padding, notes=plan.notes, gained=gained)


def _stroke_strength(model: ModelSpec, *, is_label_map: bool) -> float:
    """Return the rise of a logit at a drawn voxel."""
    strength = STRENGTH
    if is_label_map:
        strength = STRENGTH_OF_LABELS if model.kernels.network_spacing is None else STRENGTH_OF_SHARES
    return strength * model.mean_field.temperature


def _logits_of_labels(
    numbers: Labels,
    num_channels: int,
    sigma: tuple[float, ...] | None,
    case: GridImage,
    model: ModelSpec,
    parameters: CrfParameters,
    backend: Backend,
) -> Float32 | None:
    """Return the logits of a label map with few labels, or of a map that cannot be refined on tiles; None if they are made tile by tile."""
    is_nearby = take_part_nearby(num_channels, numbers.size)
    if is_nearby:
        is_for_tiles = parameters.mean_field.label_threshold > 0 and parameters.volume.weight <= 0
        if backend.name == "cpu" and numbers.ndim <= MAX_DIMS and is_for_tiles:
            return None
        where = "the CPU with mean_field.label_threshold above 0 and volume.weight = 0"
        what = f"the logits of {num_channels} labels, which only {where} can do without, take"
        require_memory(4 * num_channels * numbers.size, what, memory_limit())
    if sigma is not None:
        return share_logits(numbers, num_channels, sigma)
    logits = one_hot_logits(numbers, range(num_channels))
    if is_nearby:
        reach = model.kernels.reach(case.spacing, numbers.shape)
        for channel in logits:
            np.copyto(channel, np.float32(ABSENT_LOGIT), where=~widen(channel == CONFIDENCE, reach))
    return logits


def prepare_array(
    network: ArrayNetwork,
    order: StorageOrder,
    case: GridImage,
    models: Sequence[ModelSpec],
    parameters: CrfParameters,
    backend: Backend,
    context: RunContext,
    labels: Labels | None = None,
    strokes: Strokes | None = None,
) -> Prepared:
    """Prepare channels in storage order, on tiles where these save work; `labels` are the channel numbers of a label map."""
    threads, mask, regions = context.threads, case.mask, network.regions
    are_regions, is_label_map = regions is not None, labels is not None
    with np.errstate(over="ignore"):
        channels: Float32 = order.to_storage(network.values.astype(np.float32, copy=False))
    lowest, largest = _finite_range(backend, channels, "logits", threads)
    if are_regions:
        # "auto" expects log-odds, and refuses values that look like probabilities.
        if network.input_type != "logits" and identify_regions(channels, network.input_type, kind="logits")[0] == "probabilities":
            channels, largest = np.array(channels, order="C"), -math.log(MIN_PROBABILITY)
            take_log_odds(channels)
        elif largest > MAX_LOG_ODDS:
            channels, largest = np.clip(channels, -MAX_LOG_ODDS, MAX_LOG_ODDS), MAX_LOG_ODDS
    num_padding, notes = 0, tuple[str, ...]()
    padding = find_padding(channels, are_regions=are_regions) if labels is None else None
    if padding is not None:
        mask, num_padding = leave_out(padding, mask, "logits")
        notes = (describe_padding(num_padding, padding.size, are_regions=are_regions),) if num_padding else ()
        if largest / models[0].mean_field.temperature > MAX_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            channels = np.where(padding, np.float32(0.0), channels)
            _, largest = _finite_range(backend, channels, "logits", threads)
    is_probability = False
    # A negative value that is no padding, of which there is none, belongs to logits.
    are_surely_logits = network.input_type == "logits" or (network.input_type == "auto" and padding is None and lowest < -SUM_TOLERANCE)
    if not are_regions and not are_surely_logits:
        is_probability = identify_array(channels, network.input_type) == "probabilities"
    _check_temperature(models, -math.log(MIN_PROBABILITY) if is_probability else largest)

    started = time.perf_counter()
    _finite_range(backend, case.values, "image", threads)
    exact = None if mask is None else bounding_box(mask)
    num_inside = math.prod(axis.stop - axis.start for axis in exact or ())
    box = exact if num_inside < WORTH_IT * channels[0].size else None
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    values = normalize_intensity(case.values, parameters.intensity, case.mask, box=box, threads=threads)
    image = replace(case, values=values, mask=mask if box is None or mask is None else mask[box])
    timings = {"normalize": time.perf_counter() - started}
    plan = gained = None
    if strokes is not None:
        if labels is None:
            labels = backend.label_map(channels, threads=threads) if regions is None else regions.decode(channels)
        channels = np.array(channels, order="C")
        if is_probability:
            take_logarithms(channels)
            is_probability = False

        strength = _stroke_strength(models[0], is_label_map=is_label_map)
        normalized = partial(_part_of, values, box or tuple(slice(0, extent) for extent in channels.shape[1:]))
        model = StrokeModel(parameters.strokes, case.spacing, mask, normalized, strength)
        if regions is not None:
            edits = Edits.of_regions(strokes, model, channels, regions)
        else:
            edits = Edits.of_labels(strokes, model, labels, len(channels), lifts_absent=is_label_map)
            notes += () if is_label_map else edits.find_ruled_out(channels, models[0].mean_field.temperature)
        keeps_volumes = parameters.volume.match_input  # Only these need what labels gain.
        before = backend.label_map(channels, threads=threads) if keeps_volumes else None
        edits.apply(channels)
        if before is not None:
            after = backend.label_map(channels, threads=threads)
            gained = np.subtract(count_labels(after, len(channels)), count_labels(before, len(channels)), dtype=np.int64)
    if not are_regions and backend.name == "cpu":
        inner = image
        if exact is not None and box is None:
            inner = replace(image, values=values[(slice(None), *exact)], mask=None if mask is None else mask[exact])
        threshold = parameters.mean_field.label_threshold
        plan, surveyed = plan_array(channels, exact, inner, models[0], threshold, threads, is_probability=is_probability)
        labels = surveyed if labels is None else labels
    return Prepared(channels, image, plan, mask, box, labels, num_padding, notes, is_probability, are_regions, timings, gained)


def _part_of(values: Float32, box: Box, part: Box) -> Float32:
    """Return an image, (M, *box), in a part of the grid, (M, *part); it is 0 outside the box."""
    result = np.zeros((len(values), *(axis.stop - axis.start for axis in part)), np.float32)
    target, source = [], []
    for own, wanted in zip(box, part, strict=True):
        start = max(own.start, wanted.start)
        stop = max(start, min(own.stop, wanted.stop))
        target.append(slice(start - wanted.start, stop - wanted.start))
        source.append(slice(start - own.start, stop - own.start))
    result[(slice(None), *target)] = values[(slice(None), *source)]
    return result


def _check_temperature(models: Sequence[ModelSpec], largest: float) -> None:
    """Raise ConfigError if energies and marginals, sums of a few logits over the temperature, would not fit into float32."""
    temperature = models[0].mean_field.temperature
    largest += max(0.0 if model.mean_field.bias is None else float(np.abs(model.mean_field.bias).max()) for model in models)
    if largest / temperature > MAX_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into {largest / temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )


def _finite_range(backend: Backend, channels: Array, name: str, threads: int | None) -> tuple[float, float]:
    """Raise InputError if a value is NaN or infinite; return the lowest value and the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0, 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
        for number, bounds in enumerate(ranges):
            if not all(abs(bound) <= _MAX_FLOAT for bound in bounds):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
                raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    return lowest, max(-lowest, highest, 0.0)
