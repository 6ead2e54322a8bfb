"""The table of labels that share channels (`parameters.specs.ChannelLabels`), for engines that know neither tiles nor label sets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.refinement.tiles.grid import TILE
from crfrefine.refinement.tiles.label_sets import num_rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.grid import Extents
    from crfrefine.refinement.tiles.label_sets import LabelSets

_NEIGHBORS = np.ones((3, 3, 3), np.bool_)

Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """A connected part of the tiles that a label needs: the box around it, and in the box where it is heard and where it takes part."""

    label: int
    box: Box
    heard: NDArray[np.bool_]
    own: NDArray[np.bool_]


class _Channel:
    """A channel that fills with parts."""

    def __init__(self, counts: Extents) -> None:
        self.labels = np.full(counts, -1, np.int32)
        self.is_heard = np.zeros(counts, np.bool_)
        self.is_own = np.zeros(counts, np.bool_)

    def has_room(self, part: _Part, *, tells_labels: bool) -> bool:
        """Return whether no label would be taken for another."""
        if tells_labels:
            return not (self.is_heard[part.box] & part.heard).any()
        return not (self.is_own[part.box] & part.heard).any() and not (self.is_heard[part.box] & part.own).any()

    def add(self, part: _Part) -> None:
        """Take a part."""
        labels = self.labels[part.box]
        labels[part.own | (part.heard & (labels < 0))] = part.label
        self.is_heard[part.box] |= part.heard
        self.is_own[part.box] |= part.own


def channel_table(
    sets: LabelSets, present: NDArray[np.bool_], reach: Extents, near: NDArray[np.bool_], *, tells_labels: bool
) -> NDArray[np.int32]:
    """Spread labels over few channels such that no message is taken for that of another label.

    A label needs its channel where it takes part, and in all active tiles that its messages reach. The background comes last, since the
    engines derive the marginals of the last channel from the others; then the connected parts of the other labels, the largest first,
    each take the last channel that has room for them.

    Args:
        sets: the labels of each tile.
        present: (L, *tiles), where labels are present: messages from farther than twice the reach are negligible.
        reach: voxels along each axis after which every kernel ends.
        near: (*tiles), the tiles that the engine is given.
        tells_labels: whether weights, penalties or their gradients depend on labels; else two labels may be heard in a channel where
            neither takes part.

    Returns:
        (C, *tiles), the label of each channel; -1: none.
    """
    from scipy import ndimage

    first, second, third = (math.ceil(extent / tile) for extent, tile in zip(reach, TILE, strict=True))
    parts = []
    for label, own in enumerate(sets.domains):
        if not (own & near).any():
            continue
        arrives = widen(own, (first, second, third)) & widen(present[label], num_rings(reach)) & sets.active
        heard = (own | arrives) & near
        numbered, count = ndimage.label(heard, structure=_NEIGHBORS)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            inside = numbered[box] == number
            parts.append(_Part(label, box, inside, inside & own[box]))
    channels: list[_Channel] = []
    for part in sorted(parts, key=lambda part: (part.label > 0, -np.count_nonzero(part.heard), part.label)):
        channel = next((channel for channel in channels if channel.has_room(part, tells_labels=tells_labels)), None)
        if channel is None:
            channel = _Channel(sets.grid.counts)
            channels.append(channel)
        channel.add(part)
    return np.stack([channel.labels for channel in reversed(channels)])
