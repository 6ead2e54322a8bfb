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

from crfrefine.arrays.arguments import given_spacing, given_voxels
from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.components import Cleaned, clean, describe_losses
from crfrefine.arrays.intensity import window_notes
from crfrefine.arrays.label_maps import channel_numbers, count_labels, renumber
from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.array_types import Array, Float32
from crfrefine.base.limits import RUN_BYTES, SMALL, format_size
from crfrefine.base.text import counted
from crfrefine.engines import get_backend
from crfrefine.engines.base import (
    NO_CONTEXT,
    Backend,
    GridImage,
    MeanFieldReport,
    MeanFieldResult,
    RunContext,
    of_part,
)
from crfrefine.errors import CapacityError, ConfigError, DeviceMemoryError, InputError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement import networks
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network, Prepared
from crfrefine.refinement.refined import RefinedChannels
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.tiles.coarse import CoarseNetwork
from crfrefine.refinement.tiles.running import RefinedTiles, solve
from crfrefine.refinement.tiles.streaming import StreamedNetwork

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.strokes import Strokes


def region_mean_field(
    backend: Backend,
    log_odds: Float32,
    image: GridImage,
    models: Sequence[ModelSpec],
    context: RunContext,
) -> MeanFieldResult:
    """Run the binary mean field of each region, with the logits 0 outside and the region's log-odds, (R, *grid), inside."""
    # All models have the same kernels. Outside the mask the input is divided by the temperature.
    kernels = backend.kernels(
        replace(image, values=image.values.astype(np.float32, copy=False)),
        models[0].kernels,
        context,
    )
    del image
    refined = np.empty(log_odds.shape, dtype=np.float32)
    binary = np.zeros((2, *log_odds.shape[1:]), dtype=np.float32)
    reports: list[MeanFieldReport] = []
    timings: dict[str, float] = {}
    for region, model in enumerate(models):
        binary[1] = log_odds[region]
        progress = of_part(context.progress, region, len(models))
        outcome = kernels.run(
            binary, model.mean_field, progress=progress, is_last=region == len(models) - 1
        )
        np.subtract(outcome.logits[1], outcome.logits[0], out=refined[region])
        reports.append(outcome.report)
        for (
            stage,
            seconds,
        ) in outcome.timings.items():  # The kernels were built once, and each run reports that.
            timings[stage] = seconds if stage == "build" else timings.get(stage, 0.0) + seconds
    # The most steps of any region, and the sum of energies; a region that stopped keeps its last
    # one.
    num_iterations = max(report.num_iterations for report in reports)
    energies = [
        [*report.energy, *report.energy[-1:] * (num_iterations - len(report.energy))]
        for report in reports
    ]
    energy = tuple(map(sum, zip(*energies, strict=False)))
    converged = all(report.converged for report in reports)
    return MeanFieldResult(
        refined, MeanFieldReport(num_iterations, converged, energy, reports[0].filters), timings
    )


NARROW = "kernels are narrower than the voxels"
# voxels; below it the next voxel counts less than a quarter: exp(-1 / (2 * 0.6²))
NARROW_WIDTH = 0.6
USUAL_WIDTH = 1.5  # voxels, as of the preset `default` on voxels of 1 mm


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
    strokes: Strokes | None = None,
) -> RefinementResult:
    """Refine a network's output; arguments, results and errors as of `crfrefine.refine`.

    `names` are those of labels, for messages.
    """
    # Both are on one grid. It is done on tiles, each with the labels that are present near it,
    # where that is less work or the channels are not in memory; a case that a GPU cannot hold is
    # computed on the CPU.
    shape, order = networks.layout_of(network)
    image = image[None] if image.ndim == len(shape) - 1 else image
    if mask is not None:
        mask = given_voxels(mask, shape[1:])
        if not mask.any():
            raise InputError("the mask is empty: there is no voxel to refine")
    spacing_mm = given_spacing(spacing, len(shape) - 1)
    case = networks.Case(
        GridImage(image, mask, spacing_mm), parameters, backend, context, strokes, order, ()
    )
    if isinstance(network, LabelMapNetwork):
        result = _refine_label_map(network, case)
    else:
        network_spacing = None if isinstance(network, StreamedNetwork) else network.network_spacing
        if parameters.volume.match_input and (
            network_spacing is None or (isinstance(network, ArrayNetwork) and network.regions)
        ):
            raise ConfigError(
                "volume.match_input: keeps the volumes of a label map, and logits are not one (unless --resample brings them from the "
                "network's coarser grid); set it to false"
            )
        result = _refine(network, case, network_spacing)
    if strokes is not None:
        drawn = zip(*np.unique(strokes.labels, return_counts=True), strict=True)
        counts = ", ".join(f"{counted(count, 'voxel')} of label {label}" for label, count in drawn)
        result = replace(result, notes=(*result.notes, f"strokes: {counts}"))
    if not result.lost_to_rules:
        return result
    voxel_ml = math.prod(spacing_mm) / 1000.0 if len(spacing_mm) == 3 else None
    losses = describe_losses(
        result.lost_to_rules, parameters.postprocess, names or {}, voxel_ml, allowed=allow_vanishing
    )
    return replace(result, notes=result.notes + losses)


