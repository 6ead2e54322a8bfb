"""Refine a network's output in any form: arrays, channels that stream from files, or a label map instead of logits."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_spacing
from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.components import Cleaned, clean
from crfrefine.arrays.intensity import window_notes
from crfrefine.arrays.label_maps import count_labels
from crfrefine.arrays.one_hot import channel_numbers, renumber
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.array_types import Array
from crfrefine.base.memory import RUN_BYTES, SMALL, format_size
from crfrefine.engines import get_backend
from crfrefine.engines.base import NO_CONTEXT, MeanFieldResult
from crfrefine.engines.grid_image import GridImage
from crfrefine.engines.regions import region_mean_field
from crfrefine.errors import CapacityError, ConfigError, InputError
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network, Prepared, prepare
from crfrefine.refinement.refined import NetworkLogits, RefinedChannels
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.tiles.solving import solve
from crfrefine.refinement.vanishing import describe_losses

NARROW = "kernels are narrower than the voxels"
"""The note on kernels that end before the next voxel begins with it."""

NARROW_WIDTH = 0.6
"""Bandwidth in voxels below which the next voxel counts less than a quarter: exp(-1 / (2 * 0.6²))."""

USUAL_WIDTH = 1.5
"""Bandwidth in voxels that the note advises: that of the preset `default` on voxels of 1 mm."""

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.engines.base import Backend, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import KernelSetSpec, ModelSpec


def refine_network(
    network: Network,
    image: Array,
    *,
    spacing: ArrayLike,
    parameters: CrfParameters,
    mask: ArrayLike | None = None,
    backend: Backend,
    context: RunContext = NO_CONTEXT,
    allow_vanishing: bool = False,
    names: Mapping[int, str] | None = None,
) -> RefinementResult:
    """Refine a network's output; arguments, results and errors as of `crfrefine.refine`. `names` are those of labels, for messages.

    It is done on tiles, each with the labels that are present near it, where that is less work or the channels are not in memory; else with
    all labels everywhere. A case that does not fit into the memory of a GPU is computed on the CPU.
    """
    given, num_dims, threads = network, len(network.shape) - 1, context.threads
    image = image[None] if image.ndim == num_dims else image
    mask = None if mask is None else given_array(mask, "mask")
    network.check_shapes(image, mask)
    steps, order = given_spacing(spacing, num_dims), network.order
    voxel_ml = math.prod(steps) / 1000.0
    network_spacing, note, numbers, of_map = None, None, None, Cleaned(np.zeros(0, np.uint8))
    if isinstance(given, LabelMapNetwork):
        parameters = parameters.select_labels(given.channels, given.num_labels)
        network_spacing, note = find_network_spacing(given.network_spacing, given.labels, steps)
        channels = channel_numbers(given.labels, given.channels)
        # Islands that rules remove belong to no label's volume.
        of_map = clean(channels, parameters.postprocess, voxel_ml) if parameters.volume.match_input else Cleaned(channels)
        numbers = None if of_map.label_map is channels else channels
        network = LabelMapNetwork(of_map.label_map, range(len(given.channels)), given.num_labels)
    elif parameters.volume.match_input:
        raise ConfigError("volume.match_input: keeps the volumes of a label map, and logits are not one; set it to false")
    regions = network.regions if isinstance(network, ArrayNetwork) else None
    models = [
        replace(one, kernels=replace(one.kernels, network_spacing=network_spacing).in_storage(order))
        for one in _resolve(parameters, network.shape, len(image), regions)
    ]
    # The model does not depend on the order of axes, so the engine gets them in storage order: a volume read from a file is not copied.
    stored_mask = None if mask is None else order.to_storage(mask.astype(np.bool_, copy=False))
    case = GridImage(order.to_storage(image), stored_mask, order.axes_to_storage(steps), order.axes)
    prepared = prepare(network, case, models, parameters, backend, context)
    decode = partial(backend.label_map, threads=threads) if regions is None else regions.decode
    try:
        refined, lacking = _run(prepared, models, backend, context), ""
    except CapacityError as error:
        if backend.name == "cpu" or error.shortage <= 0.0:
            raise
        lacking = str(error)  # The error itself would keep the memory of the stopped run.
    notes: tuple[str, ...] = ()
    if lacking:
        notes = (f"computed on the CPU, since the case does not fit into the memory of {backend.name}: {lacking}",)
        backend = get_backend("cpu")
        decode = partial(backend.label_map, threads=threads) if regions is None else regions.decode
        refined = _run(prepared, models, backend, context)
    notes += window_notes(case.values, parameters.intensity, case.mask)
    check_outcome(backend, refined, threads)

    started = time.perf_counter()
    if prepared.labels is not None:
        labels_of_network = prepared.labels
    elif isinstance(network, LabelMapNetwork):
        labels_of_network = np.ascontiguousarray(order.to_storage(network.labels))
    else:
        labels_of_network = decode(prepared.logits)
    if parameters.volume.match_input:
        inside = prepared.mask
        counts = count_labels(labels_of_network if inside is None else labels_of_network[inside], network.shape[0])
        refined.match_volumes(counts, labels_of_network, inside)
    labels = refined.label_map(labels_of_network, decode, threads=threads)
    if network_spacing is not None and prepared.mask is not None:  # The largest share may be that of another label.
        labels = np.where(prepared.mask, labels, labels_of_network)
    cleaned = clean(order.to_user(labels), parameters.postprocess, voxel_ml)
    channel_labels = given.channels if isinstance(given, LabelMapNetwork) else None
    removed = _added(of_map.lost, cleaned.lost)
    lost = {label if channel_labels is None else channel_labels[label]: counts for label, counts in removed.items()}
    volume = voxel_ml if len(steps) == 3 else None
    notes += describe_losses(lost, parameters.postprocess, names or {}, volume, allowed=allow_vanishing)
    result = RefinementResult(
        label_map=cleaned.label_map,
        network_label_map=order.to_user(labels_of_network) if numbers is None else numbers,
        channels=refined,
        order=order,
        report=refined.report,
        timings={**prepared.timings, **refined.timings, "labels": time.perf_counter() - started},
        device=backend.name,
        threads=threads,
        num_padding_voxels=prepared.num_padding,
        voxels_removed=of_map.voxels_removed + cleaned.voxels_removed,
        voxels_filled=of_map.voxels_filled + cleaned.voxels_filled,
        lost_to_rules=lost,
        notes=((note,) if note else ()) + prepared.notes + notes + _notes_on_widths(parameters, models[0].kernels, case),
        spacing=tuple(steps),
        regions=regions,
        output_temperature=parameters.mean_field.output_temperature,
    )
    if not isinstance(given, LabelMapNetwork):
        return result
    return replace(
        result,
        label_map=renumber(result.label_map, given.channels),
        network_label_map=renumber(result.network_label_map, given.channels),
        channel_labels=tuple(given.channels),
        num_labels=given.num_labels,
    )


def _added(first: Mapping[int, tuple[int, int]], then: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Return what each label lost to rules that were applied twice: its voxels before, and how many of them are left."""
    added = dict(first)
    for label, (before, after) in then.items():
        start, left = added.get(label, (before, before))
        added[label] = (start, max(0, left - (before - after)))
    return added


