"""A network's output and the image, prepared for the mean field.

Padding leaves the mask, the image is normalized, strokes edit the logits, and tiles are planned
where these save work or the channels are not in memory.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from crfrefine.arrays import label_maps
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE
from crfrefine.arrays.padding import leave_out
from crfrefine.arrays.softmax import take_logarithms
from crfrefine.base.array_types import Array, Float32, Integers
from crfrefine.base.limits import require_memory
from crfrefine.engines.results import label_map
from crfrefine.refinement.given import (
    CaseToRefine,
    LabelMapNetwork,
    Prepared,
    StreamedNetwork,
)
from crfrefine.refinement.opening import require_small_logits
from crfrefine.refinement.strokes import Strokes
from crfrefine.refinement.tiles.grid import LabelSets
from crfrefine.refinement.tiles.planning import plan_array, plan_label_map, plan_stream
from crfrefine.refinement.tiles.problem import TileProblem

# Share of the grid below which the mask's box is refined by itself, which costs a pass outside.
WORTH_BOX = 0.9


def prepare(case: CaseToRefine) -> Prepared:
    """Prepare a network's output in any form: files, a label map, or channels in memory."""
    network = case.network
    if isinstance(network, StreamedNetwork):
        prepared = plan_stream(network, case)
    elif isinstance(network, LabelMapNetwork):
        prepared = _prepare_label_map(network, case)
    else:
        is_probability = network.input_type == "probabilities"
        prepared = Prepared(network.values, case.image, case.image.mask, is_probability)
        if network.unseen is not None:
            prepared.unseen = network.unseen
            are_regions = case.regions is not None
            left = leave_out(network.unseen, prepared.mask, "logits", are_regions=are_regions)
            prepared.mask, prepared.num_padding, prepared.notes = left
    if prepared.problem is None:
        _plan_channels(prepared, case)
    elif case.strokes is not None:
        _draw_strokes_on_tiles(prepared.problem, prepared, case, case.strokes)
    return prepared


def _prepare_label_map(network: LabelMapNetwork, case: CaseToRefine) -> Prepared:
    """Prepare a label map; with many labels its logits are made tile by tile.

    Raise CapacityError if there are many labels, for which memory lacks, and tiles are impossible.
    """
    model = case.model
    numbers = network.labels
    if case.cleaned is not None:
        numbers = case.cleaned.label_map
    num_channels = len(network.channels)
    sigma = None
    network_spacing = model.kernels.network_spacing
    if network_spacing is not None:
        sigma = label_maps.share_sigma(network_spacing, case.image.spacing)
    # Many labels take part only near where they occur. A stroke of a new label does not change how
    # the others take part.
    num_of_network = num_channels - len(network.absent)
    takes_part_nearby = label_maps.take_part_nearby(num_of_network, numbers.size)
    if takes_part_nearby:
        if case.can_have_tiles and case.parameters.can_leave_out_labels:
            return plan_label_map(numbers, sigma, case)
        what = f"the logits of {num_channels} labels take"
        remedy = (
            "The CPU does without them where mean_field.label_threshold is above 0 and "
            "volume.weight is 0."
        )
        require_memory(4 * num_channels * numbers.size, what, details=[remedy])
    logits = label_maps.label_logits(numbers, num_channels, sigma, network.absent)
    if takes_part_nearby and sigma is None:
        reach = model.kernels.reach(case.image.spacing, numbers.shape)
        for channel in logits:
            near = label_maps.dilated(channel == CONFIDENCE, reach)
            np.copyto(channel, ABSENT_LOGIT, where=~near)
    # No logit of a label map is farther from 0.
    require_small_logits(-ABSENT_LOGIT, case.parameters)
    return Prepared(logits, case.image, case.image.mask, labels=numbers)


