"""Refine one case: the library's main function, from raw intensities and logits to a label map.

`crfrefine.cases.case` handles files, and `crfrefine.infer.run` handles folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.arguments import check_no_label_map, check_shapes, given_array, given_label_map, given_spacing
from crfrefine.arrays.case_image import CaseImage
from crfrefine.arrays.components import clean
from crfrefine.arrays.dice_decision import dice_labels, dice_region_labels
from crfrefine.arrays.label_maps import Box
from crfrefine.arrays.one_hot import (
    ABSENT_LOGIT,
    channel_numbers,
    channels_of,
    leave_far_out,
    one_hot_logits,
    present_labels,
    take_part_nearby,
)
from crfrefine.arrays.padding import describe_padding, leave_out
from crfrefine.arrays.probabilities import SMALLEST_PROBABILITY, identify_array, take_logarithms
from crfrefine.arrays.region_channels import (
    LARGEST_LOG_ODDS,
    check_channels,
    describe_undecided,
    find_undecided,
    identify_regions,
    take_log_odds,
)
from crfrefine.arrays.region_scheme import RegionScheme, check_regions
from crfrefine.axes import StorageOrder
from crfrefine.engines import device_for, get_backend
from crfrefine.engines.base import Backend, Progress
from crfrefine.engines.regions import region_mean_field
from crfrefine.errors import ConfigError, InputError
from crfrefine.memory import memory_limit, require_memory
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.region_model import resolve_regions
from crfrefine.refinement_result import DenseLogits, RefinementResult, probabilities_of, renumbered
from crfrefine.refining_again import RefiningAgain
from crfrefine.specs import ModelSpec
from crfrefine.tiles.cropping import CroppedLogits, box_of
from crfrefine.tiles.grid import MOST_DIMS, reach_of_axes
from crfrefine.tiles.label_refining import refine_label_tiles
from crfrefine.tiles.refining import refine_tiles
from crfrefine.tiles.running import Settings
from crfrefine.tiles.streamed_logits import StreamedLogits
from crfrefine.tiles.tiled_logits import TiledLogits

LARGEST_LOGIT = 1e34
"""Well below float32's 3.4e38: differences and sums over labels must fit too."""

