"""Refine a label map, where there are no logits: only the labels that occur take part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import check_shapes, given_array, given_spacing
from crfrefine.arrays.components import clean
from crfrefine.arrays.one_hot import ABSENT_LOGIT, channel_numbers, leave_far_out, one_hot_logits, take_part_nearby
from crfrefine.base.axes import StorageOrder
from crfrefine.base.memory import memory_limit, require_memory
from crfrefine.engines import get_backend
from crfrefine.engines.reach import reach_of_axes
from crfrefine.errors import ConfigError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.channels import refine_channels
from crfrefine.refinement.checks import check_finite, check_outcome, check_temperature, largest_bias
from crfrefine.refinement.result import RefinementResult, renumbered
from crfrefine.refinement.tiles.grid import MOST_DIMS
from crfrefine.refinement.tiles.label_refining import refine_label_tiles
from crfrefine.refinement.tiles.running import Settings

if TYPE_CHECKING:
    from crfrefine.engines.base import Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.refining_again import RefiningAgain
    from crfrefine.refinement.tiles.streamed_logits import StreamedLogits


def refine_label_map(
    labels: NDArray[np.unsignedinteger[Any]],
    image: NDArray[Any],
    channels: Sequence[int],
    num_labels: int,
    *,
    spacing: ArrayLike,
    parameters: CrfParameters,
    mask: ArrayLike | None = None,
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
        result = refine_channels(logits, image, spacing=spacing, parameters=chosen, mask=mask, input_type="logits", **options)
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
        leave_far_out(logits, reach_of_axes(kernels, ordered_steps, stored.shape))
        result = refine_channels(order.to_user(logits), image, spacing=steps, parameters=chosen, mask=mask, input_type="logits", **options)
        return renumbered(result, channels, num_labels)
    check_decision_on_tiles(parameters, len(channels))
    check_temperature(model.mean_field.temperature, largest_bias(model) - ABSENT_LOGIT)
    ordered_image = order.to_storage(image)
    check_finite(backend, ordered_image, "image", threads)
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
    check_outcome(backend, refined, threads)
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
