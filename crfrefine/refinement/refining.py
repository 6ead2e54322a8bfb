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
from crfrefine.arrays.components import clean, describe_losses
from crfrefine.arrays.intensity import window_notes
from crfrefine.arrays.label_maps import count_labels
from crfrefine.arrays.one_hot import channel_numbers, renumber
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.array_types import Array
from crfrefine.base.memory import RUN_BYTES, SMALL, format_size
from crfrefine.engines import get_backend
from crfrefine.engines.base import NO_CONTEXT
from crfrefine.engines.grid_image import GridImage
from crfrefine.engines.regions import region_mean_field
from crfrefine.errors import CapacityError, ConfigError, InputError
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network, Prepared, prepare
from crfrefine.refinement.refined import NetworkLogits, RefinedChannels
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.tiles.solving import solve

NARROW = "kernels are narrower than the voxels"
"""The note on kernels that end before the next voxel begins with it."""

NARROW_WIDTH = 0.6
"""Bandwidth in voxels below which the next voxel counts less than a quarter: exp(-1 / (2 * 0.6²))."""

USUAL_WIDTH = 1.5
"""Bandwidth in voxels that the note advises: that of the preset `default` on voxels of 1 mm."""

if TYPE_CHECKING:
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
    network_spacing, notes, numbers, of_map = None, tuple[str, ...](), None, None
    if isinstance(given, LabelMapNetwork):
        parameters = parameters.select_labels(given.channels, given.num_labels)
        network_spacing, note = find_network_spacing(given.network_spacing, given.labels, steps)
        notes = (note,) if note else ()
        channels = channel_numbers(given.labels, given.channels)
        if parameters.volume.match_input:  # Islands that rules remove belong to no label's volume.
            of_map = clean(channels, parameters.postprocess, voxel_ml)
            numbers, channels = channels, of_map.label_map
        network = LabelMapNetwork(channels, range(len(given.channels)), given.num_labels)
    elif parameters.volume.match_input:
        raise ConfigError("volume.match_input: keeps the volumes of a label map, and logits are not one; set it to false")
    regions = network.regions if isinstance(network, ArrayNetwork) else None
    if regions is None:
        models: Sequence[ModelSpec] = [parameters.resolve(network.shape[0], len(image), num_dims)]
    else:
        if network.shape[0] != regions.num_regions:
            raise InputError(
                f"the log-odds have shape {network.shape}; expected ({regions.num_regions}, *grid), one channel per region: "
                f"{regions.describe()}"
            )
        parameters.postprocess.spread({"label": regions.num_labels})  # checks the lengths
        models = resolve_regions(parameters, network.shape[0], len(image), num_dims)
    models = [replace(each, kernels=replace(each.kernels, network_spacing=network_spacing).in_storage(order)) for each in models]
    # The model does not depend on the order of axes, so the engine gets them in storage order: a volume read from a file is not copied.
    stored_mask = None if mask is None else order.to_storage(mask.astype(np.bool_, copy=False))
    case = GridImage(order.to_storage(image), stored_mask, order.axes_to_storage(steps), order.axes)
    prepared = prepare(network, case, models, parameters, backend, context)
    notes += prepared.notes
    try:
        refined, lacking = _run(prepared, models, backend, context), ""
    except CapacityError as error:
        if backend.name == "cpu" or error.shortage <= 0.0:
            raise
        lacking = str(error)  # The error itself would keep the memory of the stopped run.
    if lacking:
        notes += (f"computed on the CPU, since the case does not fit into the memory of {backend.name}: {lacking}",)
        backend = get_backend("cpu")
        refined = _run(prepared, models, backend, context)
    notes += window_notes(case.values, parameters.intensity, case.mask)
    _check_outcome(backend, refined, threads)

    started = time.perf_counter()
    decode = partial(backend.label_map, threads=threads) if regions is None else regions.decode
    if isinstance(network, LabelMapNetwork) and len(prepared.logits):  # The largest share may be that of another label.
        labels_of_network = np.ascontiguousarray(order.to_storage(network.labels))
    elif prepared.plan is not None and prepared.plan.labels is not None:
        labels_of_network = prepared.plan.labels
    else:
        labels_of_network = decode(prepared.logits)
    if of_map is not None:
        inside = prepared.mask
        counts = count_labels(labels_of_network if inside is None else labels_of_network[inside], network.shape[0])
        refined.match_volumes(counts, labels_of_network, inside)
    labels = refined.label_map(labels_of_network, decode, threads=threads)
    if network_spacing is not None and prepared.mask is not None:
        labels = np.where(prepared.mask, labels, labels_of_network)
    cleaned = clean(order.to_user(labels), parameters.postprocess, voxel_ml)
    lost = dict(cleaned.lost)
    for label, (before, after) in (of_map.lost if of_map is not None else {}).items():  # Rules were applied twice.
        now = lost.get(label, (after, after))
        lost[label] = (before, max(0, after - (now[0] - now[1])))
    network_labels = order.to_user(labels_of_network) if numbers is None else numbers
    label_map, num_labels = cleaned.label_map, network.shape[0] if regions is None else regions.num_labels
    own = tuple(range(network.shape[0])) if regions is None else ()
    if isinstance(given, LabelMapNetwork):
        own, num_labels = tuple(given.channels), given.num_labels
        label_map, network_labels = renumber(label_map, own), renumber(network_labels, own)
        lost = {own[label]: counts for label, counts in lost.items()}
    volume = voxel_ml if len(steps) == 3 else None
    if lost:
        notes += describe_losses(lost, parameters.postprocess, names or {}, volume, allowed=allow_vanishing)
    return RefinementResult(
        label_map=label_map,
        network_label_map=network_labels,
        channels=refined,
        order=order,
        report=refined.report,
        timings={**prepared.timings, **refined.timings, "labels": time.perf_counter() - started},
        device=backend.name,
        threads=threads,
        num_padding_voxels=prepared.num_padding,
        voxels_removed=cleaned.voxels_removed + (0 if of_map is None else of_map.voxels_removed),
        voxels_filled=cleaned.voxels_filled + (0 if of_map is None else of_map.voxels_filled),
        lost_to_rules=lost,
        notes=notes + _notes_on_widths(parameters, models[0].kernels, case),
        spacing=tuple(steps),
        regions=regions,
        channel_labels=own,
        num_labels=num_labels,
        output_temperature=parameters.mean_field.output_temperature,
    )


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
    """Run the mean field: on tiles if that is planned, else for all labels, or regions, in the mask's box."""
    plan, spec, logits = prepared.plan, models[0].mean_field, prepared.logits
    if plan is None:
        values = logits[(slice(None), *(prepared.box or ()))]
        needed = values.size * RUN_BYTES
        left = context.num_bytes() if context.num_bytes is not None and backend.name == "cpu" and needed > SMALL else None
        if left is not None and needed > left:
            raise CapacityError(
                f"the case needs about {format_size(needed)} beyond what is in memory already; {format_size(left)} are left; allow more "
                "memory (--max-memory), or use a mask or a smaller region"
            )
        if prepared.is_probability:
            values = np.array(values, order="C")
            take_logarithms(values)
        if prepared.are_regions:
            found = region_mean_field(backend, values, prepared.image, models, context)
        else:
            found = backend.mean_field(values, prepared.image, models[0], context)
        box, run = prepared.box, replace(spec, bias=None)
        network = None if box is None else NetworkLogits(logits, prepared.is_probability, run, box, None)
        return RefinedChannels(found, logits.shape[1:], len(logits), network=network)
    if len(logits):
        # Logits in memory were checked to fit before they were read; tiles take little beside them, and slabs would change the result.
        context = replace(context, num_bytes=None)
    tiles = solve(plan.problem, plan.sets, backend, context, is_direct=plan.is_direct)
    settled = -float(plan.best[~tiles.sets.active].sum())
    if plan.labels is not None and not len(logits):
        shape, outside = plan.labels.shape, plan.outside
        return RefinedChannels(tiles, shape, spec.num_labels, settled_energy=settled, labels=plan.labels, outside=outside)
    network = NetworkLogits(logits, prepared.is_probability, spec, plan.box, plan.problem.image.mask)
    return RefinedChannels(tiles, logits.shape[1:], spec.num_labels, settled_energy=settled, network=network)


def _check_outcome(backend: Backend, outcome: RefinedChannels, threads: int | None) -> None:
    """Raise InputError if the model left the range of float32: the label map would be noise."""
    numbers = [*outcome.report.energy]
    if all(map(math.isfinite, numbers)):
        numbers = [bound for pair in backend.channel_ranges(outcome.computed(), threads=threads) for bound in pair]
    if not all(map(math.isfinite, numbers)):
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's range; expected logits, weights and a "
            "compatibility of a few orders of magnitude around 1"
        )
