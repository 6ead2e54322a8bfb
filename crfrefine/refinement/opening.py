"""The door of a refinement: a network's output and an image become one case, in storage order.

Here the order in memory of the network's output is asked for, and every array is turned into it.
The kind of values, the labels of channels and the parameters that count for them are settled, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.components import clean
from crfrefine.arrays.foreground import (
    decide_channel,
    fill_background_of_channel,
    identify_regions,
    take_log_odds,
)
from crfrefine.arrays.label_maps import (
    channel_numbers,
    occurring_channels,
)
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork, Network, StreamedNetwork
from crfrefine.arrays.probabilities import identify_array
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, resolve_regions
from crfrefine.base.array_types import Array, Bool, Spacing
from crfrefine.base.notes import Notes
from crfrefine.base.text import listed
from crfrefine.engines.base import Backend, GridImage, RunContext
from crfrefine.engines.results import channel_ranges, largest_magnitude
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import CaseToRefine

if TYPE_CHECKING:
    from crfrefine.arrays.strokes import Strokes


def open_case(
    network: Network,
    image: Array,
    *,
    spacing: Spacing,
    parameters: CrfParameters,
    mask: Bool | None,
    backend: Backend,
    context: RunContext,
    strokes: Strokes | None,
) -> CaseToRefine:
    """Return a case in storage order; arguments and errors as of `crfrefine.refine`.

    The model does not depend on the order of axes, so the engine gets them in storage order: a
    volume read from a file is not copied.
    """
    order = network.order
    num_dims = len(spacing)
    if image.ndim == num_dims:
        image = image[None]
    if mask is not None and not mask.any():
        raise InputError("the mask is empty: there is no voxel to refine")

    notes: Notes = ()
    cleaned = None
    if isinstance(network, LabelMapNetwork):
        drawn = () if strokes is None else strokes.labels.tolist()
        channel_labels: Sequence[int] = tuple(sorted({*network.channels, *drawn}))
        num_labels = max(network.num_labels, channel_labels[-1] + 1)
        parameters = parameters.select_labels(channel_labels, num_labels)
        network, notes = _open_label_map(network, channel_labels, num_labels, spacing)
        if parameters.volume.match_input:
            # Islands that rules remove belong to no label's volume.
            cleaned = clean(network.labels, parameters.postprocess, spacing)
            cleaned = replace(cleaned, label_map=order.apply(cleaned.label_map))
        network = network.in_order(order)
    else:
        channel_labels = network.labels_of_channels
    if strokes is not None:
        unknown = sorted({*strokes.labels.tolist()} - {*channel_labels})
        if channel_labels and unknown:
            raise InputError(
                f"strokes: expected the labels of the channels, {listed(channel_labels)}, found "
                f"{listed(unknown)}"
            )
        strokes = strokes.in_order(order)
    model = _model_of(network, parameters, len(image), num_dims)
    if isinstance(network, ArrayNetwork):
        network, notes = _open_channels(network.in_order(order), context.threads)
    steps = cast("Spacing | None", network.network_spacing)
    kernels = replace(model.kernels, network_spacing=steps).in_order(order)
    model = replace(model, kernels=kernels)
    if mask is not None:
        mask = order.apply(mask)
    grid_image = GridImage(order.apply(image), mask, order.along(spacing), order.sources)
    # Readers check the images of other networks.
    if not isinstance(network, StreamedNetwork):
        grid_image, of_nan = _without_nan(grid_image, context.threads)
        notes += of_nan
    return CaseToRefine(
        network,
        grid_image,
        parameters,
        model,
        backend,
        context,
        order,
        channel_labels,
        strokes,
        cleaned,
        notes,
    )


def _open_label_map(
    network: LabelMapNetwork,
    channel_labels: Sequence[int],
    num_labels: int,
    spacing: Spacing,
) -> tuple[LabelMapNetwork, Notes]:
    """Return the map of the numbers of channels, and notes on the network's spacing."""
    network_spacing = cast("Spacing | None", network.network_spacing)
    notes: Notes = ()
    if not network.is_examined:
        network_spacing, note = find_network_spacing(
            network.network_spacing, network.labels, spacing
        )
        notes = () if note is None else (note,)
    occurring = occurring_channels(network.labels, network.channels)
    absent = [number for number, label in enumerate(channel_labels) if label not in occurring]
    channels = range(len(channel_labels))
    numbers = channel_numbers(network.labels, channel_labels)
    return LabelMapNetwork(numbers, channels, num_labels, network_spacing, absent=absent), notes