_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def refine(
    logits: NDArray[np.floating[Any]],
    image: NDArray[Any],
    *,
    spacing: Sequence[float] | float = 1.0,
    parameters: CrfParameters | str | Path | None = None,
    mask: NDArray[Any] | None = None,
    input_type: str = "auto",
    regions: RegionScheme | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    again: RefiningAgain | None = None,
) -> RefinementResult:
    """Refine a network's logits, or a label map, with the dense CRF.

    Voxels where all labels have exactly the same logit, such as the padding of a crop, take no part: they keep label 0 and neither send nor
    receive messages. With `regions`, these are the voxels where all log-odds are exactly 0.

    Args:
        logits: (L, *grid), higher is better, finite; L >= 2. With `regions`: (R, *grid), one log-odds per region, above 0 inside. With
            `input_type="labels"`: (*grid) labels, whole numbers from 0 up.
        image: (M, *grid) or (*grid), raw intensities, which are normalized as the parameters specify.
        spacing: distance between neighboring voxels in mm, one per grid axis or one for all.
        parameters: the model, or the name of a preset or the path of a TOML file to load; None: the `default` preset.
        mask: (*grid), nonzero where the model applies; None: everywhere.
        input_type: "probabilities": `logits` are probabilities, and their logarithm is taken. "auto": they are logits, and values that look
            like probabilities are refused; "logits": they are logits even if they look like probabilities; "labels": a label map.
        regions: overlapping regions, one sigmoid channel each, as of nnU-Net's region-based training: each is refined as a problem of two
            labels on the same kernels, and together they become the label map. None: the channels are labels, together one softmax.
        device: "auto", "cpu", "cuda", "cuda:N" or "reference"; "auto" is the CPU, with a note, if volumes are to be kept.
        threads: CPU threads; None: the cores this process may use.
        progress: called as progress(stage, step, num_steps) between stages; may raise to stop.
        again: for programs that refine one case with ever new parameters (`crfrefine.refining_again`); None: nothing is kept.

    Returns:
        The refined case. Its arrays have the same memory order as `logits`.

    Raises:
        InputError: shapes do not fit, fewer than two labels, values that are not finite, an empty mask, a label map or probabilities in
            place of logits, logits that are equal for all labels nearly everywhere.
        ConfigError: a list in the parameters has the wrong length for this case, or the preset or file does not exist.
        BackendUnavailableError: the device is not available.
        CapacityError: not enough memory, or bandwidths too small for the lattice.

    Source: Krähenbühl & Koltun 2011; the recurrent form is Zheng et al. 2015; docs/reference/math.md.

    Examples:
        A network is unsure of one voxel in the middle of a bright structure; the voxels around it decide.

        >>> import numpy as np
        >>> import crfrefine
        >>> image = np.zeros((5, 6, 7))
        >>> image[1:4, 1:5, 2:6] = 100.0
        >>> logits = np.stack([np.zeros((5, 6, 7)), np.where(image > 0, 2.0, -2.0)])
        >>> logits[1, 2, 3, 4] = -0.5
        >>> result = crfrefine.refine(logits, image, spacing=(1.0, 1.0, 2.5))
        >>> int(result.network_label_map[2, 3, 4]), int(result.label_map[2, 3, 4])
        (0, 1)
        >>> result.changes.voxels_changed
        1
    """
    parameters = as_parameters(parameters)
    logits, image = given_array(logits, "logits"), given_array(image, "image")
    if input_type == "labels":
        labels = given_label_map(logits, image)
        channels = channels_of(present_labels(StorageOrder.of_memory(labels).to_storage(labels)))
        num_labels = parameters.num_labels or channels[-1] + 1
        if channels[-1] >= num_labels:
            raise InputError(
                f"the label map holds labels up to {channels[-1]}, but the parameters have values for {num_labels} labels; give "
                "parameters for all labels, or merge labels"
            )
        return refine_label_map(
            labels,
            image,
            channels,
            num_labels,
            spacing=spacing,
            parameters=parameters,
            mask=mask,
            device=device,
            threads=threads,
            progress=progress,
            again=again,
        )
    if mask is not None:
        mask = given_array(mask, "mask")
    check_no_label_map(logits, image, input_type)
    if image.ndim == logits.ndim - 1:
        image = image[None]
    regions = check_regions(regions)
    check_shapes(logits, image, mask, fewest_channels=2 if regions is None else 1)
    num_dims = logits.ndim - 1
    steps = given_spacing(spacing, num_dims)
    models = _resolve(parameters, logits, len(image), num_dims, regions)
    device, of_device = device_for(device, keeps_volumes=parameters.volume.weight > 0.0)
    backend = get_backend(device) if again is None else again.replaces(get_backend(device))
    inside = None if mask is None else mask.astype(np.bool_, copy=False)

    # The model does not depend on the order of axes, so the engine gets them in storage order: a volume read from a file is not copied.
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32, copy=False)
    order = StorageOrder.of_memory(logits[0])
    ordered_logits, ordered_image = order.to_storage(logits), order.to_storage(image)
    # On a GPU, what is asked about the logits is answered there, and they come back only if the caller asks for them.
    held = ordered_logits if regions is not None else backend.hold(ordered_logits)
    largest = _check_finite(backend, ordered_logits, "logits", threads, held)
    ordered_mask = None if inside is None else order.to_storage(inside)
    crf_mask, num_padding = ordered_mask, 0
    notes: tuple[str, ...] = () if of_device is None else (of_device,)
    temperature, largest_bias = models[0].mean_field.temperature, max(_largest_bias(model) for model in models)
    if regions is not None:
        ordered_logits, largest = _as_log_odds(ordered_logits, input_type, largest)
        held = ordered_logits
    padding = backend.find_padding(held) if regions is None else find_undecided(ordered_logits)
    if padding is not None:
        crf_mask, num_padding = leave_out(padding, ordered_mask, "logits")
        describe = describe_padding if regions is None else describe_undecided
        notes += (describe(num_padding, padding.size),) if num_padding else ()
        if (largest + largest_bias) / temperature > LARGEST_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            ordered_logits = np.where(padding, np.float32(0.0), ordered_logits)
            held = ordered_logits if regions is not None else backend.hold(ordered_logits)
            largest = _check_finite(backend, ordered_logits, "logits", threads, held)
    is_probability = regions is None and identify_array(ordered_logits, input_type) == "probabilities"
    if is_probability:
        largest = -math.log(SMALLEST_PROBABILITY)
    _check_temperature(temperature, largest + largest_bias)
    _check_finite(backend, ordered_image, "image", threads)
    started = time.perf_counter()
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    box = box_of(crf_mask)
    normalized = CaseImage.normalized(ordered_image, parameters.intensity, ordered_mask, box, threads=threads)
    timings = {"normalize": time.perf_counter() - started}
    models = [ModelSpec(model.kernels.in_storage(order), model.mean_field) for model in models]
    case = normalized, crf_mask, order.axes_to_storage(steps)
    settings: dict[str, Any] = {"axes": order.axes, "threads": threads, "progress": progress}
    decode = partial(backend.label_map, threads=threads) if regions is None else regions.decode
    refined: CroppedLogits | DenseLogits | TiledLogits | None = None
    if regions is None:
        threshold, how = parameters.mean_field.label_threshold, Settings(threads, progress)
        refined = refine_tiles(backend, ordered_logits, *case, models[0], threshold, how, axes=order.axes, is_probability=is_probability)
    if refined is None:
        if again is not None:
            again.watch(decode, ordered_logits, box, order)
        refined = _refine_all_labels(
            backend, ordered_logits, held, case, models, settings, box=box, is_region=regions is not None, is_probability=is_probability
        )
    _check_outcome(backend, refined, threads)
    started = time.perf_counter()
    network = decode(held)
    del held
    if parameters.postprocess.decision == "dice":
        probabilities = probabilities_of(refined.dense(), parameters.mean_field.output_temperature, backend, regions, threads=threads)
        labels = _decide_by_dice(probabilities, regions, crf_mask, network)
    else:
        labels = refined.label_map(network, decode)
    cleaned = clean(order.to_user(labels), parameters.postprocess, math.prod(steps) / 1000.0)
    timings |= {**refined.timings, "labels": time.perf_counter() - started}
    return RefinementResult(
        label_map=cleaned.label_map,
        network_label_map=order.to_user(network),
        channels=refined,
        order=order,
        report=refined.report,
        timings=timings,
        device=backend.name,
        threads=threads,
        num_padding_voxels=num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        notes=notes,
        spacing=tuple(steps),
        regions=regions,
        output_temperature=parameters.mean_field.output_temperature,
    )


