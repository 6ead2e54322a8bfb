"""How the layer's tensors hold weights, bandwidths and penalties: unconstrained numbers become values in a stated range, and back.

A value at the end of its range stays there until the gradient points inward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import MAX_BIAS

WEIGHT_RANGE = (0.0, 1e3)
"""Weights of kernels; 0 is included."""

POSITION_RANGE = (0.1, 1e3)
"""Bandwidths along the axes, in mm, or in voxels if `positions` is "voxels"."""

INTENSITY_RANGE = (1e-3, 1e5)
"""theta_beta, normalized intensity."""

TEMPERATURE_RANGE = (0.05, 20.0)

BIAS_RANGE = (-MAX_BIAS, MAX_BIAS)
"""Of a label, in the unit of the logits."""

VOLUME_RANGE = (0.0, 1.0)
"""Weight of the volume term; both ends are included."""

# Weights are softplus(raw + _BEND) - softplus(_BEND) with raw >= 0: nearly linear above 1, gentle near 0, and exactly 0 at raw = 0, where
# the slope is still 0.12. A plain softplus approaches 0 only where its slope vanishes too, and would get stuck there.
_BEND = -2.0
WEIGHT_FLOOR = math.log1p(math.exp(_BEND))
"""Weights are differences from this, which limits the digits of small weights."""


def weight_from_raw(raw: Tensor) -> Tensor:
    """Return weights from their raw values."""
    inside = clamped(raw, (0.0, _raw_of_weight(WEIGHT_RANGE[1])))
    return functional.softplus(inside + _BEND) - functional.softplus(torch.full_like(inside, _BEND))


def raw_from_weight(values: Sequence[float], key: str) -> list[float]:
    """Return the raw values of weights; raise ConfigError, naming the key, if one is out of range."""
    _check_range(values, WEIGHT_RANGE, key)
    return [_raw_of_weight(value) for value in values]


def _raw_of_weight(value: float) -> float:
    shifted = value + WEIGHT_FLOOR
    return 0.0 if value == 0.0 else shifted + math.log(-math.expm1(-shifted)) - _BEND


def value_from_log(raw: Tensor, limits: tuple[float, float]) -> Tensor:
    """Return positive values within limits, from their logarithms."""
    return torch.exp(clamped(raw, (math.log(limits[0]), math.log(limits[1]))))


def log_from_value(values: Sequence[float], limits: tuple[float, float], key: str) -> list[float]:
    """Return the logarithms of values; raise ConfigError, naming the key, if one is out of range."""
    _check_range(values, limits, key)
    return [math.log(value) for value in values]


def penalty_matrix(entries: Tensor, num_labels: int, *, symmetric: bool) -> Tensor:
    """Return the (L, L) matrix with zero diagonal from its other entries, row by row; only the upper triangle if it is symmetric."""
    rows, cols = _entry_indices(num_labels, symmetric=symmetric, device=entries.device)
    matrix = entries.new_zeros(num_labels, num_labels).index_put((rows, cols), entries)
    return matrix + matrix.T if symmetric else matrix


def penalty_entries(matrix: Tensor, *, symmetric: bool) -> Tensor:
    """Return the entries from which `penalty_matrix` builds the (L, L) matrix."""
    rows, cols = _entry_indices(len(matrix), symmetric=symmetric, device=matrix.device)
    return matrix[rows, cols]


def _entry_indices(num_labels: int, *, symmetric: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    # Without `nonzero`, whose number of results `torch.compile` could not know.
    if symmetric:
        rows, cols = torch.triu_indices(num_labels, num_labels, offset=1, device=device)
        return rows, cols
    entry = torch.arange(num_labels * (num_labels - 1), device=device)
    rows, cols = entry // (num_labels - 1), entry % (num_labels - 1)
    return rows, cols + (cols >= rows)


def plain_numbers(tensor: Tensor, *, floor: float = 0.0, precision: torch.dtype = torch.float32) -> list[float]:
    """Return the numbers of a 1-D tensor as a person would write them: the shortest decimals that are equal in a given precision.

    A weight of 4 then does not come back as 4.000000476837158. Numbers below `floor` get its absolute precision. Engines use values in
    float32; bandwidths have the tensor's own precision.
    """
    rounding = _ROUNDINGS * torch.finfo(precision).eps
    return [_shortest(value, rounding * max(abs(value), floor)) for value in tensor.detach().double().tolist()]


# Half a unit in the last place of the largest stored logarithm (11.5), plus a few more roundings.
_ROUNDINGS = 8.0


def _shortest(value: float, tolerance: float) -> float:
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((rounded for rounded in candidates if abs(rounded - value) <= tolerance), value)


def _check_range(values: Sequence[float], limits: tuple[float, float], key: str) -> None:
    for value in values:
        if not limits[0] <= value <= limits[1]:
            raise ConfigError(f"{key}: {value:g} is outside the range of the trainable layer, {limits[0]:g} to {limits[1]:g}")


def is_nonzero(weight: float | Sequence[float]) -> bool:
    """Whether a weight, or any of a list, is not 0."""
    return any(weight) if isinstance(weight, Sequence) else weight != 0.0


def decide(asked: bool | None, values: Sequence[float | tuple[float, ...]], argument: str, key: str) -> bool:
    """Whether to hold values as lists: as requested, else as they are; raise ConfigError if a list would have to become one number."""
    lists = any(isinstance(value, tuple) for value in values)
    if asked is False and lists:
        raise ConfigError(f"{argument} is False, but the parameters have a list as {key}; give one number")
    return lists if asked is None else asked


def listed(value: float | tuple[float, ...], size: int) -> list[float]:
    """Return the list for a value that may be one number for all."""
    return list(value) if isinstance(value, tuple) else [value] * size


def number_or_list(values: Sequence[float], *, is_list: bool) -> float | tuple[float, ...]:
    """The inverse of `listed`."""
    return tuple(values) if is_list else values[0]


class _ClampInward(torch.autograd.Function):
    """Clamp to a range; at and beyond its ends, keep only gradients whose descent leads back inside."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, low: float, high: float) -> Tensor:
        """Return raw within [low, high]."""
        ctx.save_for_backward(raw)
        ctx.limits = low, high
        return raw.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient without its outward part."""
        (raw,) = ctx.saved_tensors
        low, high = ctx.limits
        outward = ((raw <= low) & (grad > 0)) | ((raw >= high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def clamped(raw: Tensor, limits: tuple[float, float]) -> Tensor:
    """Return values that are held as they are, within limits; gradients that lead outside stop there."""
    inside: Tensor = _ClampInward.apply(raw, *limits)  # type: ignore[no-untyped-call]
    return inside