def _model_of(
    network: Network, parameters: CrfParameters, num_modalities: int, num_dims: int
) -> ModelSpec:
    """Return the model of the labels, or of the regions.

    Raises ConfigError for parameters that do not fit them, or need another form of the output.
    """
    is_label_map = isinstance(network, LabelMapNetwork)
    has_volumes = network.network_spacing is not None and network.regions is None
    if parameters.volume.match_input and not (is_label_map or has_volumes):
        raise ConfigError(
            "volume.match_input: keeps the volumes of a label map, and logits are not one "
            "(unless --resample brings them from the network's coarser grid); set it to false"
        )
    if parameters.postprocess.protects and not isinstance(network, ArrayNetwork):
        problem = "needs logits in memory, and these are read in pieces"
        if is_label_map:
            problem = "needs the network's probabilities, and a label map has none"
        raise ConfigError(f"postprocess.protect_probability: {problem}; set it to 0")
    sizes = (network.num_channels, num_modalities, num_dims)
    if network.regions is not None:
        num_labels = network.regions.num_labels
        parameters.postprocess.spread({"label": num_labels})  # checks the lengths
        return resolve_regions(parameters, *sizes)
    return parameters.resolve(*sizes)


def _open_channels(network: ArrayNetwork, threads: int | None) -> tuple[ArrayNetwork, Notes]:
    """Return finite float32 channels, whose kind is known, and notes.

    They are logits or probabilities of labels, of which label 1 alone gets a channel of the
    background, or log-odds of regions.
    """
    values = network.values
    kind = network.input_type
    notes: Notes = ()
    is_alone = network.regions is None and len(values) == 1
    is_told = network.regions is None or kind == "logits"
    if (is_alone or not is_told) and not np.isfinite(values).all():
        raise InputError("logits hold values that are not finite (NaN or infinity)")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    if is_alone:
        kind, note = decide_channel(network.values[0], kind, None, Path("logits"))
        notes = (note,)
        (channel,) = values
        values = np.empty((2, *channel.shape), np.float32)
        values[1] = channel
        fill_background_of_channel(values, kind)
    if not is_told:
        # "auto" expects log-odds, and refuses values that look like probabilities.
        kind, _ = identify_regions(network.values, kind, kind="logits")
        if kind == "probabilities":
            values = np.array(values, order="C")
            take_log_odds(values)
        kind = "logits"
    largest = largest_magnitude(values, "logits", threads)
    if network.regions is not None and largest > MAX_LOG_ODDS:
        largest = MAX_LOG_ODDS
        values = np.clip(values, -MAX_LOG_ODDS, MAX_LOG_ODDS)
    if kind != "logits":
        kind, on_kind = identify_array(values, kind)
        notes += on_kind
    return replace(network, values=values, input_type=kind, largest=largest), notes


def _without_nan(image: GridImage, threads: int | None) -> tuple[GridImage, Notes]:
    """Return an image without the voxels that are NaN in its mask, and notes on them.

    Raises InputError for infinite values, and if hardly any voxel is left.
    """
    values = image.values
    if values.dtype.kind != "f" or not np.isnan(channel_ranges(values, threads)).any():
        return image, ()
    numbers = np.where(np.isnan(values), values.dtype.type(0), values)
    largest_magnitude(numbers, "image", threads)
    values = values.copy(order="K")
    _, mask, notes = leave_out_nan(values, image.mask, "image")
    return replace(image, values=values, mask=mask), notes