def _refine_label_map(network: LabelMapNetwork, case: networks.Case) -> RefinementResult:
    """Refine the numbers of the labels that occur, and return the result in labels."""
    strokes = case.strokes
    spacing = case.image.spacing
    labels = tuple(
        sorted({*network.channels, *(() if strokes is None else strokes.labels.tolist())})
    )
    num_labels = max(network.num_labels, labels[-1] + 1)
    parameters = case.parameters.select_labels(labels, num_labels)
    network_spacing, note = find_network_spacing(network.network_spacing, network.labels, spacing)
    numbers = channel_numbers(network.labels, labels)
    before = Cleaned(numbers)
    if parameters.volume.match_input:  # Islands that rules remove belong to no label's volume.
        before = clean(numbers, parameters.postprocess, math.prod(spacing) / 1000.0)
    only_drawn = [number for number, label in enumerate(labels) if label not in network.channels]
    numbered = LabelMapNetwork(
        before.label_map, range(len(labels)), num_labels, only_drawn=only_drawn
    )
    if strokes is not None:
        strokes = replace(strokes, labels=np.searchsorted(labels, strokes.labels))
    result = _refine(
        numbered, replace(case, parameters=parameters, strokes=strokes), network_spacing
    )
    lost = dict(result.lost_to_rules)
    for number, (total, left) in before.lost.items():  # Rules were applied twice.
        again = lost.get(number, (left, left))
        lost[number] = (total, max(0, left - (again[0] - again[1])))
    network_labels = numbers if parameters.volume.match_input else result.network_label_map
    return replace(
        result,
        label_map=renumber(result.label_map, labels),
        network_label_map=renumber(network_labels, labels),
        voxels_removed=result.voxels_removed + before.voxels_removed,
        voxels_filled=result.voxels_filled + before.voxels_filled,
        lost_to_rules={labels[number]: counts for number, counts in lost.items()},
        notes=((note,) if note else ()) + result.notes,
        channel_labels=labels,
        num_labels=num_labels,
    )


