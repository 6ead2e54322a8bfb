"""A network's output and the image, prepared for the mean field.

Padding is found and leaves the mask, the image is normalized, strokes edit the logits, and tiles
are planned where these save work or the channels are not in memory.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from crfrefine.arrays import label_maps
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork
from crfrefine.arrays.padding import find_padding, leave_out
from crfrefine.base.limits import require_memory
from crfrefine.base.numerics import MIN_PROBABILITY
from crfrefine.errors import ConfigError
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.planning import plan_array, plan_label_map, plan_stream

MAX_LOGIT = 1e34  # well below float32's 3.4e38: differences and sums over labels must fit too
# From so many channels or bytes of logits on, a label takes part only near where it occurs: e^0 for
# each of many others would outweigh a voxel's own label.
MANY_LABELS = 16
MAX_IN_MEMORY = 1 << 29
# Share of the grid below which the mask's box is refined by itself, which costs a pass outside.
WORTH_BOX = 0.9


def prepare(case: CaseToRefine) -> Prepared:
    """Prepare a network's output in any form: channels in memory, a label map, or files."""
    network = case.network
    largest = -ABSENT_LOGIT  # No logit of a label map is farther from 0.
    if isinstance(network, LabelMapNetwork):
        prepared = _prepare_label_map(network, case)
    elif isinstance(network, ArrayNetwork):
        values = network.values
        is_probability = network.input_type == "probabilities"
        are_regions = network.regions is not None
        largest = network.largest
        unseen = network.unseen
        if unseen is None:
            unseen = find_padding(values, are_regions=are_regions, is_probability=is_probability)
        elif not unseen.any():
            unseen = None
        mask, num_padding, notes = leave_out(
            unseen, case.image.mask, "logits", are_regions=are_regions
        )
        if unseen is not None and largest / case.parameters.mean_field.temperature > MAX_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any
            # other constant means the same.
            values = np.where(unseen, 0.0, values)
            largest = float(np.abs(values).max())
        prepared = Prepared(
            values,
            case.image,
            mask,
            is_probability,
            unseen=unseen,
            num_padding=num_padding,
            notes=notes,
        )
        if is_probability:
            largest = -math.log(MIN_PROBABILITY)
    else:
        prepared = plan_stream(network, case)
    if prepared.problem is None:
        _plan_channels(prepared, largest, case)
    elif case.strokes is not None:
        from crfrefine.refinement.following import draw_strokes_on_tiles

        draw_strokes_on_tiles(prepared.problem, prepared, case)
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
    # Many labels take part only near where they occur. A stroke of a new label does not change how
    # the others take part.
    num_of_network = num_channels - len(network.absent)
    is_large = 4 * num_of_network * numbers.size > MAX_IN_MEMORY
    takes_part_nearby = num_of_network >= MANY_LABELS or is_large
    has_tiles = takes_part_nearby and case.can_leave_out_labels
    if takes_part_nearby and not has_tiles:
        what = f"the logits of {num_channels} labels take"
        remedy = (
            "The CPU does without them where mean_field.label_threshold is above 0 and "
            "volume.weight is 0."
        )
        require_memory(4 * num_channels * numbers.size, what, details=[remedy])
    sigma = None
    network_spacing = model.kernels.network_spacing
    if network_spacing is not None:
        sigma = label_maps.share_sigma(network_spacing, case.image.spacing)
    if has_tiles:
        return plan_label_map(numbers, sigma, case)

    logits = label_maps.label_logits(numbers, num_channels, sigma, network.absent)
    if takes_part_nearby and sigma is None:
        reach = model.kernels.reach(case.image.spacing, numbers.shape)
        for channel in logits:
            near = label_maps.dilated(channel == CONFIDENCE, reach)
            np.copyto(channel, ABSENT_LOGIT, where=~near)
    return Prepared(logits, case.image, case.image.mask, labels=numbers)


def _plan_channels(prepared: Prepared, largest: float, case: CaseToRefine) -> None:
    """Normalize the image, edit the channels in memory by strokes, and plan their tiles.

    The image is normalized in the box of the mask without padding if so much lies outside it.
    Raises ConfigError if logits of the largest magnitude, over the temperature, are too large for
    float32.
    """
    # Energies and marginals are sums of a few logits over the temperature.
    temperature = case.parameters.mean_field.temperature
    largest += float(np.abs(case.parameters.mean_field.bias).max())
    if largest / temperature > MAX_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into "
            f"{largest / temperature:.1g}, too large for float32; use a larger temperature"
        )
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
        from crfrefine.refinement.following import draw_strokes

        draw_strokes(prepared, case)
    has_messages = bool(case.model.kernels.kernels)
    if case.can_leave_out_labels and has_messages:
        plan_array(prepared, mask_box, case, is_interpolated=is_interpolated)