def _draw_strokes_on_tiles(
    problem: TileProblem, prepared: Prepared, case: CaseToRefine, strokes: Strokes
) -> None:
    """Edit channels that are not in memory, and count the voxels as `_draw_strokes` does."""
    from crfrefine.refinement.following import plan_edits

    assert prepared.labels is not None
    grid = problem.grid
    network = prepared.labels.reshape(grid.shape)
    edits = plan_edits(case, strokes, problem.mask, problem.normalized, network)
    changed = edits.changed_tiles(grid, len(problem.present))
    # Labels take part where their logits rise, too.
    edited = problem.with_presence(problem.present | changed, problem.may_matter | changed)
    edited = replace(edited, edits=edits)
    # The tiles that the edits change, by themselves: labels gain voxels only there.
    is_near = changed.any(axis=0)
    near = replace(edited, sets=LabelSets(grid, edited.sets.domains & is_near))
    if case.parameters.volume.match_input:
        near.source.ensure(near.sets.domains & near.sets.active)
        before = _count_voxels_on_tiles(replace(near, edits=None))
        prepared.gained = _count_voxels_on_tiles(near) - before
    # Without kernels nothing changes elsewhere, unless tiles were to be computed before.
    is_local = not problem.spec.kernels.kernels and not problem.sets.active.any()
    prepared.problem = near if is_local else edited


def _count_voxels_on_tiles(problem: TileProblem) -> Integers:
    """Return the number of voxels of each label's largest logits in active tiles, (L,)."""
    sets = problem.sets
    labels = np.zeros(sets.grid.shape, np.uint16)
    if sets.num_entries:
        sets.engine(problem.mask, 1).decode(problem.logits(1), labels)
    return np.array(label_maps.count_labels(labels, len(sets.domains)))


def _plan_channels(prepared: Prepared, case: CaseToRefine) -> None:
    """Normalize the image, edit the channels in memory by strokes, and plan their tiles.

    The image is normalized in the box of the mask without padding if so much lies outside it.
    """
    started = time.perf_counter()
    raw = case.image
    is_coarser = not case.is_label_map and case.model.kernels.network_spacing is not None
    is_interpolated = case.can_have_tiles and is_coarser  # as logits that stream, without a box
    mask = prepared.mask
    mask_box = None  # Tiles cover it, however large it is.
    if mask is not None and not is_interpolated:
        mask_box = label_maps.bounding_box(mask)
        assert mask_box is not None
        num_inside = math.prod(axis.stop - axis.start for axis in mask_box)
        if num_inside < WORTH_BOX * mask.size:
            prepared.box = mask_box
            mask = mask[mask_box]
    # Padding of the logits is not a property of the image: intensities are normalized as if there
    # were no padding.
    values = normalize_intensity(
        raw.values,
        case.parameters.intensity,
        raw.mask,
        box=prepared.box,
        threads=case.context.threads,
    )
    prepared.image = replace(raw, values=values, mask=mask)
    prepared.timings["normalize"] = time.perf_counter() - started

    if case.strokes is not None:
        _draw_strokes(prepared, case, case.strokes)
    has_messages = bool(case.model.kernels.kernels)
    if case.can_have_tiles and case.parameters.can_leave_out_labels and has_messages:
        plan_array(prepared, mask_box, case, is_interpolated=is_interpolated)


def _draw_strokes(prepared: Prepared, case: CaseToRefine, strokes: Strokes) -> None:
    """Edit the channels, and count the voxels that labels gain if volumes are kept."""
    from crfrefine.refinement.following import plan_edits

    labels = case.decode(prepared.logits) if prepared.labels is None else prepared.labels
    prepared.labels = labels
    prepared.logits = np.array(prepared.logits, order="C")
    if prepared.is_probability:
        take_logarithms(prepared.logits)
        prepared.is_probability = False
    are_regions = case.regions is not None
    network: Array = prepared.logits if are_regions else labels
    edits = plan_edits(case, strokes, prepared.mask, prepared.image_in, network)
    if not case.is_label_map:
        temperature = case.model.mean_field.temperature
        prepared.notes += edits.find_ruled_out(
            prepared.logits, temperature, are_regions=are_regions
        )
    if not case.parameters.volume.match_input:  # Only volumes need what labels gain.
        edits.apply(prepared.logits)
        return
    before = _count_voxels(prepared.logits, case)
    edits.apply(prepared.logits)
    prepared.gained = _count_voxels(prepared.logits, case) - before


def _count_voxels(logits: Float32, case: CaseToRefine) -> Integers:
    """Return the number of voxels of each label's largest logits, (L,)."""
    labels = label_map(logits, case.context.threads)
    return np.array(label_maps.count_labels(labels, len(logits)))