def _resolve(parameters: CrfParameters, shape: tuple[int, ...], num_modalities: int, regions: RegionScheme | None) -> Sequence[ModelSpec]:
    """Return the model of the labels, or one per region, for channels of a shape."""
    if regions is None:
        return [parameters.resolve(shape[0], num_modalities, len(shape) - 1)]
    if len(shape) < 2 or shape[0] != regions.num_regions:
        raise InputError(
            f"the log-odds have shape {shape}; expected ({regions.num_regions}, *grid), one channel per region: {regions.describe()}"
        )
    parameters.postprocess.check_lengths(regions.num_labels)
    return resolve_regions(parameters, shape[0], num_modalities, len(shape) - 1)


def _notes_on_widths(parameters: CrfParameters, kernels: KernelSetSpec, case: GridImage) -> tuple[str, ...]:
    """Return a note if every kernel is narrower than the voxels: hardly any label changes then."""
    shape = case.values.shape[1:]
    steps = kernels.distances(case.spacing)
    axes = [axis for axis, extent in enumerate(shape) if extent > 1]
    widths = [kernel.theta_position[axis] / steps[axis] for kernel in kernels.kernels for axis in axes]
    if not widths or max(widths) >= NARROW_WIDTH:
        return ()
    weighted = [number for number, kernel in enumerate(parameters.bilateral) if np.any(kernel.weight)]
    key = "spatial.theta_gamma"
    if weighted:
        key = f"bilateral.{weighted[0]}.theta_alpha" if len(parameters.bilateral) > 1 else "bilateral.theta_alpha"
    wider = USUAL_WIDTH * min(steps[axis] for axis in axes)
    return (
        f"{NARROW}, so neighbors hardly count: the widest bandwidth is {max(widths):.2g} voxels; "
        f"--set {key}={wider:.3g} ({kernels.positions}) makes it {USUAL_WIDTH:g}",
    )


