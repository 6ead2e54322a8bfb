"""Dense channels of labels, packed into channels that labels share, and back: logits, refined logits, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import Box, widen
from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.parameters.specs import ChannelLabels
from crfrefine.refinement.tiles.grid import TILE, Extents
from crfrefine.refinement.tiles.label_sets import num_rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.refinement.tiles.label_sets import LabelSets
    from crfrefine.refinement.tiles.problem import TileProblem


@dataclass(frozen=True, eq=False)
class _Piece:
    """The tiles where a channel holds a label that takes part."""

    label: int  # the label
    channel: int  # its channel
    box: Box  # the voxels around them
    tiles: Bool  # (*tiles of the grid), True where the label takes part


class Packing:
    """Where each label of each tile is found among the channels.

    Attributes:
        shared: the labels of the channels, for a run.
        mask: (*grid), the voxels that the engine is given: those of tiles with several labels, and of those that they receive from.
    """

    def __init__(self, problem: TileProblem, sets: LabelSets, *, tells_labels: bool) -> None:
        """Plan for the labels of tiles, if at least one tile has several; `tells_labels` is as in `channel_table`."""
        self._sets, self._grid, self._mask = sets, problem.grid, problem.mask
        near = widen(sets.active, num_rings(problem.reach))
        table = channel_table(sets, problem.present, problem.reach, near, tells_labels=tells_labels)
        first = 3 - problem.num_dims
        self.shared = ChannelLabels(TILE[first:], table.reshape(len(table), *problem.grid.counts[first:]))
        inside = self._grid.voxels(near)
        self.mask = (inside if self._mask is None else inside & self._mask).reshape(problem.grid.shape[first:])
        self._pieces = []
        for channel, labels in enumerate(table):
            for label in np.unique(labels[labels >= 0]):
                tiles = (labels == label) & sets.domains[label]
                if tiles.any():
                    self._pieces.append(_Piece(int(label), channel, self._grid.box(tiles), tiles))

    @property
    def num_channels(self) -> int:
        """C."""
        return self.shared.num_channels

    def pack(self, logits: Float32) -> Float32:
        """Return (C, *grid) logits from (L, *grid): ABSENT_LOGIT where a channel holds no label that takes part."""
        return self._packed(logits, ABSENT_LOGIT, ((piece, self._grid.voxels(piece.tiles, piece.box)) for piece in self._pieces))

    def pack_gradient(self, gradient: Float32) -> Float32:
        """Return the gradient with respect to refined channels, (C, *grid), from that of labels: 0 where nothing was refined."""
        return self._packed(gradient, 0.0, self._places())

    def unpack(self, refined: Float32, logits: Float32, temperature: float) -> Float32:
        """Return the refined logits of all labels, (L, *grid), from those of the channels and the network's.

        Where a label took no part among several, its penalty is taken to be the largest of those that did. Elsewhere, the logits are
        divided by the temperature.
        """
        out = logits / np.float32(temperature)
        labels, channels = self._volumes(out), self._volumes(refined)
        penalty = np.zeros(self._grid.shape, np.float32)
        for piece, where in self._places():
            box = piece.box
            np.fmin(penalty[box], channels[piece.channel][box] - labels[piece.label][box], out=penalty[box], where=where)
        labels += penalty
        for piece, where in self._places():
            np.copyto(labels[piece.label][piece.box], channels[piece.channel][piece.box], where=where)
        return out

    def unpack_gradient(self, by_channels: Float32, gradient: Float32, temperature: float) -> Float32:
        """Return the gradient with respect to the network's logits, (L, *grid), from those of packed and of refined logits.

        A refined logit of a label that took no part counts as that label's logit over the temperature, and a constant.
        """
        out = gradient / np.float32(temperature)
        labels, channels = self._volumes(out), self._volumes(by_channels)
        for piece, where in self._places():
            np.copyto(labels[piece.label][piece.box], channels[piece.channel][piece.box], where=where)
        return out

    def entries(self, refined: Float32, threads: int | None) -> Float32:
        """Return the refined channels (C, *grid) as (entries of the label sets, voxels of a tile)."""
        engine, channels = self._grid.engine(threads), self._volumes(refined)
        values = np.empty((self._sets.num_entries, TILE[0] * TILE[1] * TILE[2]), np.float32)
        for piece in self._pieces:
            tiles, entries = self._sets.entries_of(piece.label)
            own = piece.tiles.reshape(-1)[tiles]
            if own.any():
                engine.fill_entries(channels[piece.channel], True, tiles[own], False, entries[own], values)
        return values

    def _packed(self, values: Float32, otherwise: float, places: Iterable[tuple[_Piece, Bool]]) -> Float32:
        out = np.full((self.num_channels, *values.shape[1:]), otherwise, np.float32)
        labels, channels = self._volumes(values), self._volumes(out)
        for piece, where in places:
            np.copyto(channels[piece.channel][piece.box], labels[piece.label][piece.box], where=where)
        return out

    def _places(self) -> Iterator[tuple[_Piece, Bool]]:
        """Yield each piece, and where in its box its label was refined."""
        for piece in self._pieces:
            where = self._grid.voxels(piece.tiles & self._sets.active, piece.box)
            yield piece, where if self._mask is None else where & self._mask[piece.box]

    def _volumes(self, channels: Float32) -> Float32:
        """Return a view of channels (n, *grid) with three grid axes."""
        return channels.reshape(len(channels), *self._grid.shape)


# The table of labels that share channels (`parameters.specs.ChannelLabels`), for engines that know neither tiles nor label sets.

_NEIGHBORS = np.ones((3, 3, 3), np.bool_)


@dataclass(frozen=True, eq=False)
class _Part:
    """A connected part of the tiles that a label needs: the box around it, and in the box where it is heard and where it takes part."""

    label: int
    box: Box
    heard: Bool
    own: Bool


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


def channel_table(sets: LabelSets, present: Bool, reach: Extents, near: Bool, *, tells_labels: bool) -> NDArray[np.int32]:
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

    heard_from = [math.ceil(extent / tile) for extent, tile in zip(reach, TILE, strict=True)]
    parts = []
    for label, own in enumerate(sets.domains):
        if not (own & near).any():
            continue
        arrives = widen(own, heard_from) & widen(present[label], num_rings(reach)) & sets.active
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
