"""Rounding of the numbers in a parameter file. Measurements use the rounded numbers, so `infer` reproduces them from the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crfrefine.parameters.model import CrfParameters

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
