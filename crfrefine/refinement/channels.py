"""Refine the channels of a network's output: labels, together one softmax, or overlapping regions, one sigmoid each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import check_shapes, given_array, given_spacing
from crfrefine.arrays.case_image import CaseImage
from crfrefine.arrays.components import clean
from crfrefine.arrays.dice_decision import dice_labels, dice_region_labels
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.arrays.region_channels import check_channels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.axes import StorageOrder
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.engines.regions import region_mean_field
from crfrefine.engines.slabs import run_in_slabs
from crfrefine.errors import CapacityError
from crfrefine.parameters.region_model import resolve_regions
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.checks import check_finite, check_outcome
from crfrefine.refinement.network_output import prepare_output
from crfrefine.refinement.result import DenseLogits, RefinementResult, probabilities_of
from crfrefine.refinement.tiles.cropping import CroppedLogits, box_of
from crfrefine.refinement.tiles.refining import refine_tiles
from crfrefine.refinement.tiles.running import Settings

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.base import Backend, MeanFieldResult, Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.network_output import NetworkOutput
    from crfrefine.refinement.refining_again import RefiningAgain
    from crfrefine.refinement.tiles.tiled_logits import TiledLogits


def refine_channels(
    channels: NDArray[np.floating[Any]],
    image: NDArray[Any],
    *,
    spacing: ArrayLike,
    parameters: CrfParameters,
    mask: ArrayLike | None = None,
    input_type: str = "logits",
    regions: RegionScheme | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    again: RefiningAgain | None = None,
) -> RefinementResult:
    """Refine logits or probabilities; arguments, results and errors as of `crfrefine.refine`.

    Args:
        channels: (L, *grid), or with `regions` (R, *grid).
        image: (M, *grid) or (*grid), raw intensities.
        spacing: mm, one per grid axis or one for all.
        parameters: the model.
        mask: (*grid); None: everywhere.
        input_type: "auto", "logits" or "probabilities".
        regions: of the channels; None: they are labels.
        device: of the engine.
        threads: CPU threads.
        progress: called between stages.
        again: what calls share.

    Raises:
        CrfRefineError: as in `refine`.
    """
    if mask is not None:
        mask = given_array(mask, "mask").astype(np.bool_, copy=False)
    if image.ndim == channels.ndim - 1:
        image = image[None]
    check_shapes(channels, image, mask, fewest_channels=2 if regions is None else 1)
    steps = given_spacing(spacing, channels.ndim - 1)
    models = _resolve(parameters, channels, len(image), regions)
    backend = get_backend(device) if again is None else again.replaces(get_backend(device))

    # The model does not depend on the order of axes, so the engine gets them in storage order: a volume read from a file is not copied.
    with np.errstate(over="ignore"):
        channels = channels.astype(np.float32, copy=False)
    order = StorageOrder.of_memory(channels[0])
    stored_mask, stored_image = None if mask is None else order.to_storage(mask), order.to_storage(image)
    output = prepare_output(
        backend, order.to_storage(channels), stored_mask, models, input_type=input_type, are_regions=regions is not None, threads=threads
    )
    started = time.perf_counter()
    check_finite(backend, stored_image, "image", threads)
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    box = box_of(output.mask)
    normalized = CaseImage.normalized(stored_image, parameters.intensity, stored_mask, box, threads=threads)
    timings = {"normalize": time.perf_counter() - started}
    models = [ModelSpec(model.kernels.in_storage(order), model.mean_field) for model in models]
    stored_steps = order.axes_to_storage(steps)
    decode = partial(backend.label_map, threads=threads) if regions is None else regions.decode
    refined: CroppedLogits | DenseLogits | TiledLogits | None = None
    notes = tuple[str, ...]()
    if regions is None:
        refined = refine_tiles(
            backend,
            output.logits,
            normalized,
            output.mask,
            stored_steps,
            models[0],
            parameters.mean_field.label_threshold,
            Settings(threads, progress),
            axes=order.axes,
            is_probability=output.is_probability,
        )
    if refined is None:
        if again is not None:
            again.watch(decode, output.logits, box, order)
        settings: dict[str, Any] = {"axes": order.axes, "threads": threads, "progress": progress}
        refined, notes = refine_everywhere(
            backend, output, normalized, stored_steps, models, settings, box=box, are_regions=regions is not None
        )
    check_outcome(backend, refined, threads)
    started = time.perf_counter()
    network = decode(output.logits)
    if parameters.postprocess.decision == "dice":
        probabilities = probabilities_of(refined.dense(), parameters.mean_field.output_temperature, backend, regions, threads=threads)
        labels = _decide_by_dice(probabilities, regions, output.mask, network)
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
        num_padding_voxels=output.num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        notes=output.notes + notes,
        spacing=tuple(steps),
        regions=regions,
        output_temperature=parameters.mean_field.output_temperature,
    )


def _resolve(parameters: CrfParameters, channels: NDArray[Any], num_modalities: int, regions: RegionScheme | None) -> Sequence[ModelSpec]:
    """Return the model of the labels, or one per region."""
    num_dims = channels.ndim - 1
    if regions is None:
        return [parameters.resolve(len(channels), num_modalities, num_dims)]
    check_channels(channels, regions)
    parameters.postprocess.check_lengths(regions.num_labels)
    return resolve_regions(parameters, len(channels), num_modalities, num_dims)


def _decide_by_dice(
    probabilities: NDArray[np.float32],
    regions: RegionScheme | None,
    mask: NDArray[np.bool_] | None,
    network: NDArray[np.unsignedinteger[Any]],
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label map with the best expected Dice under the marginals; voxels outside the mask keep the network's label."""
    found = dice_labels(probabilities, mask) if regions is None else dice_region_labels(probabilities, regions, mask)
    return found if mask is None else np.where(mask, found, network)


