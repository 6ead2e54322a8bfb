"""Colors of labels on the page: neighbors in space do not look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from crfrefine.base.array_types import Array
from crfrefine.base.limits import MAX_LABEL

# The colors of previews (Okabe & Ito 2008), and those that differ most from all before them among
# bright ones of CIE Lab, by at least 26.
COLORS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2", "#870fff"),
    *("#00ff00", "#ff00c3", "#ff005a", "#9678ff", "#78692d", "#4ba500", "#00ff96", "#ffb496"),
    *("#d2f0a5", "#00ffff", "#a54b3c", "#ff0000", "#a5f000", "#a53ca5", "#c3b4ff", "#f000ff"),
)
_REACH = 2  # voxels along an axis within which labels are neighbors
_ALIKE = 70  # a smaller distance of two colors, in levels of red, green and blue, is hard to see


def choose_label_colors(
    label_map: Array, num_labels: int, named: Mapping[int, str]
) -> dict[int, str]:
    """Return the color of each label from 1 to `num_labels` - 1.

    Those that a file names come first. A label without gets the first of `COLORS`, from that of its
    number on, that no neighbor has.
    """
    neighbors = _neighbors(label_map)
    chosen = dict(named)
    for label in range(1, num_labels):
        if label in named:
            continue
        near = [chosen[other] for other in neighbors[label] if other in chosen]
        first = (label - 1) % len(COLORS)
        order = COLORS[first:] + COLORS[:first]
        chosen[label] = next((color for color in order if not _is_near(color, near)), order[0])
    return chosen


def _is_near(color: str, others: list[str]) -> bool:
    """Return whether a color is hard to tell from one of others."""
    levels = np.array([list(bytes.fromhex(name[1:])) for name in (color, *others)])
    distances = np.linalg.norm(levels[1:] - levels[0], axis=1)
    return bool((distances < _ALIKE).any())


def _neighbors(label_map: Array) -> Mapping[int, set[int]]:
    """Return the labels near each label, background left out."""
    neighbors: dict[int, set[int]] = defaultdict(set)
    for axis in range(label_map.ndim):
        lines = label_map.swapaxes(0, axis)
        for step in range(1, _REACH + 1):
            before = lines[:-step]
            after = lines[step:]
            differs = (before != after) & (before > 0) & (after > 0)
            codes = before[differs].astype(np.int64) * (MAX_LABEL + 1) + after[differs]
            for code in np.unique(codes).tolist():
                label, other = divmod(code, MAX_LABEL + 1)
                neighbors[label].add(other)
                neighbors[other].add(label)
    return neighbors