def _run(prepared: Prepared, models: Sequence[ModelSpec], backend: Backend, context: RunContext) -> RefinedChannels:
    """Run the mean field: on tiles if that is planned, else everywhere."""
    plan, spec = prepared.plan, models[0].mean_field
    if plan is None:
        _require_room(prepared, backend, context)
        found = run_everywhere(prepared, models, backend, context)
        box = prepared.box
        network = None if box is None else NetworkLogits(prepared.logits, prepared.is_probability, replace(spec, bias=None), box, None)
        return RefinedChannels(found, prepared.logits.shape[1:], len(prepared.logits), network=network)
    if prepared.labels is None:
        # Logits in memory were checked to fit before they were read; tiles take little beside them, and slabs would change the result.
        context = replace(context, num_bytes=None)
    tiles = solve(plan.problem, plan.sets, backend, context, is_direct=plan.is_direct)
    settled = -float(plan.best[~tiles.sets.active].sum())
    if prepared.labels is not None:
        shape, outside = prepared.labels.shape, plan.outside
        return RefinedChannels(tiles, shape, spec.num_labels, settled_energy=settled, labels=prepared.labels, outside=outside)
    network = NetworkLogits(prepared.logits, prepared.is_probability, spec, plan.box, plan.problem.image.mask)
    return RefinedChannels(tiles, prepared.logits.shape[1:], spec.num_labels, settled_energy=settled, network=network)


def _require_room(prepared: Prepared, backend: Backend, context: RunContext) -> None:
    """Raise CapacityError if a run of all labels on the CPU needs more memory than is left."""
    needed = prepared.logits[(slice(None), *(prepared.box or ()))].size * RUN_BYTES
    left = context.num_bytes() if context.num_bytes is not None and backend.name == "cpu" and needed > SMALL else None
    if left is not None and needed > left:
        raise CapacityError(
            f"the case needs about {format_size(needed)} beyond what is in memory already; {format_size(left)} are left; allow more memory "
            "(--max-memory), or use a mask or a smaller region"
        )


def run_everywhere(prepared: Prepared, models: Sequence[ModelSpec], backend: Backend, context: RunContext) -> MeanFieldResult:
    """Run the mean field of all labels, or regions, in the mask's box."""
    values = prepared.logits[(slice(None), *(prepared.box or ()))]
    if prepared.is_probability:
        values = np.array(values, order="C")
        take_logarithms(values)
    if prepared.are_regions:
        return region_mean_field(backend, values, prepared.image, models, context)
    return backend.mean_field(values, prepared.image, models[0], context)


def check_outcome(backend: Backend, outcome: RefinedChannels, threads: int | None) -> None:
    """Raise InputError if the model left the range of float32: the label map would be noise."""
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
