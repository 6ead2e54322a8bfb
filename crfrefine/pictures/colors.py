"""Which color a label has in pictures and on the page of `tune`: neighbors do not look alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.array_types import Array
from crfrefine.base.axes import Axes
from crfrefine.base.colors import LABEL_COLORS, difference
from crfrefine.base.limits import MAX_LABEL

Neighbors = dict[int, set[int]]  # the labels near each label

_NEAR = 2  # voxels within which labels are neighbors
_ALIKE = 25.0  # a smaller difference is hard to see on thin lines; larger ones count alike


def choose_colors(neighbors: Neighbors, named: Mapping[int, str] | None = None) -> dict[int, str]:
    """Return the color of each label, ascending, `#rrggbb`.

    It is that of `named`, or else the next of `LABEL_COLORS` for the next label; it is another one
    if a neighbor with a smaller number looks alike. Colors that no label has come first.

    Args:
        neighbors: the labels near each label, as of `labels_nearby`.
        named: colors that a file gives to labels.
    """
    chosen: dict[int, str] = {}
    for label in sorted(neighbors):
        near = [chosen[other] for other in neighbors[label] if other in chosen]
        first = (label - 1) % len(LABEL_COLORS)
        order = [*LABEL_COLORS[first:], *LABEL_COLORS[:first]]
        order.sort(key=lambda color: color in chosen.values())
        if named and label in named:
            order.insert(0, named[label])
        distances = []
        for color in order:
            distances.append(min([_ALIKE, *(difference(color, other) for other in near)]))
        chosen[label] = order[distances.index(max(distances))]
    return chosen


def labels_nearby(maps: Sequence[Array]) -> Neighbors:
    """Return the labels at most _NEAR voxels from each label that occurs, along an axis.

    The maps are (*grid), unsigned; background is left out.
    """
    neighbors: Neighbors = {}
    for label_map in maps:
        for label in foreground_labels(label_map):
            neighbors.setdefault(label, set())
        stored = Axes.of_memory(label_map).apply(label_map)
        for axis in range(stored.ndim):
            for step in range(1, _NEAR + 1):
                lines = (slice(None),) * axis
                before = stored[(*lines, slice(None, -step))]
                after = stored[(*lines, slice(step, None))]
                differs = (before != after) & (before > 0) & (after > 0)
                codes = before[differs].astype(np.int64) * (MAX_LABEL + 1) + after[differs]
                for code in np.unique(codes).tolist():
                    label, other = divmod(code, MAX_LABEL + 1)
                    neighbors[label].add(other)
                    neighbors[other].add(label)
    return neighbors