def _refine(
    network: Network, case: networks.Case, network_spacing: tuple[float, ...] | None
) -> RefinementResult:
    """Prepare the case, run the mean field, make the label map and clean it.

    The labels of a label map are its channels' numbers.
    """
    (num_channels, *grid), order = networks.layout_of(network)
    image = case.image
    parameters = case.parameters
    strokes = case.strokes
    threads = case.context.threads
    regions = network.regions if isinstance(network, ArrayNetwork) else None
    if regions is None:
        models: Sequence[ModelSpec] = [
            parameters.resolve(num_channels, len(image.values), len(image.spacing))
        ]
    else:
        if num_channels != regions.num_regions:
            raise InputError(
                f"the log-odds have shape {(num_channels, *grid)}; expected ({regions.num_regions}, *grid), one channel per region: "
                f"{regions.describe()}"
            )
        parameters.postprocess.spread({"label": regions.num_labels})  # checks the lengths
        models = resolve_regions(parameters, num_channels, len(image.values), len(image.spacing))
    # The model does not depend on the order of axes, so the engine gets them in storage order: a
    # volume read from a file is not copied.
    axes = order.axes
    mask = None if image.mask is None else order.to_storage(image.mask)
    spacing = tuple(image.spacing)
    kernels = [
        replace(kernel, theta_position=tuple(kernel.theta_position[axis] for axis in axes))
        for kernel in models[0].kernels.kernels
    ]
    wide = None if network_spacing is None else tuple(network_spacing[axis] for axis in axes)
    models = [
        replace(each, kernels=replace(each.kernels, kernels=tuple(kernels), network_spacing=wide))
        for each in models
    ]
    image = GridImage(
        order.to_storage(image.values), mask, tuple(spacing[axis] for axis in axes), axes
    )
    nan_notes = tuple[str, ...]()
    if not isinstance(network, StreamedNetwork | CoarseNetwork):  # Readers check those of files.
        image, nan_notes = networks.without_nan(image, case.backend, threads)
        mask = image.mask
    own = None if strokes is None else replace(strokes, positions=strokes.positions[list(axes)])
    case = replace(case, image=image, strokes=own, order=order, models=models)
    if isinstance(network, ArrayNetwork):
        prepared = networks.prepare_array(network, case)
    else:
        prepared = networks.prepare_channels(network, case)
    notes = nan_notes + prepared.notes
    try:
        refined = _run(prepared, case)
        shortage = ""
    except DeviceMemoryError as error:
        shortage = str(error)  # The error itself would keep the memory of the stopped run.
    if shortage:
        notes += (
            f"computed on the CPU, since the case does not fit into the memory of {case.backend.name}: {shortage}",
        )
        case = replace(case, backend=get_backend("cpu"))
        refined = _run(prepared, case)

    started = time.perf_counter()
    decode = partial(case.backend.label_map, threads=threads) if regions is None else regions.decode
    network_labels = decode(prepared.logits) if prepared.labels is None else prepared.labels
    if parameters.volume.match_input:
        inside = network_labels if prepared.mask is None else network_labels[prepared.mask]
        counts = np.array(count_labels(inside, num_channels))
        if prepared.gained is not None:
            counts = np.maximum(counts + prepared.gained, 0)
        refined.match_volumes(counts, network_labels, prepared.mask)
    if refined.is_array:
        labels = decode(refined.computed)
    else:
        labels = refined.label_map(network_labels, decode, threads=threads)
    if (
        network_spacing is not None and prepared.mask is not None
    ):  # The largest share may be that of another label.
        labels = np.where(prepared.mask, labels, network_labels)
    cleaned = clean(order.to_user(labels), parameters.postprocess, math.prod(spacing) / 1000.0)
    if parameters.intensity.window is not None:
        notes += window_notes(image.values, parameters.intensity, mask)
    # Hardly any label changes if every kernel is narrower than the voxels.
    steps = models[0].kernels.distances(image.spacing)
    long = [axis for axis, extent in enumerate(image.values.shape[1:]) if extent > 1]
    widths = [kernel.theta_position[axis] / steps[axis] for kernel in kernels for axis in long]
    if widths and max(widths) < NARROW_WIDTH:
        is_bilateral = any(np.any(kernel.weight) for kernel in parameters.bilateral)
        key = "bilateral.theta_alpha" if is_bilateral else "spatial.theta_gamma"
        wider = f"{key}={USUAL_WIDTH * min(steps[axis] for axis in long):.3g}"
        notes += (
            f"{NARROW}, so neighbors hardly count: the widest bandwidth is {max(widths):.2g} voxels; "
            f"--set {wider} ({parameters.mean_field.positions}) makes it {USUAL_WIDTH:g}",
        )
    return RefinementResult(
        label_map=cleaned.label_map if strokes is None else strokes.draw(cleaned.label_map),
        network_label_map=order.to_user(network_labels),
        channels=refined,
        order=order,
        report=refined.report,
        timings={**prepared.timings, **refined.timings, "labels": time.perf_counter() - started},
        device=case.backend.name,
        threads=threads,
        num_padding_voxels=prepared.num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        lost_to_rules=cleaned.lost,
        notes=notes,
        spacing=spacing,
        regions=regions,
        channel_labels=tuple(range(num_channels)) if regions is None else (),
        num_labels=num_channels if regions is None else regions.num_labels,
        output_temperature=parameters.mean_field.output_temperature,
    )


def _run(prepared: Prepared, case: networks.Case) -> RefinedChannels:
    """Run the mean field: on tiles if that is planned, else for all labels, or regions, in the mask's box."""
    plan = prepared.plan
    logits = prepared.logits
    models = case.models
    backend = case.backend
    context = case.context
    outcome: MeanFieldResult | RefinedTiles
    if plan is not None:
        if len(logits):
            # Logits in memory were checked to fit before they were read; tiles take little beside
            # them, and slabs would change the result.
            context = replace(context, num_bytes=None)
        outcome = solve(plan.problem, plan.sets, backend, context, is_direct=plan.is_direct)
    else:
        values = logits[(slice(None), *(prepared.box or ()))]
        needed = values.size * RUN_BYTES
        if context.num_bytes is not None and backend.name == "cpu" and needed > SMALL:
            left = context.num_bytes()
        else:
            left = None
        if left is not None and needed > left:
            raise CapacityError(
                f"the case needs about {format_size(needed)} beyond what is in memory already; {format_size(left)} are left; allow more "
                "memory (--max-memory), or use a mask or a smaller region"
            )
        if prepared.is_probability:
            values = np.array(values, order="C")
            take_logarithms(values)
        if prepared.are_regions:
            outcome = region_mean_field(backend, values, prepared.image, models, context)
        else:
            outcome = backend.mean_field(values, prepared.image, models[0], context)
    refined = RefinedChannels(outcome, prepared, models[0].mean_field)
    numbers = [*refined.report.energy]
    computed = refined.computed
    if all(map(math.isfinite, numbers)) and computed.size:
        numbers = [
            bound
            for pair in backend.channel_ranges(computed, threads=context.threads)
            for bound in pair
        ]
    if not all(map(math.isfinite, numbers)):
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's range; expected logits, weights and a "
            "compatibility of a few orders of magnitude around 1"
        )
    return refined
