"""Checks that everything the engine computes fits into float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.refined import RefinedChannels

LARGEST_LOGIT = 1e34
"""Well below float32's 3.4e38: differences and sums over labels must fit too."""

_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def largest_bias(model: ModelSpec) -> float:
    """Return the largest magnitude of a label's bias."""
    return 0.0 if model.mean_field.bias is None else float(np.abs(model.mean_field.bias).max())


def check_temperature(temperature: float, largest: float) -> None:
    """Raise ConfigError if energies and marginals, sums of a few logits over the temperature, would not fit into float32."""
    if largest / temperature > LARGEST_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into {largest / temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )


def check_finite(backend: Backend, channels: NDArray[Any], name: str, threads: int | None) -> float:
    """Raise InputError if a value is NaN or infinite; return the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0
    largest = 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
    for number, (lowest, highest) in enumerate(ranges):
        if not (math.isfinite(lowest) and math.isfinite(highest) and max(-lowest, highest) <= _LARGEST_FLOAT):
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
            raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
        largest = max(largest, abs(lowest), abs(highest))
    return largest


def check_outcome(backend: Backend, outcome: RefinedChannels, threads: int | None) -> None:
    """Raise InputError if the model left the range of float32: such a label map would be noise."""
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
