"""Channels that labels share: for filters that take dense channels of a whole volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.grid import Extents
    from crfrefine.refinement.tiles.label_sets import LabelSets


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel of each label in each tile.

    Attributes:
        count: number of channels.
        of_entry: (entries) int32.
        of_settled: (*tiles) int32, of a settled tile's label; -1: the tile is not settled.
    """

    count: int
    of_entry: NDArray[np.int32]
    of_settled: NDArray[np.int32]


def share_channels(sets: LabelSets, rings: Extents) -> Channels:
    """Spread labels over as few channels as a simple rule finds: labels share one where no message of one can reach the other's domain.

    Parts of a domain that messages can cross between stay together. The parts of all domains, the largest first, each take the first
    channel in which no other label is within reach.

    Args:
        sets: the labels of each tile.
        rings: tiles that messages can cross along each axis.
    """
    from scipy import ndimage

    parts = []
    neighbors = np.ones((3, 3, 3), np.bool_)
    for label, tiles in enumerate(sets.domains):
        numbered, count = ndimage.label(widen(tiles, rings), structure=neighbors)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            around = numbered[box] == number
            inside = around & tiles[box]
            parts.append((-int(np.count_nonzero(inside)), label, number, box, around, inside))
    channels: list[NDArray[np.int32]] = []
    for _, label, _, box, around, inside in sorted(parts, key=lambda part: part[:3]):
        for channel in channels:
            held = channel[box][around]
            if ((held < 0) | (held == label)).all():
                break
        else:
            channel = np.full(sets.grid.counts, -1, np.int32)
            channels.append(channel)
        channel[box][inside] = label
    of_entry = np.empty(sets.num_entries, np.int32)
    of_settled = np.full(sets.grid.counts, -1, np.int32)
    for number, channel in enumerate(channels):
        of_settled[(sets.settled >= 0) & (channel == sets.settled)] = number
        for label in np.unique(channel[sets.active & (channel >= 0)]):
            tiles, entries = sets.entries_of(int(label))
            of_entry[entries[channel.flat[tiles] == label]] = number
    return Channels(len(channels), of_entry, of_settled)
