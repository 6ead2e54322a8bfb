"""A network's output in any form, prepared for refining: checked, without padding, its image normalized, its tiles planned."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import check_shapes
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.one_hot import (
    ABSENT_LOGIT,
    channel_numbers,
    leave_far_out,
    one_hot_logits,
    share_logits,
    share_sigma,
    take_part_nearby,
)
from crfrefine.arrays.padding import describe_padding, find_padding, leave_out
from crfrefine.arrays.probabilities import MIN_PROBABILITY, SUM_TOLERANCE, identify_array
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, identify_regions, take_log_odds
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.axes import StorageOrder
from crfrefine.base.memory import memory_limit, require_memory
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import ConfigError, InputError
from crfrefine.refinement.tiles.grid import MAX_DIMS
from crfrefine.refinement.tiles.planning import TilePlan, plan_array, plan_label_map, plan_stream
from crfrefine.refinement.tiles.streaming import StreamedNetwork

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.engines.base import Backend, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec

WORTH_IT = 0.9
"""Share of the grid below which the mask's bounding box is refined by itself: the voxels outside cost one pass of reading and writing."""

MAX_LOGIT = 1e34
"""Well below float32's 3.4e38: differences and sums over labels must fit too."""

_MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    values: NDArray[np.floating[Any]]  # (L, *grid) logits or probabilities, or (R, *grid) log-odds or probabilities of regions
    input_type: str = "logits"  # "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None: they are labels
    may_be_padded: bool = True  # whether equal logits of all labels mean padding

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid)."""
        return self.values.shape

    @property
    def order(self) -> StorageOrder:
        """Of the axes in memory."""
        return StorageOrder.of_memory(self.values[0])

    def check_shapes(self, image: Array, mask: Array | None) -> None:
        """Raise InputError unless image and mask fit."""
        check_shapes(self.values, image, mask, fewest_channels=2 if self.regions is None else 1)


@dataclass(frozen=True, eq=False)
class LabelMapNetwork:
    """A label map instead of a network's output: only labels that occur take part, and if there are many, only near where they occur."""

    labels: Labels  # (*grid), in an unsigned type
    channels: Sequence[int]  # the labels that occur, background, and at least two (`crfrefine.arrays.one_hot.channels_of`)
    num_labels: int  # L, background included, as values per label in the parameters have it
    # mm between voxels of the network that made the map, one number or one per axis; "auto" means that blocks in the map show it.
    # None means that each voxel's label is taken as it is.
    network_spacing: ArrayLike | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid)."""
        return len(self.channels), *self.labels.shape

    @property
    def order(self) -> StorageOrder:
        """Of the axes in memory."""
        return StorageOrder.of_memory(self.labels)

    def check_shapes(self, image: Array, mask: Array | None) -> None:
        """Raise InputError unless image and mask fit."""
        check_shapes(np.broadcast_to(self.labels, self.shape), image, mask)


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork


@dataclass(frozen=True, eq=False)
class Prepared:
    """The inputs of a refinement, in storage order."""

    logits: Float32  # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    mask: Bool | None  # (*grid), True inside the mask and outside the padding; None: everywhere
    box: Box | None  # the part of the grid that is refined without tiles; None means all of it
    image: GridImage  # of the box, normalized; without logits in memory that of the tiles counts
    plan: TilePlan | None  # the labels of the tiles; None means all labels everywhere
    num_padding: int = 0  # voxels in the mask that are padding
    notes: tuple[str, ...] = ()  # notes for the user, one sentence each
    is_probability: bool = False  # whether `logits` are probabilities of labels, whose logarithm is still to be taken
    are_regions: bool = False  # whether the channels are regions
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage


def prepare(
    network: Network, case: GridImage, models: Sequence[ModelSpec], parameters: CrfParameters, backend: Backend, context: RunContext
) -> Prepared:
    """Return a network's output, checked, with a plan of tiles where these save work, or where channels are not in memory.

    The image of `case` has any type. Errors are those of `crfrefine.refine`.
    """
    if isinstance(network, LabelMapNetwork):
        network = _in_memory(network, case, models[0], parameters, backend) or network
    if isinstance(network, ArrayNetwork):
        return _prepare_array(network, case, models, parameters, backend, context)
    if isinstance(network, StreamedNetwork):
        plan = plan_stream(network, case, models[0], parameters, context)
    else:
        _check_temperature(models, -ABSENT_LOGIT)
        _check_finite(backend, case.values, "image", context.threads)
        numbers = channel_numbers(np.ascontiguousarray(network.order.to_storage(network.labels)), network.channels)
        plan = plan_label_map(numbers, case, models[0], parameters, context.threads, _sigma(case, models[0]))
    nothing = np.zeros((0, *network.shape[1:]), np.float32)
    return Prepared(nothing, plan.problem.image.mask, None, case, plan, plan.num_padding, plan.notes)


def _in_memory(
    network: LabelMapNetwork, case: GridImage, model: ModelSpec, parameters: CrfParameters, backend: Backend
) -> ArrayNetwork | None:
    """Return the logits of a label map with few labels, or of a map that cannot be refined on tiles; None if they are made tile by tile."""
    stored = np.ascontiguousarray(network.order.to_storage(network.labels))
    sigma = _sigma(case, model)

    def logits() -> ArrayNetwork:
        """Return the logits of all labels everywhere."""
        if sigma is not None:
            values = share_logits(channel_numbers(stored, network.channels), len(network.channels), sigma)
        else:
            values = one_hot_logits(stored, network.channels)
        return ArrayNetwork(network.order.to_user(values), may_be_padded=sigma is None)

    if not take_part_nearby(len(network.channels), stored.size):
        return logits()
    if backend.name == "cpu" and stored.ndim <= MAX_DIMS and parameters.mean_field.label_threshold > 0 and parameters.volume.weight <= 0:
        return None
    what = (
        f"the logits of {len(network.channels)} labels, which only the CPU with mean_field.label_threshold above 0 and volume.weight = 0 "
        "can do without, take"
    )
    require_memory(4 * len(network.channels) * stored.size, what, memory_limit())
    found = logits()
    if sigma is None:
        leave_far_out(network.order.to_storage(found.values), model.kernels.reach(case.spacing, stored.shape))
    return found


def _sigma(case: GridImage, model: ModelSpec) -> tuple[float, ...] | None:
    """Return the standard deviation of shares in voxels; None for label maps that are not of a coarser network. All in storage order."""
    network_spacing = model.kernels.network_spacing
    return None if network_spacing is None else share_sigma(network_spacing, case.spacing)


def _prepare_array(
    network: ArrayNetwork, case: GridImage, models: Sequence[ModelSpec], parameters: CrfParameters, backend: Backend, context: RunContext
) -> Prepared:
    threads, are_regions, mask = context.threads, network.regions is not None, case.mask
    with np.errstate(over="ignore"):
        channels = network.order.to_storage(network.values.astype(np.float32, copy=False))
    lowest, largest = _check_finite(backend, channels, "logits", threads)
    if are_regions:
        channels, largest = _as_log_odds(channels, network.input_type, largest)
    num_padding, notes = 0, tuple[str, ...]()
    padding = find_padding(channels, are_regions=are_regions) if network.may_be_padded else None
    if padding is not None:
        mask, num_padding = leave_out(padding, mask, "logits")
        notes = (describe_padding(num_padding, padding.size, are_regions=are_regions),) if num_padding else ()
        if largest / models[0].mean_field.temperature > MAX_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            channels = np.where(padding, np.float32(0.0), channels)
            _, largest = _check_finite(backend, channels, "logits", threads)
    is_probability = False
    # A negative value that is no padding, of which there is none, belongs to logits.
    if not are_regions and (network.input_type != "auto" or padding is not None or lowest >= -SUM_TOLERANCE):
        is_probability = identify_array(channels, network.input_type) == "probabilities"
    _check_temperature(models, -math.log(MIN_PROBABILITY) if is_probability else largest)

    started = time.perf_counter()
    _check_finite(backend, case.values, "image", threads)
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    box = None if mask is None else box_of(mask)
    values = normalize_intensity(case.values, parameters.intensity, case.mask, box=box, threads=threads)
    image = GridImage(values, mask if box is None or mask is None else mask[box], case.spacing, case.axes)
    timings = {"normalize": time.perf_counter() - started}
    plan = None
    if not are_regions and backend.name == "cpu":
        threshold = parameters.mean_field.label_threshold
        plan = plan_array(channels, mask, box, image, models[0], threshold, threads, is_probability=is_probability)
    return Prepared(channels, mask, box, image, plan, num_padding, notes, is_probability, are_regions, timings)


def box_of(mask: Bool) -> Box | None:
    """Return the mask's bounding box; None if it is nearly the whole grid."""
    box = bounding_box(mask)
    inside = math.prod(axis.stop - axis.start for axis in box or ())
    return box if inside < WORTH_IT * mask.size else None


