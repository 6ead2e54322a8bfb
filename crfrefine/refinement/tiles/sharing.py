"""Labels that share the channels of a filter, as no message of one can reach another's domain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import widen
from crfrefine.base.array_types import Bool
from crfrefine.refinement.tiles.grid import Extents, LabelSets
from crfrefine.refinement.tiles.work import GROUP


def share_channels(
    sets: LabelSets, rings: Extents
) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """Spread labels over as few channels as a simple rule finds.

    Return the number of channels, the channel of each entry, and that of the label of each settled
    tile, (*tiles), or -1.

    Labels share a channel where no message of one can reach the other's domain. Parts of a domain
    that messages can cross between, over so many rings of tiles, stay together. The parts of all
    domains, the largest first, each take the first channel in which no other label is within reach.
    """
    from scipy import ndimage

    neighbors = np.ones((3, 3, 3), np.bool_)
    # The label of each part, its box of tiles, and (*box): the tiles that its messages reach, and
    # the part itself.
    parts = []
    for label, domain in enumerate(sets.domains):
        reached = widen(domain, rings)
        numbered, count = ndimage.label(reached, structure=neighbors)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            around = numbered[box] == number
            inside = around & domain[box]
            parts.append((label, box, around, inside))

    channels: list[NDArray[np.int32]] = []
    counts = sets.grid.counts
    parts.sort(key=lambda part: -np.count_nonzero(part[-1]))
    for label, box, around, inside in parts:
        for channel in channels:
            labels = channel[box][around]
            if ((labels < 0) | (labels == label)).all():
                break
        else:
            channel = np.full(counts, -1, np.int32)
            channels.append(channel)
        channel[box][inside] = label
    channels = _grouped(channels, sets.active)

    of_entry = np.empty(sets.num_entries, np.int32)
    of_settled = np.full(counts, -1, np.int32)
    for number, channel in enumerate(channels):
        is_here = (sets.settled >= 0) & (channel == sets.settled)
        of_settled[is_here] = number
        for label in np.unique(channel[sets.active & (channel >= 0)]):
            tiles, entries = sets.entries[label]
            is_here = channel.flat[tiles] == label
            of_entry[entries[is_here]] = number
    return len(channels), of_entry, of_settled


def _grouped(channels: list[NDArray[np.int32]], active: Bool) -> list[NDArray[np.int32]]:
    """Return the channels in an order in which groups have labels in the same tiles.

    Channels of a group are filtered together, wherever one of their labels is. The last channel,
    which takes part in all groups, stays: few tiles have it.
    """
    tiles = [np.flatnonzero(active & (channel >= 0)) for channel in channels[:-1]]
    left = list(range(len(tiles)))
    grouped: list[NDArray[np.int32]] = []
    while left:
        if len(grouped) % GROUP == 0:  # A group begins.
            in_group = np.zeros(active.size, np.bool_)
        shared = [np.count_nonzero(in_group[tiles[number]]) for number in left]
        number = left.pop(int(np.argmax(shared)))
        in_group[tiles[number]] = True
        grouped.append(channels[number])
    return grouped + channels[-1:]
