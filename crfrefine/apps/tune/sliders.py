"""Which parameters the page has controls for, and the ranges of their sliders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters

MAX_ENTRIES = 8
"""Longest list that gets a slider for each of its values; longer ones are only in the text."""


@dataclass(frozen=True)
class _Range:
    """A slider's range: "log", evenly spaced powers; "cubic", from 0, fine at its low end; "linear"; "whole", whole numbers."""

    scale: str
    low: float
    high: float
    unit: str = ""

    def around(self, value: float) -> tuple[float, float]:
        """Return a range that has a value well inside."""
        if self.scale in ("linear", "whole"):
            return min(self.low, value), max(self.high, value)
        return (min(self.low, value / 10) if self.scale == "log" else self.low), max(self.high, 4 * value)


_KERNEL = {
    "weight": ("appearance weight", _Range("cubic", 0.0, 20.0)),
    "theta_alpha": ("neighborhood", _Range("log", 0.3, 30.0, "mm")),
    "theta_beta": ("intensity difference", _Range("log", 0.005, 1.0, "normalized")),
}
_OTHERS = {
    "spatial.weight": ("smoothness weight", _Range("cubic", 0.0, 20.0)),
    "spatial.theta_gamma": ("smoothness neighborhood", _Range("log", 0.3, 15.0, "mm")),
    "volume.weight": ("volume weight", _Range("linear", 0.0, 1.0)),
    "mean_field.num_iterations": ("steps", _Range("whole", 1, 20)),
    "mean_field.temperature": ("temperature of the network", _Range("log", 0.1, 10.0)),
}
_CHOICES = {"volume.keep": ("volume to keep", ("expected", "argmax", "largest"))}


def describe_controls(parameters: CrfParameters, modalities: list[str], labels: list[str]) -> list[dict[str, Any]]:
    """Return the page's controls: key, value, title, and for numbers scale, low, high and unit."""
    names = {"weight": labels, "theta_beta": modalities, "theta_alpha": ["x", "y", "z"], "theta_gamma": ["x", "y", "z"]}
    found = []
    for key, title, scale, value in _numbers(parameters):
        entries = list(value) if isinstance(value, tuple) else [value]
        if len(entries) > MAX_ENTRIES:
            continue
        parts = names.get(key.rpartition(".")[2], [])
        for place, entry in enumerate(entries):
            low, high = scale.around(entry)
            part = f" ({parts[place] if place < len(parts) else place})" if isinstance(value, tuple) else ""
            unit = _unit(scale.unit, parameters)
            found.append(
                {
                    "key": key,
                    "place": place if isinstance(value, tuple) else None,
                    "value": list(value) if isinstance(value, tuple) else value,
                    "title": title + part,
                    "scale": scale.scale,
                    "low": low,
                    "high": high,
                    "unit": unit,
                }
            )
    for key, (title, choices) in _CHOICES.items():
        section, _, entry = key.partition(".")
        found.append({"key": key, "value": getattr(getattr(parameters, section), entry), "title": title, "choices": choices})
    return found


def _unit(unit: str, parameters: CrfParameters) -> str:
    """Return the unit that a bandwidth has with these parameters."""
    if unit == "mm" and parameters.mean_field.positions == "voxels":
        return "voxels"
    return "" if unit == "normalized" and parameters.intensity.normalization == "none" else unit


def _numbers(parameters: CrfParameters) -> Iterator[tuple[str, str, _Range, Any]]:
    """Yield key, title, range and value of each number or list of numbers."""
    kernels = parameters.bilateral
    for index, kernel in enumerate(kernels):
        prefix, which = (f"bilateral.{index}", f" {index + 1}") if len(kernels) > 1 else ("bilateral", "")
        for entry, (title, scale) in _KERNEL.items():
            yield f"{prefix}.{entry}", f"{title}{which}", scale, getattr(kernel, entry)
    for key, (title, scale) in _OTHERS.items():
        section, _, entry = key.partition(".")
        yield key, title, scale, getattr(getattr(parameters, section), entry)
