"""A network's output in any form, prepared for refining: checked, without padding, its image normalized, its tiles planned."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays import label_maps, probabilities
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE, Box
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.probabilities import MAX_OVERSHOOT, MIN_PROBABILITY, SUM_TOLERANCE
from crfrefine.arrays.region_scheme import (
    MAX_LOG_ODDS,
    RegionScheme,
    identify_regions,
    take_log_odds,
)
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.limits import memory_limit, require_memory
from crfrefine.engines.base import Backend, GridImage, RunContext
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.strokes import Strokes, plan_edits
from crfrefine.refinement.tiles.coarse import CoarseNetwork, plan_coarse
from crfrefine.refinement.tiles.grid import MAX_DIMS
from crfrefine.refinement.tiles.planning import TilePlan, plan_array, plan_label_map, plan_stream
from crfrefine.refinement.tiles.streaming import StreamedNetwork

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters

# Share of the grid below which the mask's box is refined by itself, which costs a pass outside.
WORTH_IT = 0.9
MAX_LOGIT = 1e34  # well below float32's 3.4e38: differences and sums over labels must fit too
_MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    values: NDArray[
        np.floating[Any]
    ]  # (L, *grid) logits or probabilities, or (R, *grid) log-odds or probabilities of regions
    input_type: str = "logits"  # "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None means that they are labels
    network_spacing: tuple[float, ...] | None = (
        None  # mm between voxels of the network, if interpolated; None means unknown
    )


@dataclass(frozen=True, eq=False)
class LabelMapNetwork:
    """A label map instead of a network's output: only labels that occur take part, and if there are many, only near where they occur."""

    labels: Labels  # (*grid), in an unsigned type
    channels: Sequence[
        int
    ]  # the labels that occur, background, and at least two (`crfrefine.arrays.label_maps.channels_of`)
    num_labels: int  # L, background included, as values per label in the parameters have it
    # mm between voxels of the network, one number or one per axis, or "auto"; None: each label is taken as it is.
    network_spacing: ArrayLike | None = None
    # Of the channels, those of labels that only strokes have: they take part near these alone.
    only_drawn: Collection[int] = ()


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork | CoarseNetwork


