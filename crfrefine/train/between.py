"""Models between two others: part of the way from one to the other, and the mean of two that were trained on other cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import BANDWIDTHS

DIGITS = 6
"""Of a trained number; the folds differ in the second or third."""

_SECTIONS = ("bilateral", "spatial", "compatibility", "mean_field")


def rounded(parameters: CrfParameters) -> CrfParameters:
    """Return the parameters with numbers of a few digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.{DIGITS}g}")
        if isinstance(value, Mapping):
            return {key: short(entry) for key, entry in value.items()}
        return [short(entry) for entry in value] if isinstance(value, list | tuple) else value

    table = parameters.to_dict()
    return CrfParameters.from_dict({name: short(value) if name in _SECTIONS else value for name, value in table.items()})


def part_way(untrained: CrfParameters, trained: CrfParameters, share: float) -> CrfParameters:
    """Return a model a share of the way from an untrained to a trained one.

    Bandwidths and temperature are in between by their logarithms, weights and biases by themselves. Both models have one appearance
    kernel; whatever else they have is the trained one's.
    """

    def plainly(one: float, other: float) -> float:
        return one + share * (other - one)

    def by_logarithm(one: float, other: float) -> float:
        return float(one ** (1.0 - share) * other**share)

    first, last = untrained.bilateral[0], trained.bilateral[0]
    thetas = {name: _between(getattr(first, name), getattr(last, name), by_logarithm) for name in BANDWIDTHS}
    kernel = replace(last, weight=_between(first.weight, last.weight, plainly), **thetas)
    begin, end = untrained.mean_field, trained.mean_field
    temperature, bias = by_logarithm(begin.temperature, end.temperature), _between(begin.bias, end.bias, plainly)
    return rounded(replace(trained, bilateral=(kernel,), mean_field=replace(end, temperature=temperature, bias=bias)))


def mean_of(first: CrfParameters, last: CrfParameters) -> CrfParameters | None:
    """Return the model half way between two; None unless they differ only in their one appearance kernel, temperature and bias."""
    begin, end = first.mean_field, last.mean_field
    same = first.replace(bilateral=last.bilateral, mean_field=replace(begin, temperature=end.temperature, bias=end.bias))
    is_one_kernel = len(first.bilateral) == len(last.bilateral) == 1
    return part_way(first, last, 0.5) if is_one_kernel and same == last else None


def _between(
    first: float | tuple[float, ...], last: float | tuple[float, ...], mean: Callable[[float, float], float]
) -> float | tuple[float, ...]:
    """Return what is between two values, either of which may be one for all entries."""
    count = max((len(value) for value in (first, last) if isinstance(value, tuple)), default=0)
    ones, others = (value if isinstance(value, tuple) else (value,) * max(count, 1) for value in (first, last))
    means = tuple(mean(one, other) for one, other in zip(ones, others, strict=True))
    return means if count else means[0]
