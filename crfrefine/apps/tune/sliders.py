"""Which parameters the page has sliders for, and their ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.parameters.model import CrfParameters

MAX_ENTRIES = 8
"""Longest list that gets a slider for each of its values; longer ones are only in the text."""

# Title, lowest value, highest value, whether the slider is finer at its low end, and unit.
_KERNEL = {
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


def describe_controls(parameters: CrfParameters, modalities: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return a control for each number: key, place in a list or None, value, title, low, high, is_fine and unit."""
    names = {"weight": labels, "theta_beta": modalities, "theta_alpha": "xyz", "theta_gamma": "xyz"}
    controls = []
    sections: dict[str, Any] = {"spatial": parameters.spatial, "volume": parameters.volume, "mean_field": parameters.mean_field}
    shown = dict(_OTHERS)
    for index, kernel in reversed(list(enumerate(parameters.bilateral))):
        prefix, number = (f"bilateral.{index}", f" {index + 1}") if len(parameters.bilateral) > 1 else ("bilateral", "")
        sections[prefix] = kernel
        shown = {f"{prefix}.{entry}": (slider[0] + number, *slider[1:]) for entry, slider in _KERNEL.items()} | shown
    for key, (title, low, high, is_fine, unit) in shown.items():
        section, _, entry = key.rpartition(".")
        value = getattr(sections[section], entry)
        values = value if isinstance(value, tuple) else (value,)
        for place, number in enumerate(values if len(values) <= MAX_ENTRIES else ()):
            of_list = dict(enumerate(names.get(entry, ()))).get(place, place)
            controls.append(
                {
                    "key": key,
                    "place": place if isinstance(value, tuple) else None,
                    "value": value,
                    "title": f"{title} ({of_list})" if isinstance(value, tuple) else title,
                    "low": min(low, number),
                    "high": max(high, 4 * number if is_fine else number),
                    "is_fine": is_fine,
                    "is_whole": isinstance(low, int),
                    "unit": "voxels" if unit == "mm" and parameters.mean_field.positions == "voxels" else unit,
                }
            )
    return controls