def _as_log_odds(channels: Float32, input_type: str, largest: float) -> tuple[Float32, float]:
    """Return the log-odds of regions and their largest magnitude; "auto" expects log-odds and refuses what looks like probabilities."""
    if input_type != "logits" and identify_regions(channels, input_type, kind="logits")[0] == "probabilities":
        channels = np.array(channels, order="C")
        take_log_odds(channels)
        return channels, -math.log(MIN_PROBABILITY)
    if largest > MAX_LOG_ODDS:
        return np.clip(channels, -MAX_LOG_ODDS, MAX_LOG_ODDS), MAX_LOG_ODDS
    return channels, largest


def _check_temperature(models: Sequence[ModelSpec], largest: float) -> None:
    """Raise ConfigError if energies and marginals, sums of a few logits over the temperature, would not fit into float32."""
    temperature = models[0].mean_field.temperature
    largest += max(0.0 if model.mean_field.bias is None else float(np.abs(model.mean_field.bias).max()) for model in models)
    if largest / temperature > MAX_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into {largest / temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )


def _check_finite(backend: Backend, channels: Array, name: str, threads: int | None) -> tuple[float, float]:
    """Raise InputError if a value is NaN or infinite; return the lowest value and the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0, 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
    for number, (lowest, highest) in enumerate(ranges):
        if not (math.isfinite(lowest) and math.isfinite(highest) and max(-lowest, highest) <= _MAX_FLOAT):
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
            raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    return lowest, max(-lowest, highest, 0.0)
