"""The sliders of the page: one for each number among the parameters that is worth changing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.values import Json

# Longest list that gets a slider for each of its values; longer ones are only in the text.
MAX_ENTRIES = 8

# Title, lowest and highest number, whether the slider is finer at its low end, and the unit.
# Numbers that are whole have a whole lowest one.
_OF_BILATERAL_KERNEL = {
    "weight": ("appearance weight", 0.0, 20.0, True, ""),
    "theta_alpha": ("neighborhood", 0.3, 30.0, True, "mm"),
    "theta_beta": ("intensity difference", 0.005, 1.0, True, "normalized"),
}
_OTHERS = {
    "spatial.weight": ("smoothness weight", 0.0, 20.0, True, ""),
    "spatial.theta_gamma": ("smoothness neighborhood", 0.3, 15.0, True, "mm"),
    "volume.weight": ("volume weight", 0.0, 1.0, False, ""),
    "mean_field.num_iterations": ("steps", 1, 20, False, ""),
    "mean_field.temperature": ("temperature of the network", 0.1, 10.0, True, ""),
}


def describe_controls(
    parameters: CrfParameters, modalities: Sequence[str], labels: Sequence[str]
) -> list[Json]:
    """Return a control for each number.

    It has key, place in a list or None, value, title, low, high, is_fine, is_whole and unit. Its
    range is wide enough for the number.
    """
    names: dict[str, Mapping[int, str]] = {
        "weight": dict(enumerate(labels)),
        "theta_beta": dict(enumerate(modalities)),
        "theta_alpha": dict(enumerate("xyz")),
        "theta_gamma": dict(enumerate("xyz")),
    }
    rows = []
    are_many = len(parameters.bilateral) > 1
    for index, kernel in enumerate(parameters.bilateral):
        for entry, (title, *scale) in _OF_BILATERAL_KERNEL.items():
            key = f"bilateral.{entry}"
            if are_many:
                key = f"bilateral.{index}.{entry}"
                title = f"{title} {index + 1}"
            rows.append((key, getattr(kernel, entry), title, *scale))
    for key, (title, *scale) in _OTHERS.items():
        section, _, entry = key.partition(".")
        rows.append((key, getattr(getattr(parameters, section), entry), title, *scale))

    controls = []
    for key, value, title, low, high, is_fine, unit in rows:
        if unit == "mm" and parameters.mean_field.positions == "voxels":
            unit = "voxels"
        control = {"key": key, "value": value, "is_fine": is_fine, "unit": unit}
        control["is_whole"] = isinstance(low, int)
        numbers: dict[int | None, float] = {None: value}
        if isinstance(value, tuple):
            numbers = dict(enumerate(value))
        if len(numbers) > MAX_ENTRIES:
            continue
        names_of_entries = names.get(key.rpartition(".")[2], {})
        for place, number in numbers.items():
            title_of_entry = title
            if place is not None:
                title_of_entry = f"{title} ({names_of_entries.get(place, place)})"
            room = 4 * number if is_fine else number
            place_in_range = {"low": min(low, number), "high": max(high, room)}
            controls.append({**control, "place": place, "title": title_of_entry, **place_in_range})
    return controls
