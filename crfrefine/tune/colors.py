"""Colors of labels on the page: neighbors in space do not look alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crfrefine.base.array_types import Array
from crfrefine.io.volume import Segment
from crfrefine.pictures.drawing import labels_nearby

# The colors of previews (Okabe & Ito 2008), and those that differ most from all before them among
# bright ones of CIE Lab, by at least 26.
COLORS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2", "#870fff"),
    *("#00ff00", "#ff00c3", "#ff005a", "#9678ff", "#78692d", "#4ba500", "#00ff96", "#ffb496"),
    *("#d2f0a5", "#00ffff", "#a54b3c", "#ff0000", "#a5f000", "#a53ca5", "#c3b4ff", "#f000ff"),
)
_ALIKE = 70  # a smaller distance of two colors, in levels of red, green and blue, is hard to see


def choose_label_colors(
    label_map: Array, num_labels: int, segments: Sequence[Segment]
) -> dict[int, str]:
    """Return the color of each label from 1 to `num_labels` - 1, ascending.

    It is the one that the file names, or else the first of `COLORS`, from that of the label's
    number on, which no neighbor with a smaller number has.
    """
    neighbors = labels_nearby(label_map)
    named = {part.label: part.color for part in segments if part.color is not None}
    chosen: dict[int, str] = {}
    for label in range(1, num_labels):
        near = [_levels(chosen[other]) for other in neighbors.get(label, ()) if other in chosen]
        first = (label - 1) % len(COLORS)
        order = COLORS[first:] + COLORS[:first]
        if label in named:
            levels = [round(255 * share) for share in named[label]]
            order = (f"#{bytes(levels).hex()}", *order)
        chosen[label] = order[0]
        for color in order:
            distances = [np.linalg.norm(_levels(color) - other) for other in near]
            if min(distances, default=np.inf) >= _ALIKE:
                chosen[label] = color
                break
    return chosen


def _levels(color: str) -> Array:
    """Return the red, green and blue of a color, from 0 to 255."""
    return np.array(list(bytes.fromhex(color[1:])))
