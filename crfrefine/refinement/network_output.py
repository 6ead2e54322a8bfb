"""A network's output as the engine takes it: in storage order, without padding, as logits or known to be probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.padding import describe_padding, find_padding, leave_out
from crfrefine.arrays.probabilities import SMALLEST_PROBABILITY, identify_array
from crfrefine.arrays.region_channels import (
    LARGEST_LOG_ODDS,
    describe_undecided,
    find_undecided,
    identify_regions,
    take_log_odds,
)
from crfrefine.refinement.checks import LARGEST_LOGIT, check_finite, check_temperature, largest_bias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.engines.base import Backend
    from crfrefine.parameters.specs import ModelSpec


@dataclass
class NetworkOutput:
    """A network's output for one case.

    Attributes:
        logits: (L, *grid); for regions: (R, *grid) log-odds.
        mask: (*grid), True inside the mask and outside the padding; None: everywhere.
        num_padding: voxels in the mask that are padding.
        notes: what the user should know, one sentence each.
        is_probability: whether `logits` are probabilities of labels, whose logarithm is still to be taken.
    """

    logits: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    num_padding: int
    notes: tuple[str, ...]
    is_probability: bool


def prepare_output(
    backend: Backend,
    channels: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    models: Sequence[ModelSpec],
    *,
    input_type: str,
    are_regions: bool,
    threads: int | None,
) -> NetworkOutput:
    """Return the output of a network, checked.

    Args:
        backend: the engine.
        channels: (L, *grid) or (R, *grid), in storage order.
        mask: (*grid); None: everywhere.
        models: of the labels, or one per region.
        input_type: as in `crfrefine.refine`.
        are_regions: whether the channels are regions, one sigmoid each.
        threads: CPU threads.

    Raises:
        InputError: values that are not finite, or probabilities where logits are expected.
        ConfigError: a temperature that turns them into values too large for float32.
    """
    largest = check_finite(backend, channels, "logits", threads)
    temperature, bias = models[0].mean_field.temperature, max(largest_bias(model) for model in models)
    if are_regions:
        channels, largest = _as_log_odds(channels, input_type, largest)
    num_padding, notes = 0, tuple[str, ...]()
    padding = find_undecided(channels) if are_regions else find_padding(channels)
    if padding is not None:
        mask, num_padding = leave_out(padding, mask, "logits")
        describe = describe_undecided if are_regions else describe_padding
        notes = (describe(num_padding, padding.size),) if num_padding else ()
        if (largest + bias) / temperature > LARGEST_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            channels = np.where(padding, np.float32(0.0), channels)
            largest = check_finite(backend, channels, "logits", threads)
    is_probability = not are_regions and identify_array(channels, input_type) == "probabilities"
    if is_probability:
        largest = -math.log(SMALLEST_PROBABILITY)
    check_temperature(temperature, largest + bias)
    return NetworkOutput(channels, mask, num_padding, notes, is_probability)


def _as_log_odds(channels: NDArray[np.float32], input_type: str, largest: float) -> tuple[NDArray[np.float32], float]:
    """Return the log-odds of regions and their largest magnitude; "auto" expects log-odds and refuses what looks like probabilities."""
    if input_type != "logits" and identify_regions(channels, input_type, kind="logits")[0] == "probabilities":
        channels = np.array(channels, order="C")
        take_log_odds(channels)
        return channels, -math.log(SMALLEST_PROBABILITY)
    if largest > LARGEST_LOG_ODDS:
        return np.clip(channels, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), LARGEST_LOG_ODDS
    return channels, largest
