"""Refine a network's output in any form, with notes for the user."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_voxels
from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.components import Cleaned, check_losses, clean
from crfrefine.arrays.intensity import notes_on_intensity
from crfrefine.arrays.label_maps import (
    channel_numbers,
    occurring_channels,
    renumber,
)
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.array_types import Array
from crfrefine.base.axes import Axes
from crfrefine.base.limits import RUN_BYTES, SMALL, format_size
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed
from crfrefine.engines import get_backend
from crfrefine.engines.base import NO_CONTEXT, Backend, GridImage, MeanFieldResult, RunContext
from crfrefine.engines.results import channel_ranges
from crfrefine.errors import CapacityError, ConfigError, DeviceMemoryError, InputError
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.refinement.given import (
    ArrayNetwork,
    CaseToRefine,
    LabelMapNetwork,
    Network,
    Prepared,
    StreamedNetwork,
)
from crfrefine.refinement.preparing import prepare, without_nan
from crfrefine.refinement.protecting import keep_cores, require_probabilities
from crfrefine.refinement.refined import RefinedChannels
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.tiles.grid import LabelSets
from crfrefine.refinement.tiles.slabs import solve

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.strokes import Strokes

# voxels; below it the next voxel counts less than a quarter: exp(-1 / (2 * 0.6²))
NARROW_WIDTH = 0.6
USUAL_WIDTH = 1.5  # voxels, as of the preset `default` on voxels of 1 mm


def refine_network(
    network: Network,
    image: Array,
    *,
    spacing: tuple[float, ...],
    parameters: CrfParameters,
    mask: ArrayLike | None = None,
    backend: Backend,
    context: RunContext = NO_CONTEXT,
    allow_vanishing: bool = False,
    names: Mapping[int, str] | None = None,
    strokes: Strokes | None = None,
) -> RefinementResult:
    """Refine a network's output; arguments, results and errors as of `crfrefine.refine`.

    The image is on the network's grid, and `spacing` has a number per axis. `names` are those of
    labels, for messages.
    """
    grid_shape = network.shape[1:]
    num_dims = len(grid_shape)
    if image.ndim == num_dims:
        image = image[None]
    if mask is not None:
        mask = given_voxels(mask, grid_shape)
        if not mask.any():
            raise InputError("the mask is empty: there is no voxel to refine")
    order = Axes(tuple(reversed(range(num_dims))))  # as in files
    regions = None
    if isinstance(network, ArrayNetwork):
        order = Axes.of_memory(network.values[0])
        regions = network.regions
    elif isinstance(network, LabelMapNetwork):
        order = Axes.of_memory(network.labels)
    grid_image = GridImage(image, mask, spacing)
    case = CaseToRefine(grid_image, parameters, backend, context, strokes, order, regions)
    if isinstance(network, LabelMapNetwork):
        result = _refine_label_map(network, case)
    else:
        result = _refine_channels(network, case)

    notes = result.notes
    if strokes is not None:
        drawn = []
        for label, count in zip(*np.unique(strokes.labels, return_counts=True), strict=True):
            drawn.append(f"{counted(count, 'voxel')} of label {label}")
        notes += (NoteKind.DRAWN_STROKES(drawn=", ".join(drawn)),)
    missed = []
    for channel, (wanted, got) in result.channels.missed_volumes.items():
        label = result.channel_labels[channel]
        name = (names or {}).get(label, f"label {label}")
        missed.append(f"{name} has {got:,} voxels in place of {wanted:,}")
    if missed:
        notes += (NoteKind.MISSED_VOLUMES(volumes=missed),)
    if result.lost_to_rules:
        rules = parameters.postprocess
        notes += check_losses(
            result.lost_to_rules, rules, names or {}, spacing, allowed=allow_vanishing
        )
    return replace(result, notes=notes)


# ---- Label maps


def _refine_label_map(network: LabelMapNetwork, case: CaseToRefine) -> RefinementResult:
    """Refine a label map: labels that occur or are drawn become channels, numbered from 0.

    The result has labels again.
    """
    occurring_or_drawn = set(network.channels)
    if case.strokes is not None:
        occurring_or_drawn.update(case.strokes.labels.tolist())
    labels = tuple(sorted(occurring_or_drawn))
    num_labels = max(network.num_labels, labels[-1] + 1)
    parameters = case.parameters.select_labels(labels, num_labels)
    if network.is_examined:
        network_spacing = cast("tuple[float, ...] | None", network.network_spacing)
        note = None
    else:
        network_spacing, note = find_network_spacing(
            network.network_spacing, network.labels, case.image.spacing
        )
    numbers = channel_numbers(network.labels, labels)
    before = Cleaned(numbers)
    if parameters.volume.match_input:  # Islands that rules remove belong to no label's volume.
        before = clean(numbers, parameters.postprocess, case.image.spacing)
    occurring = occurring_channels(network.labels, network.channels)
    absent = [number for number, label in enumerate(labels) if label not in occurring]
    numbered = LabelMapNetwork(before.label_map, range(len(labels)), num_labels, absent=absent)
    strokes = case.strokes
    if strokes is not None:
        strokes = replace(strokes, labels=np.searchsorted(labels, strokes.labels))
    case = replace(
        case,
        parameters=parameters,
        strokes=strokes,
        network_spacing=network_spacing,
        is_label_map=True,
        notes=() if note is None else (note,),
    )
    result = _refine(numbered, case)

    network_labels = result.network_label_map
    if parameters.volume.match_input:
        network_labels = numbers
    losses = _add_losses(before.lost, result.lost_to_rules)
    lost = {labels[number]: counts for number, counts in losses.items()}
    return replace(
        result,
        label_map=renumber(result.label_map, labels),
        network_label_map=renumber(network_labels, labels),
        voxels_removed=result.voxels_removed + before.voxels_removed,
        voxels_filled=result.voxels_filled + before.voxels_filled,
        lost_to_rules=lost,
        channel_labels=labels,
        num_labels=num_labels,
    )


Losses = Mapping[int, tuple[int, int]]  # voxels of a label before and after the rules


def _add_losses(first: Losses, second: Losses) -> Losses:
    """Return the losses of rules that were applied twice."""
    lost = dict(second)
    for label, (total, left) in first.items():
        before, after = second.get(label, (left, left))
        lost_later = before - after
        lost[label] = (total, max(0, left - lost_later))
    return lost


# ---- Channels


def _refine_channels(
    network: ArrayNetwork | StreamedNetwork, case: CaseToRefine
) -> RefinementResult:
    """Refine channels of labels or regions; ConfigError for volumes that cannot be kept."""
    case = replace(case, network_spacing=network.network_spacing)
    has_volumes = case.network_spacing is not None and network.regions is None
    if case.parameters.volume.match_input and not has_volumes:
        raise ConfigError(
            "volume.match_input: keeps the volumes of a label map, and logits are not one "
            "(unless --resample brings them from the network's coarser grid); set it to false"
        )
    if network.channel_labels is None:
        return _refine(network, case)
    return _refine_other_labels(network, case, network.channel_labels)


def _refine_other_labels(
    network: Network, case: CaseToRefine, channel_labels: tuple[int, ...]
) -> RefinementResult:
    """Refine the channels of these labels. The result has labels, and its channels stay."""
    strokes = case.strokes
    if strokes is not None:
        unknown = sorted({*strokes.labels.tolist()} - {*channel_labels})
        if unknown:
            raise InputError(
                f"strokes: expected the labels of the channels, {listed(channel_labels)}, found "
                f"{listed(unknown)}"
            )
        numbers = np.zeros(max(channel_labels) + 1, np.int64)
        numbers[list(channel_labels)] = np.arange(len(channel_labels))
        case = replace(case, strokes=replace(strokes, labels=numbers[strokes.labels]))
    result = _refine(network, case)
    lost = {channel_labels[number]: counts for number, counts in result.lost_to_rules.items()}
    return replace(
        result,
        label_map=renumber(result.label_map, channel_labels),
        network_label_map=renumber(result.network_label_map, channel_labels),
        lost_to_rules=lost,
        channel_labels=channel_labels,
        num_labels=max(channel_labels) + 1,
    )


# ---- Networks in any form


def _refine(network: Network, case: CaseToRefine) -> RefinementResult:
    """Prepare the case, run the mean field, make the label map and clean it."""
    require_probabilities(network, case)
    stored = _in_storage_order(network, case)
    prepared = prepare(network, stored)
    refined, backend, notes = run_mean_field(prepared, stored)
    notes = stored.notes + prepared.notes + notes

    started = time.perf_counter()
    network_labels, labels = refined.label_maps(prepared, stored)
    refined.settle(prepared, stored)
    cleaned = Cleaned(stored.order.undo(labels))
    rules = case.parameters.postprocess
    if rules != PostprocessParameters():
        cleaned = clean(cleaned.label_map, rules, case.image.spacing)
    if rules.protects:
        cleaned = keep_cores(cleaned, labels, network_labels, prepared, stored)
    label_map = cleaned.label_map
    if case.strokes is not None:
        label_map = case.strokes.draw(label_map)
    notes += _notes_on_image(stored)
    timings = {**prepared.timings, **refined.timings, "labels": time.perf_counter() - started}
    num_labels = network.shape[0]
    channel_labels = tuple(range(num_labels))
    if case.regions is not None:
        num_labels = case.regions.num_labels
        channel_labels = ()
    return RefinementResult(
        label_map=label_map,
        network_label_map=stored.order.undo(network_labels),
        channels=refined,
        order=stored.order,
        report=refined.report,
        timings=timings,
        device=backend.name,
        threads=case.context.threads,
        num_padding_voxels=prepared.num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        lost_to_rules=cleaned.lost,
        notes=notes,
        spacing=tuple(case.image.spacing),
        regions=case.regions,
        channel_labels=channel_labels,
        num_labels=num_labels,
        output_temperature=case.parameters.mean_field.output_temperature,
    )


def _in_storage_order(network: Network, case: CaseToRefine) -> CaseToRefine:
    """Return a case in storage order, with its model, and without the voxels that are NaN.

    The model does not depend on the order of axes, so the engine gets them in storage order: a
    volume read from a file is not copied.
    """
    order = case.order
    threads = case.context.threads
    values = order.apply(case.image.values)
    sizes = (network.shape[0], len(values), len(order.sources))
    if case.regions is not None:
        case.parameters.postprocess.spread({"label": case.regions.num_labels})  # checks the lengths
        model = resolve_regions(case.parameters, *sizes)
    else:
        model = case.parameters.resolve(*sizes)
    kernels = []
    for kernel in model.kernels.kernels:
        kernels.append(replace(kernel, theta_position=order.along(kernel.theta_position)))
    kernel_set = replace(model.kernels, kernels=tuple(kernels))
    if case.network_spacing is not None:
        kernel_set = replace(kernel_set, network_spacing=order.along(case.network_spacing))

    image = GridImage(values, None, order.along(case.image.spacing), order.sources)
    if case.image.mask is not None:
        image = replace(image, mask=order.apply(case.image.mask))
    notes = case.notes
    # Readers check the images of other networks.
    may_be_nan = isinstance(network, ArrayNetwork | LabelMapNetwork) and values.dtype.kind == "f"
    if may_be_nan and np.isnan(channel_ranges(values, threads)).any():
        image, of_nan = without_nan(image, threads)
        notes += of_nan
    strokes = case.strokes
    if strokes is not None:
        strokes = replace(strokes, positions=strokes.positions[list(order.sources)])
    model = replace(model, kernels=kernel_set)
    return replace(case, image=image, strokes=strokes, model=model, notes=notes)


# ---- The mean field


def run_mean_field(
    prepared: Prepared, case: CaseToRefine
) -> tuple[RefinedChannels, Backend, tuple[Note, ...]]:
    """Run the mean field; a case that a GPU cannot hold is computed on the CPU.

    Return the refined channels, the backend that was used, and notes for the user.

    Raises CapacityError, and InputError if refined logits or their energy are not finite.
    """
    backend = case.backend
    notes: tuple[Note, ...] = ()
    shortage: str | None = None
    try:
        sets, outcome = _run_on(backend, prepared, case)
    except DeviceMemoryError as error:
        shortage = str(error)  # The error itself would keep the memory of the stopped run.
    if shortage is not None:
        notes = (NoteKind.ON_CPU_FOR_MEMORY(device=backend.name, problem=shortage),)
        backend = get_backend("cpu")
        sets, outcome = _run_on(backend, prepared, case)

    refined = RefinedChannels(outcome, sets, prepared, case.model.mean_field)
    numbers = list(refined.report.energy)
    if all(math.isfinite(number) for number in numbers) and refined.computed.size:
        ranges = channel_ranges(refined.computed, case.context.threads)
        for lowest, highest in ranges:
            numbers += (lowest, highest)
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's "
            "range; expected logits, weights and a compatibility of a few orders of magnitude "
            "around 1"
        )
    return refined, backend, notes


def _run_on(
    backend: Backend, prepared: Prepared, case: CaseToRefine
) -> tuple[LabelSets | None, MeanFieldResult]:
    """Run the mean field on tiles, or in the mask's box for all labels, or regions.

    Return the labels that took part in tiles, too; None without tiles.
    """
    context = case.context
    if prepared.problem is not None:
        if len(prepared.logits):
            # Logits in memory were checked to fit before they were read; tiles take little beside
            # them, and slabs would change the result.
            context = replace(context, num_bytes=None, take=NO_CONTEXT.take)
        return solve(prepared.problem, context)

    values = prepared.logits
    if prepared.box is not None:
        values = values[(slice(None), *prepared.box)]
    needed = values.size * RUN_BYTES
    num_bytes = context.num_bytes
    if backend.name == "cpu" and needed > SMALL:
        if num_bytes is not None and needed > num_bytes:
            raise CapacityError(
                f"the case needs about {format_size(needed)} beyond what is in memory already; "
                f"{format_size(max(0, num_bytes))} are left; allow more memory (--max-memory), or "
                "use a mask or a smaller region"
            )
        context.take(needed)
    if prepared.is_probability:
        values = np.array(values, order="C")
        take_logarithms(values)
    return None, backend.mean_field(values, prepared.image, case.model, context)


# ---- Notes


def _notes_on_image(case: CaseToRefine) -> tuple[Note, ...]:
    """Return notes on parameters that do not fit the image."""
    image = case.image
    parameters = case.parameters
    notes = notes_on_intensity(image.values, parameters.intensity, image.mask)
    # Hardly any label changes if every kernel is narrower than the voxels. An axis of one voxel
    # does not count.
    kernels = case.model.kernels
    counts = np.greater(image.values.shape[1:], 1)
    widths = np.reshape(kernels.widths(image.spacing), (-1, len(counts)))
    widest = float(widths.max(where=counts, initial=0.0))
    if 0.0 < widest < NARROW_WIDTH:
        steps = np.array(kernels.distances(image.spacing))
        usual = USUAL_WIDTH * float(steps[counts].min())
        key = "spatial.theta_gamma"
        if any(np.any(kernel.weight) for kernel in parameters.bilateral):
            key = "bilateral.theta_alpha"
        note = NoteKind.NARROW_KERNELS(
            width=widest,
            key=key,
            usual=usual,
            unit=parameters.mean_field.positions,
            usual_width=USUAL_WIDTH,
        )
        notes += (note,)
    return notes