# Run the mean field of all labels, or regions, everywhere: at once, or in slabs where a device has too little memory for that.


def refine_everywhere(
    backend: Backend,
    output: NetworkOutput,
    image: CaseImage,
    spacing: tuple[float, ...],
    models: Sequence[ModelSpec],
    settings: dict[str, Any],
    *,
    box: Box | None,
    are_regions: bool,
) -> tuple[CroppedLogits | DenseLogits, tuple[str, ...]]:
    """Run the mean field of all labels, or regions, in the mask's box unless that is None.

    Args:
        backend: the engine.
        output: the network's.
        image: normalized; taken.
        spacing: mm, one per grid axis.
        models: of the labels, or one per region.
        settings: axes, threads and progress for the engine.
        box: the part of the grid that is refined.
        are_regions: whether the channels are regions.

    Returns:
        (refined logits, what the user should know).

    Raises:
        CapacityError: not enough memory, not even for slabs.
    """
    inner = (slice(None), *(box or ()))
    values, whole = output.logits[inner], GridImage(image.take(), output.mask, spacing, settings["axes"])
    if output.is_probability:
        values = np.array(values, order="C")
        take_logarithms(values)
    if box is not None:
        assert output.mask is not None
        whole = replace(whole, values=whole.values if image.is_cropped else whole.values[inner], mask=output.mask[box])
    context = RunContext(settings["threads"], settings["progress"])

    def run(values: NDArray[np.float32], image: GridImage, models: Sequence[ModelSpec]) -> MeanFieldResult:
        if are_regions:
            return region_mean_field(backend, values, image, models, context)
        return backend.mean_field(values, image, models[0], context)

    notes = tuple[str, ...]()
    outcome: MeanFieldResult | None = None
    try:
        outcome = run(values, whole, models)
    except CapacityError as error:
        if error.shortage <= 0.0:
            raise
        # The error itself would keep the memory of what it broke off.
        met = str(error), error.shortage
    if outcome is None:
        outcome, note = run_in_slabs(run, values, whole, models, met, settings["progress"])
        notes = (note,)
    if box is None:
        return DenseLogits(outcome), notes
    return CroppedLogits(output.logits, box, models[0].mean_field.temperature, outcome, is_probability=output.is_probability), notes
