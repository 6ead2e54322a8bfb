"""The sliders of the page: one for each number among the parameters that is worth changing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crfrefine.parameters.model import CrfParameters

# Longest list that gets a slider for each of its values; longer ones are only in the text.
MAX_ENTRIES = 8


@dataclass(frozen=True)
class _Slider:
    """How a number is shown."""

    title: str
    low: float  # a whole number for numbers that are whole
    high: float
    is_fine: bool  # finer at its low end
    unit: str

    def describe(self, number: float) -> dict[str, Any]:
        """Return the range for the page, wide enough for a number."""
        room = 4 * number if self.is_fine else number
        return {
            "low": min(self.low, number),
            "high": max(self.high, room),
            "is_fine": self.is_fine,
            "is_whole": isinstance(self.low, int),
            "unit": self.unit,
        }


_OF_BILATERAL_KERNEL = {
    "weight": _Slider("appearance weight", 0.0, 20.0, True, ""),
    "theta_alpha": _Slider("neighborhood", 0.3, 30.0, True, "mm"),
    "theta_beta": _Slider("intensity difference", 0.005, 1.0, True, "normalized"),
}
_OTHERS = {
    "spatial.weight": _Slider("smoothness weight", 0.0, 20.0, True, ""),
    "spatial.theta_gamma": _Slider("smoothness neighborhood", 0.3, 15.0, True, "mm"),
    "volume.weight": _Slider("volume weight", 0.0, 1.0, False, ""),
    "mean_field.num_iterations": _Slider("steps", 1, 20, False, ""),
    "mean_field.temperature": _Slider("temperature of the network", 0.1, 10.0, True, ""),
}


def describe_controls(
    parameters: CrfParameters, modalities: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a control for each number.

    It has key, place in a list or None, value, title, low, high, is_fine and unit.
    """
    names: dict[str, Mapping[int, str]] = {
        "weight": dict(enumerate(labels)),
        "theta_beta": dict(enumerate(modalities)),
        "theta_alpha": dict(enumerate("xyz")),
        "theta_gamma": dict(enumerate("xyz")),
    }
    controls = []
    for key, value, slider in _sliders(parameters):
        if not isinstance(value, tuple):
            head = {"key": key, "place": None, "title": slider.title, "value": value}
            controls.append({**head, **slider.describe(value)})
            continue
        if len(value) > MAX_ENTRIES:
            continue
        names_of_entries = names.get(key.rpartition(".")[2], {})
        for place, number in enumerate(value):
            title = f"{slider.title} ({names_of_entries.get(place, place)})"
            head = {"key": key, "place": place, "title": title, "value": value}
            controls.append({**head, **slider.describe(number)})
    return controls


def _sliders(parameters: CrfParameters) -> Iterator[tuple[str, Any, _Slider]]:
    """Yield dotted key, value and slider of each parameter with a slider."""
    are_many = len(parameters.bilateral) > 1
    for index, kernel in enumerate(parameters.bilateral):
        for entry, slider in _OF_BILATERAL_KERNEL.items():
            key = f"bilateral.{entry}"
            if are_many:
                key = f"bilateral.{index}.{entry}"
                slider = replace(slider, title=f"{slider.title} {index + 1}")
            yield key, getattr(kernel, entry), _in_unit_of(parameters, slider)
    for key, slider in _OTHERS.items():
        section, _, entry = key.partition(".")
        value = getattr(getattr(parameters, section), entry)
        yield key, value, _in_unit_of(parameters, slider)


def _in_unit_of(parameters: CrfParameters, slider: _Slider) -> _Slider:
    """Return a slider with the unit of positions in these parameters."""
    if slider.unit == "mm" and parameters.mean_field.positions == "voxels":
        return replace(slider, unit="voxels")
    return slider