def _refine_all_labels(
    backend: Backend,
    logits: NDArray[np.float32],
    held: Any,
    case: tuple[CaseImage, NDArray[np.bool_] | None, tuple[float, ...]],
    models: Sequence[ModelSpec],
    settings: dict[str, Any],
    *,
    box: Box | None,
    is_region: bool,
    is_probability: bool,
) -> CroppedLogits | DenseLogits:
    """Run the mean field of all labels, or regions, in the mask's box unless that is None; `held` are the logits from `Backend.hold`."""
    image, mask, spacing = case
    values = held
    if is_probability:
        values = np.array(logits[(slice(None), *(box or ()))], order="C")
        take_logarithms(values)
    if is_region:
        outcome = region_mean_field(backend, values, image.take(), mask, spacing, models, box=box, **settings)
    else:
        outcome = backend.mean_field(values, image.take(), mask, spacing, models[0], box=box, **settings)
    if box is None:
        return DenseLogits(outcome)
    return CroppedLogits(logits, box, models[0].mean_field.temperature, outcome, is_probability=is_probability)


def _decide_by_dice(
    probabilities: NDArray[np.float32],
    regions: RegionScheme | None,
    mask: NDArray[np.bool_] | None,
    network: NDArray[np.unsignedinteger[Any]],
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label map with the best expected Dice under the marginals; voxels outside the mask keep the network's label."""
    found = dice_labels(probabilities, mask) if regions is None else dice_region_labels(probabilities, regions, mask)
    return found if mask is None else np.where(mask, found, network)


def _resolve(
    parameters: CrfParameters, logits: NDArray[Any], num_modalities: int, num_dims: int, regions: RegionScheme | None
) -> Sequence[ModelSpec]:
    """Return the model of the labels, or one per region."""
    if regions is None:
        return [parameters.resolve(len(logits), num_modalities, num_dims)]
    check_channels(logits, regions)
    parameters.postprocess.check_lengths(regions.num_labels)
    return resolve_regions(parameters, len(logits), num_modalities, num_dims)


def _as_log_odds(channels: NDArray[np.float32], input_type: str, largest: float) -> tuple[NDArray[np.float32], float]:
    """Return the log-odds of regions and their largest magnitude; "auto" expects log-odds and refuses what looks like probabilities."""
    if input_type != "logits" and identify_regions(channels, input_type, kind="logits")[0] == "probabilities":
        channels = np.array(channels, order="C")
        take_log_odds(channels)
        return channels, -math.log(SMALLEST_PROBABILITY)
    if largest > LARGEST_LOG_ODDS:
        return np.clip(channels, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), LARGEST_LOG_ODDS
    return channels, largest


def refine_label_map(
    labels: NDArray[np.unsignedinteger[Any]],
    image: NDArray[Any],
    channels: Sequence[int],
    num_labels: int,
    *,
    spacing: Sequence[float] | float,
    parameters: CrfParameters,
    mask: NDArray[Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    num_bytes: Callable[[], int | None] | None = None,
    again: RefiningAgain | None = None,
) -> RefinementResult:
    """Refine a label map whose labels are known: only those that occur take part, and if there are many, only near where they occur.

    Args:
        labels: (*grid), in an unsigned type.
        image: (M, *grid) or (*grid), raw intensities.
        channels: the labels that occur, background, and at least two (`crfrefine.arrays.one_hot.channels_of`).
        num_labels: L, background included, as values per label in the parameters have it.
        spacing: as in `refine`.
        parameters: the model of all labels.
        mask: as in `refine`.
        device: as in `refine`.
        threads: as in `refine`.
        progress: as in `refine`.
        num_bytes: called before a run on tiles: what it may take beyond what is in memory then; None: any amount.
        again: as in `refine`.

    Raises:
        CrfRefineError: as in `refine`.
    """
    parameters.volume.check_label_map()
    chosen = parameters.select_labels(channels, num_labels)
    order = StorageOrder.of_memory(labels)
    stored = np.ascontiguousarray(order.to_storage(labels))
    by_channel = None if again is None else again.renumbered(channels)
    options: dict[str, Any] = {"device": device, "threads": threads, "progress": progress, "again": by_channel}
    if not take_part_nearby(len(channels), stored.size):
        logits = order.to_user(one_hot_logits(stored, channels))
        result = refine(logits, image, spacing=spacing, parameters=chosen, mask=mask, input_type="logits", **options)
        return renumbered(result, channels, num_labels)
    image = image[None] if image.ndim == labels.ndim else image
    mask = None if mask is None else given_array(mask, "mask")
    check_shapes(np.broadcast_to(labels, (len(channels), *labels.shape)), image, mask)
    steps = given_spacing(spacing, labels.ndim)
    model = chosen.resolve(len(channels), len(image), labels.ndim)
    kernels, ordered_steps = model.kernels.in_storage(order), order.axes_to_storage(steps)
    backend = get_backend(device)
    if backend.name != "cpu" or labels.ndim > MOST_DIMS or chosen.mean_field.label_threshold <= 0 or chosen.volume.weight > 0:
        what = (
            f"the logits of {len(channels)} labels, which only the CPU with mean_field.label_threshold above 0 and volume.weight = 0 "
            "can do without, take"
        )
        require_memory(4 * len(channels) * stored.size, what, memory_limit())
        logits = one_hot_logits(stored, channels)
        leave_far_out(logits, reach_of_axes(kernels, ordered_steps))
        result = refine(order.to_user(logits), image, spacing=steps, parameters=chosen, mask=mask, input_type="logits", **options)
        return renumbered(result, channels, num_labels)
    check_decision_on_tiles(parameters, len(channels))
    _check_temperature(model.mean_field.temperature, _largest_bias(model) - ABSENT_LOGIT)
    ordered_image = order.to_storage(image)
    _check_finite(backend, ordered_image, "image", threads)
    refined = refine_label_tiles(
        backend,
        channel_numbers(stored, channels),
        ordered_image,
        None if mask is None else order.to_storage(mask != 0),
        ordered_steps,
        chosen.intensity,
        ModelSpec(kernels, model.mean_field),
        Settings(threads, progress, num_bytes),
        threshold=chosen.mean_field.label_threshold,
        axes=order.axes,
    )
    _check_outcome(backend, refined, threads)
    return renumbered(streamed_result(refined, order, chosen, steps, backend.name, threads), channels, num_labels)


def check_decision_on_tiles(parameters: CrfParameters, num_labels: int) -> None:
    """Raise ConfigError if the decision needs the marginals of all labels, which a run on tiles does not have at once."""
    if parameters.postprocess.decision != "argmax":
        raise ConfigError(
            f"postprocess.decision: '{parameters.postprocess.decision}' needs the marginals of all labels at every voxel, but this case of "
            f"{num_labels} labels is worked on part by part; set it to 'argmax', or mean_field.label_threshold = 0 if the memory allows"
        )


def streamed_result(
    refined: StreamedLogits, order: StorageOrder, parameters: CrfParameters, spacing: Sequence[float], device: str, threads: int | None
) -> RefinementResult:
    """Return the result of a run on tiles, with its label map cleaned.

    Args:
        refined: the run.
        order: of the axes in it.
        parameters: with the small-object rules and the output temperature.
        spacing: mm, one per grid axis.
        device: the name of the engine.
        threads: None: the cores this process may use.
    """
    started = time.perf_counter()
    cleaned = clean(order.to_user(refined.label_map(threads)), parameters.postprocess, math.prod(spacing) / 1000.0)
    return RefinementResult(
        label_map=cleaned.label_map,
        network_label_map=order.to_user(refined.network_label_map),
        channels=refined,
        order=order,
        report=refined.report,
        timings={**refined.timings, "labels": time.perf_counter() - started},
        device=device,
        threads=threads,
        num_padding_voxels=refined.num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        notes=refined.notes,
        spacing=tuple(spacing),
        output_temperature=parameters.mean_field.output_temperature,
    )


def _largest_bias(model: ModelSpec) -> float:
    """Return the largest magnitude of a label's bias."""
    return 0.0 if model.mean_field.bias is None else float(np.abs(model.mean_field.bias).max())


def _check_temperature(temperature: float, largest: float) -> None:
    """Raise ConfigError if energies and marginals, sums of a few logits over the temperature, would not fit into float32."""
    if largest / temperature > LARGEST_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into {largest / temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )


def _check_finite(backend: Backend, channels: NDArray[Any], name: str, threads: int | None, held: Any = None) -> float:
    """Raise InputError if a value is NaN or infinite; return the largest magnitude. `held`: the channels from `Backend.hold`."""
    if channels.dtype.kind != "f":
        return 0.0
    largest = 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels if held is None else held, threads=threads)
    for number, (lowest, highest) in enumerate(ranges):
        if not (math.isfinite(lowest) and math.isfinite(highest) and max(-lowest, highest) <= _LARGEST_FLOAT):
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
            raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
        largest = max(largest, abs(lowest), abs(highest))
    return largest


def _check_outcome(backend: Backend, outcome: CroppedLogits | DenseLogits | StreamedLogits | TiledLogits, threads: int | None) -> None:
    """Raise InputError if the model left the range of float32: such a label map would be noise."""
    finite = all(math.isfinite(value) for value in outcome.report.energy)
    if finite:
        finite = all(
            math.isfinite(low) and math.isfinite(high) for low, high in backend.channel_ranges(outcome.computed(), threads=threads)
        )
    if not finite:
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's range; expected logits, weights and a "
            "compatibility of a few orders of magnitude around 1"
        )