def layout_of(network: Network) -> tuple[tuple[int, ...], StorageOrder]:
    """Return the shape (channels, *grid) of a network's output for users, and the order it is stored in."""
    if isinstance(network, ArrayNetwork):
        return network.values.shape, StorageOrder.of_memory(network.values[0])
    if isinstance(network, LabelMapNetwork):
        return (len(network.channels), *network.labels.shape), StorageOrder.of_memory(
            network.labels
        )
    num_channels = (
        network.channels.num_labels if isinstance(network, CoarseNetwork) else network.num_labels
    )
    return (num_channels, *network.grid_shape[::-1]), StorageOrder(
        tuple(range(len(network.grid_shape)))[::-1]
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """The inputs of a refinement, in storage order."""

    logits: Float32  # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    image: GridImage  # of the box, normalized; without logits in memory that of the tiles counts
    plan: TilePlan | None  # the labels of the tiles; None means all labels everywhere
    mask: Bool | None = (
        None  # (*grid), True inside the mask and outside the padding; None means everywhere
    )
    box: Box | None = (
        None  # the part of the grid that is refined without tiles; None means all of it
    )
    labels: Labels | None = (
        None  # (*grid) the network's label map; None means that it is still to be made from the logits
    )
    num_padding: int = 0  # voxels in the mask that are padding
    notes: tuple[str, ...] = ()  # notes for the user, one sentence each
    is_probability: bool = (
        False  # whether `logits` are probabilities of labels, whose logarithm is still to be taken
    )
    are_regions: bool = False  # whether the channels are regions
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage
    # (L,), voxels that each label gains by strokes before the mean field; None means none, or that no volumes are kept
    gained: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """What is refined besides the network's output, in the user's order of axes at first, and then in storage order."""

    image: GridImage  # raw intensities, and the user's mask
    parameters: CrfParameters
    backend: Backend
    context: RunContext
    strokes: Strokes | None
    order: StorageOrder  # of the axes
    models: Sequence[ModelSpec]  # one, or that of each region; none at first


def prepare_channels(
    network: LabelMapNetwork | StreamedNetwork | CoarseNetwork, case: Case
) -> Prepared:
    """Prepare a label map, or channels that are not in memory; all but label maps with few labels have tiles."""
    image, model, parameters, context = case.image, case.models[0], case.parameters, case.context
    is_label_map = isinstance(network, LabelMapNetwork)
    if isinstance(network, StreamedNetwork):
        plan = plan_stream(network, image, model, parameters, context)
    elif isinstance(network, CoarseNetwork):
        plan = plan_coarse(network, image, model, parameters, context)
    else:
        labels = np.ascontiguousarray(case.order.to_storage(network.labels))
        numbers, spacing = (
            label_maps.channel_numbers(labels, network.channels),
            model.kernels.network_spacing,
        )
        sigma = None if spacing is None else label_maps.share_sigma(spacing, image.spacing)
        logits = _logits_of_labels(numbers, network, sigma, case)
        if logits is not None:
            return prepare_array(ArrayNetwork(case.order.to_user(logits)), case, labels=numbers)
        plan = plan_label_map(numbers, image, model, parameters, context.threads, sigma)
    assert plan.labels is not None
    nothing, gained, problem = np.zeros((0, *plan.labels.shape), np.float32), None, plan.problem
    if case.strokes is not None:
        settings = (
            case.strokes,
            parameters.strokes,
            model,
            image.spacing,
            problem.mask,
            problem.normalized,
        )
        edits = plan_edits(
            *settings, plan.labels.reshape(problem.grid.shape), is_label_map=is_label_map
        )
        edited = edits.edit_plan(plan)
        plan = edited.plan
        if parameters.volume.match_input:
            gained = edited.count_gains()
    mask = plan.problem.image.mask
    return Prepared(
        nothing,
        image,
        plan,
        mask,
        labels=plan.labels,
        num_padding=plan.num_padding,
        notes=plan.notes,
        gained=gained,
    )


def _logits_of_labels(
    numbers: Labels, network: LabelMapNetwork, sigma: tuple[float, ...] | None, case: Case
) -> Float32 | None:
    """Return the logits of a label map with few labels, or of a map that cannot be refined on tiles; None if they are made tile by tile."""
    num_channels = len(network.channels)
    # A stroke of a new label does not change how the others take part.
    num_of_network = num_channels - len(network.only_drawn)
    is_nearby = label_maps.take_part_nearby(num_of_network, numbers.size)
    if is_nearby:
        is_for_tiles = (
            case.parameters.mean_field.label_threshold > 0 and case.parameters.volume.weight <= 0
        )
        if case.backend.name == "cpu" and numbers.ndim <= MAX_DIMS and is_for_tiles:
            return None
        where = "the CPU with mean_field.label_threshold above 0 and volume.weight = 0"
        what = f"the logits of {num_channels} labels, which only {where} can do without, take"
        require_memory(4 * num_channels * numbers.size, what, memory_limit())
    if sigma is not None:
        return label_maps.share_logits(numbers, num_channels, sigma)
    of_network = [number for number in network.channels if number not in network.only_drawn]
    logits = label_maps.one_hot_logits(numbers, network.channels, of_network)
    if is_nearby:
        reach = case.models[0].kernels.reach(case.image.spacing, numbers.shape)
        for channel in logits:
            np.copyto(
                channel,
                np.float32(ABSENT_LOGIT),
                where=~label_maps.widen(channel == CONFIDENCE, reach),
            )
    return logits


def prepare_array(network: ArrayNetwork, case: Case, labels: Labels | None = None) -> Prepared:
    """Prepare channels, on tiles where these save work; `labels` are the channel numbers of a label map."""
    backend, threads = case.backend, case.context.threads
    mask, regions, parameters = case.image.mask, network.regions, case.parameters
    run, are_regions, is_label_map = (
        case.models[0].mean_field,
        regions is not None,
        labels is not None,
    )
    with np.errstate(over="ignore"):
        channels: Float32 = case.order.to_storage(network.values.astype(np.float32, copy=False))
    lowest, largest = _finite_range(backend, channels, "logits", threads)
    if are_regions:
        # "auto" expects log-odds, and refuses values that look like probabilities.
        if (
            network.input_type != "logits"
            and identify_regions(channels, network.input_type, kind="logits")[0] == "probabilities"
        ):
            channels, largest = np.array(channels, order="C"), -math.log(MIN_PROBABILITY)
            take_log_odds(channels)
        elif largest > MAX_LOG_ODDS:
            channels, largest = np.clip(channels, -MAX_LOG_ODDS, MAX_LOG_ODDS), MAX_LOG_ODDS
    ties = None
    if not is_label_map:
        ties = probabilities.find_ties(channels, are_regions=are_regions)
    # A value far below 0 that is no tie, of which there is none, belongs to logits.
    are_surely_logits = network.input_type == "logits" or (
        network.input_type == "auto" and ties is None and lowest < -MAX_OVERSHOOT
    )
    is_probability = not are_regions and not are_surely_logits
    is_probability = (
        is_probability
        and probabilities.identify_array(channels, network.input_type) == "probabilities"
    )
    padding = None
    if ties is not None:
        padding = probabilities.padding_of(
            channels, ties, are_regions=are_regions, is_probability=is_probability
        )
    num_padding, notes = 0, tuple[str, ...]()
    if padding is not None:
        mask, num_padding, notes = probabilities.leave_out(
            padding, mask, "logits", are_regions=are_regions
        )
        if largest / run.temperature > MAX_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            channels = np.where(padding, np.float32(0.0), channels)
            _, largest = _finite_range(backend, channels, "logits", threads)
    if is_probability and max(-lowest, largest - 1) > SUM_TOLERANCE:
        notes += probabilities.notes_on_overshoot(channels)
    # Energies and marginals are sums of a few logits over the temperature.
    largest = -math.log(MIN_PROBABILITY) if is_probability else largest
    largest += max(
        0.0 if model.mean_field.bias is None else float(np.abs(model.mean_field.bias).max())
        for model in case.models
    )
    if largest / run.temperature > MAX_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {run.temperature:g} turns logits up to {largest:g} into {largest / run.temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )

    started = time.perf_counter()
    exact = None if mask is None else label_maps.bounding_box(mask)
    num_inside = math.prod(axis.stop - axis.start for axis in exact or ())
    box = exact if num_inside < WORTH_IT * channels[0].size else None
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    values = normalize_intensity(
        case.image.values, parameters.intensity, case.image.mask, box=box, threads=threads
    )
    image = replace(
        case.image, values=values, mask=mask if box is None or mask is None else mask[box]
    )
    timings = {"normalize": time.perf_counter() - started}
    plan = gained = None
    if case.strokes is not None:
        if labels is None:
            labels = (
                backend.label_map(channels, threads=threads)
                if regions is None
                else regions.decode(channels)
            )
        channels = np.array(channels, order="C")
        if is_probability:
            probabilities.take_logarithms(channels)
            is_probability = False

        def normalized(part: Box) -> Float32:
            if box is None:
                return values[(slice(None), *part)]
            # Values outside the box are those at its faces: they do not matter outside the mask.
            inner = (
                np.arange(a.start, a.stop).clip(b.start, b.stop - 1) - b.start
                for a, b in zip(part, box, strict=True)
            )
            of_box: Float32 = values[np.ix_(np.arange(len(values)), *inner)]
            return of_box

        settings = case.strokes, parameters.strokes, case.models[0], image.spacing, mask, normalized
        edits = plan_edits(
            *settings, labels if regions is None else channels, regions, is_label_map=is_label_map
        )
        if not is_label_map:
            notes += edits.find_ruled_out(channels, run.temperature, are_regions=are_regions)
        keeps_volumes = parameters.volume.match_input  # Only these need what labels gain.
        before = backend.label_map(channels, threads=threads) if keeps_volumes else None
        edits.apply(channels)
        if before is not None:
            counts = (
                label_maps.count_labels(each, len(channels))
                for each in (before, backend.label_map(channels, threads=threads))
            )
            gained = np.diff(list(counts), axis=0)[0]
    if not are_regions and backend.name == "cpu":
        inner = image
        if exact is not None and box is None:
            inner = replace(
                image,
                values=values[(slice(None), *exact)],
                mask=None if mask is None else mask[exact],
            )
        threshold = parameters.mean_field.label_threshold
        plan, surveyed = plan_array(
            channels,
            exact,
            inner,
            case.models[0],
            threshold,
            threads,
            is_probability=is_probability,
        )
        labels = surveyed if labels is None else labels
    return Prepared(
        channels,
        image,
        plan,
        mask,
        box,
        labels,
        num_padding,
        notes,
        is_probability,
        are_regions,
        timings,
        gained,
    )


def without_nan(
    image: GridImage, backend: Backend, threads: int | None
) -> tuple[GridImage, tuple[str, ...]]:
    """Return an image whose mask lacks the voxels that are NaN, and a note if there are any.

    Raises InputError for infinite values, and if hardly any voxel is left.
    """
    if _is_finite(backend, image.values, threads):
        return image, ()
    values = image.values.copy(order="K")
    numbers = np.where(np.isnan(values), values.dtype.type(0), values)
    _finite_range(backend, numbers, "image", threads)
    mask, note = leave_out_nan(values, image.mask, "image")
    return replace(image, values=values, mask=mask), (note,)


def _is_finite(backend: Backend, channels: Array, threads: int | None) -> bool:
    """Return whether all values are finite in float32."""
    if channels.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
    return all(abs(bound) <= _MAX_FLOAT for bounds in ranges for bound in bounds)


def _finite_range(
    backend: Backend, channels: Array, name: str, threads: int | None
) -> tuple[float, float]:
    """Raise InputError if a value is NaN or infinite; return the lowest value and the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0, 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
        for number, bounds in enumerate(ranges):
            if not all(abs(bound) <= _MAX_FLOAT for bound in bounds):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
                raise InputError(
                    f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)"
                )
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    return lowest, max(-lowest, highest, 0.0)
