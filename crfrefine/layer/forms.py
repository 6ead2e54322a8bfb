"""Values of parameters, each in a range, and the raw numbers that the layer's tensors hold.

A value at the end of its range stays there until the gradient points inward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import MAX_BIAS

TEMPERATURE_RANGE = (0.05, 20.0)

# Weights are softplus(raw + _BEND) - softplus(_BEND) with raw >= 0: nearly linear above 1, gentle
# near 0, and exactly 0 at raw = 0, where the slope is still 0.12. A plain softplus approaches 0
# only where its slope vanishes too, and would get stuck there.
_BEND = -2.0
# Weights are differences from this floor, which limits the digits of small weights.
WEIGHT_FLOOR = math.log1p(math.exp(_BEND))


@dataclass(frozen=True)
class Form:
    """Values from `low` to `high`; the raw number that a tensor holds is the value itself."""

    low: float
    high: float

    def to_raw(self, value: float) -> float:
        """Return the raw number of a value."""
        return value

    def from_raw(self, raw: Tensor) -> Tensor:
        """Return the values of raw numbers, clamped to the range; outward gradients stop there."""
        return _ClampInward.apply(  # type: ignore[no-untyped-call]
            raw, self.to_raw(self.low), self.to_raw(self.high)
        )

    def hold(self, values: Sequence[float], key: str) -> list[float]:
        """Return the raw numbers of values.

        Raises ConfigError, naming the key, if one is out of range.
        """
        for number in values:
            if not self.low <= number <= self.high:
                raise ConfigError(
                    f"{key}: {number:g} is outside the range of the trainable layer, {self.low:g} "
                    f"to {self.high:g}"
                )
        return [self.to_raw(number) for number in values]


class _Weight(Form):
    def to_raw(self, value: float) -> float:
        if value == 0.0:
            return 0.0
        shifted = value + WEIGHT_FLOOR
        return shifted + math.log(-math.expm1(-shifted)) - _BEND

    def from_raw(self, raw: Tensor) -> Tensor:
        inside = super().from_raw(raw)
        floor = functional.softplus(torch.full_like(inside, _BEND))
        return functional.softplus(inside + _BEND) - floor


class _Logarithm(Form):
    def to_raw(self, value: float) -> float:
        return math.log(value)

    def from_raw(self, raw: Tensor) -> Tensor:
        return torch.exp(super().from_raw(raw))


class _ClampInward(torch.autograd.Function):
    """Clamp to a range; at and beyond its ends, keep only gradients that lead back inside."""

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


WEIGHT = _Weight(0.0, 1e3)
# Bandwidths along the axes, in mm, or in voxels if `positions` is "voxels".
POSITION = _Logarithm(0.1, 1e3)
INTENSITY = _Logarithm(1e-3, 1e5)  # theta_beta, normalized intensity
# The keys of kernels' tables, by what they are per.
OF_KERNELS: dict[str, Form] = {"label": WEIGHT, "axis": POSITION, "modality": INTENSITY}
TEMPERATURE = _Logarithm(*TEMPERATURE_RANGE)
BIAS = Form(-MAX_BIAS, MAX_BIAS)  # in the unit of the logits
VOLUME = Form(0.0, 1.0)


def penalty_matrix(entries: Tensor, num_labels: int, *, symmetric: bool) -> Tensor:
    """Return the (L, L) matrix with zero diagonal from its other entries, row by row.

    The entries of a symmetric matrix are those of its upper triangle.
    """
    places = entry_places(num_labels, symmetric=symmetric).to(entries.device)
    matrix = entries.new_zeros(num_labels, num_labels).masked_scatter(places, entries)
    if symmetric:
        matrix = matrix + matrix.T
    return matrix


def entry_places(num_labels: int, *, symmetric: bool) -> Tensor:
    """Return (L, L), True at the entries from which `penalty_matrix` builds the matrix."""
    places = ~torch.eye(num_labels, dtype=torch.bool, device="cpu")
    return places.triu() if symmetric else places


# In units of `eps`: half a unit in the last place of the largest stored logarithm, 11.5, and a few
# more roundings.
_ROUNDINGS = 8.0


def plain_numbers(
    tensor: Tensor, *, floor: float = 0.0, precision: torch.dtype = torch.float32
) -> tuple[float, ...]:
    """Return the numbers of a tensor as a person would write them.

    These are the shortest decimals that are equal in a given precision. Numbers below `floor` get
    its absolute precision. Engines use bandwidths in float64, all other values in float32.
    """
    relative = _ROUNDINGS * torch.finfo(precision).eps
    shortest = []
    for value in tensor.detach().double().flatten().tolist():
        tolerance = relative * max(abs(value), floor)
        for digits in range(1, 18):  # The last of these are all digits of a float64.
            rounded = float(f"{value:.{digits}g}")
            if abs(rounded - value) <= tolerance:
                break
        shortest.append(rounded)
    return tuple(shortest)
