"""Refine a network's output in any form, with notes for the user."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.components import check_losses, clean
from crfrefine.arrays.intensity import notes_on_intensity
from crfrefine.arrays.label_maps import renumber
from crfrefine.arrays.network import LabelMapNetwork, Network
from crfrefine.arrays.softmax import take_logarithms
from crfrefine.base.array_types import Array, Bool, Spacing
from crfrefine.base.limits import RUN_BYTES, SMALL, case_too_large
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.base.text import counted
from crfrefine.engines import get_backend
from crfrefine.engines.base import NO_CONTEXT, Backend, RunContext
from crfrefine.engines.results import channel_ranges
from crfrefine.errors import DeviceMemoryError, InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.opening import open_case
from crfrefine.refinement.preparing import prepare
from crfrefine.refinement.refined import RefinedChannels
from crfrefine.refinement.result import RefinementResult

if TYPE_CHECKING:
    from crfrefine.arrays.strokes import Strokes

# voxels; below it the next voxel counts less than a quarter: exp(-1 / (2 * 0.6²))
NARROW_WIDTH = 0.6
USUAL_WIDTH = 1.5  # voxels, as of the preset `default` on voxels of 1 mm


def refine_network(
    network: Network,
    image: Array,
    *,
    spacing: Spacing,
    parameters: CrfParameters,
    mask: Bool | None = None,
    backend: Backend,
    context: RunContext = NO_CONTEXT,
    allow_vanishing: bool = False,
    names: Mapping[int, str] | None = None,
    strokes: Strokes | None = None,
) -> RefinementResult:
    """Refine a network's output; arguments, results and errors as of `crfrefine.refine`.

    The image and the mask, True where the model applies, are on the network's grid, and `spacing`
    has a number per axis. `names` are those of labels, for messages.
    """
    case = open_case(
        network,
        image,
        spacing=spacing,
        parameters=parameters,
        mask=mask,
        backend=backend,
        context=context,
        strokes=strokes,
    )
    prepared = prepare(case)
    notes = case.notes + prepared.notes
    shortage: str | None = None
    try:
        refined = run_mean_field(prepared, case)
    except DeviceMemoryError as error:
        shortage = str(error)  # The error itself would keep the memory of the stopped run.
    if shortage is not None:
        notes += (NoteKind.ON_CPU_FOR_MEMORY(device=case.backend.name, problem=shortage),)
        case = case._replace(backend=get_backend("cpu"))
        refined = run_mean_field(prepared, case)
    result = _result_of(refined, prepared, case)

    notes += _notes_on_image(case)
    if strokes is not None:
        drawn = []
        for label, count in zip(*np.unique(strokes.labels, return_counts=True), strict=True):
            drawn.append(f"{counted(count, 'voxel')} of label {label}")
        notes += (NoteKind.DRAWN_STROKES(drawn=", ".join(drawn)),)
    names = names or {}
    missed = []
    for channel, (wanted, got) in refined.missed_volumes.items():
        label = result.channel_labels[channel]
        name = names.get(label, f"label {label}")
        missed.append(f"{name} has {got:,} voxels in place of {wanted:,}")
    if missed:
        notes += (NoteKind.MISSED_VOLUMES(volumes=missed),)
    if result.lost_to_rules:
        rules = parameters.postprocess
        notes += check_losses(result.lost_to_rules, rules, names, spacing, allowed=allow_vanishing)
    return replace(result, notes=notes)


# ---- The mean field


def run_mean_field(prepared: Prepared, case: CaseToRefine) -> RefinedChannels:
    """Run the mean field on tiles, or in the mask's box for all labels, or regions.

    Raises DeviceMemoryError, CapacityError, and InputError if refined logits or their energy are
    not finite.
    """
    sets = None
    context = case.context
    if prepared.problem is not None:
        if len(prepared.logits):
            # Logits in memory were checked to fit before they were read; tiles take little beside
            # them, and slabs would change the result.
            context = context._replace(num_bytes=None, take=NO_CONTEXT.take)
        from crfrefine.refinement.tiles.slabs import solve

        sets, outcome = solve(prepared.problem, context)
    else:
        values = prepared.logits
        if prepared.box is not None:
            values = values[(slice(None), *prepared.box)]
        needed = values.size * RUN_BYTES
        if case.backend.name == "cpu" and needed > SMALL:
            left = context.num_bytes
            if left is not None and needed > left:
                raise case_too_large(needed, left)
            context.take(needed)
        if prepared.is_probability:
            values = np.array(values, order="C")
            take_logarithms(values)
        outcome = case.backend.mean_field(values, prepared.image, case.model, context)

    refined = RefinedChannels(outcome, sets, prepared, case.model.mean_field)
    is_finite = np.isfinite(refined.report.energy).all()
    if is_finite and refined.computed.size:
        is_finite = np.isfinite(channel_ranges(refined.computed, context.threads)).all()
    if not is_finite:
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's "
            "range; expected logits, weights and a compatibility of a few orders of magnitude "
            "around 1"
        )
    return refined


# ---- The result


def _result_of(
    refined: RefinedChannels, prepared: Prepared, case: CaseToRefine
) -> RefinementResult:
    """Make the label map and clean it; the result is in the user's order, and has no notes yet."""
    started = time.perf_counter()
    order = case.order
    spacing = order.inverse.along(case.image.spacing)
    network_labels, labels = refined.label_maps(prepared, case)
    refined.settle(prepared, case)
    rules = case.parameters.postprocess
    cleaned = clean(order.undo(labels), rules, spacing)
    if rules.protects:
        from crfrefine.refinement.protecting import keep_cores

        cleaned = keep_cores(cleaned, labels, network_labels, prepared, case)
    label_map = cleaned.label_map
    if case.cleaned is not None:
        assert isinstance(case.network, LabelMapNetwork)
        network_labels = case.network.labels
        cleaned = cleaned.after(case.cleaned)
    lost = cleaned.lost
    channel_labels = tuple(case.channel_labels)
    if channel_labels:
        label_map = renumber(label_map, channel_labels)
        network_labels = renumber(network_labels, channel_labels)
        lost = {channel_labels[number]: counts for number, counts in lost.items()}
    if case.strokes is not None:
        label_map = order.undo(case.strokes.draw(order.apply(label_map)))
    timings = {**prepared.timings, **refined.timings, "labels": time.perf_counter() - started}
    return RefinementResult(
        label_map=label_map,
        network_label_map=order.undo(network_labels),
        channels=refined,
        order=order,
        report=refined.report,
        timings=timings,
        device=case.backend.name,
        threads=case.context.threads,
        num_padding_voxels=prepared.num_padding,
        voxels_removed=cleaned.voxels_removed,
        voxels_filled=cleaned.voxels_filled,
        lost_to_rules=lost,
        spacing=spacing,
        regions=case.regions,
        channel_labels=channel_labels,
        num_labels=case.network.num_labels,
        output_temperature=case.parameters.mean_field.output_temperature,
    )


# ---- Notes


def _notes_on_image(case: CaseToRefine) -> Notes:
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
