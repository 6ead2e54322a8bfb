"""The refined logits of a case, in storage order: one label in some planes at a time, and arrays when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.arrays.probabilities import over_output_temperature, take_logarithms
from crfrefine.engines.base import MeanFieldReport, MeanFieldResult
from crfrefine.refinement.tiles.grid import MAX_DIMS, TileGrid
from crfrefine.refinement.volumes import matching_bias

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array, Bool, Float32, Labels
    from crfrefine.base.axes import StorageOrder
    from crfrefine.parameters.specs import MeanFieldSpec
    from crfrefine.refinement.tiles.running import RefinedTiles
    from crfrefine.refinement.tiles.sources import OutsideLogits


@dataclass(frozen=True, eq=False)
class NetworkLogits:
    """A network's logits in memory, from which those of voxels that took no part follow."""

    values: Float32  # (L, *grid) logits, or probabilities; they must not change
    is_probability: bool  # whether they are probabilities
    run: MeanFieldSpec  # with the temperature that divides logits, and the bias that is added to them
    box: Box | None  # where labels took part; None: everywhere
    mask: Bool | None  # (*box), True where the model applies; None: everywhere

    def channel(self, label: int, planes: slice, out: Float32 | None = None) -> Float32:
        """Return planes of a label's logits, with its bias inside the mask, over the temperature, in a new array or in `out`."""
        values = self.values[label, planes]
        logits = np.empty(values.shape, np.float32) if out is None else out
        logits[...] = values
        if self.is_probability:
            take_logarithms(logits)
        if self.run.bias is not None:
            ours, of_box = overlap(planes, self.box, logits.shape)
            where = True if self.mask is None else self.mask[of_box]
            np.add(logits[ours], np.float32(self.run.bias[label]), out=logits[ours], where=where)
        if self.run.temperature != 1.0:  # A pass over all labels, which is worth saving.
            logits *= np.float32(1.0) / np.float32(self.run.temperature)
        return logits


class RefinedChannels:
    """The refined logits of a case.

    Attributes:
        num_channels: labels, or regions.
        tiles: those that took part; None means all labels everywhere.
        report: steps, energy and filters.
        timings: seconds of each stage.
    """

    def __init__(
        self,
        found: MeanFieldResult | RefinedTiles,
        grid_shape: tuple[int, ...],
        num_channels: int,
        *,
        network: NetworkLogits | None = None,
        labels: Labels | None = None,
        outside: OutsideLogits | None = None,
        settled_energy: float = 0.0,
    ) -> None:
        """Keep the parts.

        Args:
            found: (channels, *grid), or (channels, *box), or the tiles that took part.
            grid_shape: of the case.
            num_channels: labels, or regions.
            network: logits in memory; None: `found` is the whole grid, or `labels` holds the voxels that took no part.
            labels: (*grid) of tiles whose logits are not in memory: voxels that took no part have theirs.
            outside: the logits outside the mask; None: labels tell them, too.
            settled_energy: energy of the voxels of tiles that took no part.
        """
        self._found, self._shape, self._network, self._outside = found, grid_shape, network, outside
        self.tiles = None if isinstance(found, MeanFieldResult) else found
        self._box = None if network is None else network.box
        self._log_sums: dict[float, Float32] = {}
        self._own = None
        if labels is not None:
            labels.setflags(write=False)  # They are shown to the user, too.
            is_other = self.tiles is not None and self.tiles.is_biased
            own = self.label_map(labels, settled_only=True) if is_other else labels
            self._own = own.reshape(TileGrid.of(grid_shape).shape)
        self.num_channels = num_channels
        report = found.report
        if self.tiles is not None:
            # If every voxel is settled, no step is taken, and the energy is that of the network's output.
            energy = tuple(value + settled_energy for value in report.energy) if self.tiles.sets.num_entries else (settled_energy,)
            report = MeanFieldReport(report.num_iterations, report.converged, energy, report.filters)
        self.report = report
        self.timings = dict(found.timings)

    @property
    def is_array(self) -> bool:
        """Whether the logits are an array already."""
        return self.tiles is None and self._box is None

    @property
    def is_streamed(self) -> bool:
        """Whether neither the network's logits nor the refined ones were ever in memory together."""
        return self._own is not None

    @property
    def marginals(self) -> Float32 | None:
        """The softmax of the whole array, if the engine computed it."""
        return self._found.marginals if isinstance(self._found, MeanFieldResult) and self._box is None else None

    def match_volumes(self, counts: Sequence[int], network: Labels, mask: Bool | None) -> None:
        """Add a bias to each label's refined logits after which the labels have about these numbers of voxels.

        Args:
            counts: of each label, inside the mask.
            network: (*grid) the network's label map.
            mask: (*grid), True where the model applies; None means everywhere.
        """
        inner = () if self._box is None else self._box
        entries: list[tuple[Any, Float32]]
        if isinstance(self._found, MeanFieldResult):
            logits = self._found.logits.reshape(self.num_channels, len(self._found.logits[0]), -1)
            whole = np.ones(self._shape, np.bool_) if mask is None else mask
            inside = whole[inner].reshape(logits.shape[1:])
            matching = matching_bias([(slice(None), channel) for channel in logits], inside, np.array(counts))
            for channel, value in zip(logits, matching, strict=True):
                np.add(channel, np.float32(value), out=channel, where=inside)
            self._found = replace(self._found, marginals=None)
            return
        sets = self._found.sets
        inside = sets.grid.by_tile(self._found.mask, sets.tiles)
        # The voxels of settled tiles keep their label.
        now = self.label_map(network, settled_only=True)[inner].reshape(sets.grid.shape)
        fixed = ~sets.grid.voxels(sets.active)
        if self._found.mask is not None:
            fixed &= self._found.mask
        wanted = np.array(counts) - np.bincount(now[fixed], minlength=self.num_channels)
        entries = []
        for label in range(self.num_channels):
            tiles, own = sets.entries_of(label)
            entries.append((np.searchsorted(sets.tiles, tiles), self._found.values[own]))
        matching = matching_bias(entries, inside, wanted)
        for label, value in enumerate(matching):
            self._found.values[sets.entries_of(label)[1]] += np.float32(value)

    def computed(self) -> Float32:
        """Return the result of the engine."""
        if isinstance(self._found, MeanFieldResult):
            return self._found.logits
        return self._found.values[None] if self._found.sets.num_entries else np.zeros((0, 1), np.float32)

    def label_map(
        self, network: Labels, decode: Callable[[Float32], Labels] | None = None, *, threads: int | None = None, settled_only: bool = False
    ) -> Labels:
        """Return the refined label map, (*grid), from the network's; `decode` turns logits into labels. Tiles have their own way."""
        if self.tiles is None:
            assert decode is not None
            decoded = decode(self.computed())
            if self._box is None:
                return decoded
            labels = network.copy()
            labels[self._box] = decoded
            return labels
        labels = network.copy()
        part = labels if self._box is None else labels[self._box]
        inner = np.ascontiguousarray(part).reshape(self.tiles.sets.grid.shape)
        self.tiles.write_settled(inner)
        if not settled_only:
            self.tiles.decode(inner, threads)
        part[...] = inner.reshape(part.shape)
        return labels

    def channel(self, label: int, planes: slice, out: Float32 | None = None) -> Float32:
        """Return planes of a label's refined logits, which may be in `out`.

        Where a label took no part in a tile, its penalty is taken to be the largest of those that did, since it cannot be smaller; without
        logits in memory it is ABSENT_LOGIT, and 0 where it was the only one. Voxels that took no part have the network's logits over the
        temperature.
        """
        if isinstance(self._found, MeanFieldResult):
            if self._box is None or self._network is None:
                return self._found.logits[label, planes]
            piece = self._network.channel(label, planes, out)
            ours, of_box = overlap(planes, self._box, piece.shape)
            piece[ours] = self._found.logits[label][of_box]
            return piece
        if self._network is None:
            return self._in_labels(label, planes, (0.0, ABSENT_LOGIT), None)
        piece = self._network.channel(label, planes, out)
        ours, of_box = overlap(planes, self._box, piece.shape)
        piece[ours] += self._penalty[of_box]
        refined = self._spread(label)[of_box]
        np.copyto(piece[ours], refined, where=self._inside[of_box] & ~np.isnan(refined))
        return piece

    def probabilities(self, label: int, planes: slice, *, output_temperature: float = 1.0) -> Float32:
        """Return planes of a label's marginals of a streamed case: 1 or 0 where one label took part, and where logits are not known."""
        return self._in_labels(label, planes, (1.0, 0.0), output_temperature)

    def dense(self) -> Float32:
        """Return (channels, *grid) refined logits."""
        if self.is_array:
            return self.computed()
        logits = np.empty((self.num_channels, *self._shape), np.float32)
        for label, channel in enumerate(logits):
            found = self.channel(label, slice(0, self._shape[0]), channel)
            if found is not channel:
                channel[...] = found
        return logits

    def at(self, where: Bool, order: StorageOrder) -> Float32:
        """Return (channels, N) refined logits at the voxels of a mask, (*grid) in the user's order of axes, one label after the other."""
        box = bounding_box(where) or (slice(0, 0),) * where.ndim
        inside, stored = where[box], order.axes_to_storage(box)
        values = np.empty((self.num_channels, int(np.count_nonzero(inside))), np.float32)

        def take(part: Array, start: Sequence[int]) -> Array:
            """Return the values of a part of a channel, which begins at a voxel of the grid, in storage order."""
            there = tuple(slice(axis.start - first, axis.stop - first) for axis, first in zip(stored, start, strict=True))
            return order.to_user(part[there])[inside]

        own = self._box or tuple(slice(0, extent) for extent in self._shape)
        holds_all = all(ours.start <= axis.start and axis.stop <= ours.stop for ours, axis in zip(own, stored, strict=True))
        for label, row in enumerate(values):
            if isinstance(self._found, MeanFieldResult) and holds_all:
                row[:] = take(self._found.logits[label], [axis.start for axis in own])
            else:
                row[:] = take(self.channel(label, stored[0]), [stored[0].start] + [0] * (len(own) - 1))
        return values

    @cached_property
    def _penalty(self) -> Float32:
        """(*box), the largest penalty of the labels that took part in a tile; 0 at voxels that took no part."""
        assert self.tiles is not None
        assert self._network is not None
        penalty = np.zeros(self._box_shape, np.float32)
        planes = slice(0, self._shape[0]) if self._box is None else self._box[0]
        for label in range(self.num_channels):
            channel = self._network.channel(label, planes)
            ours, _ = overlap(planes, self._box, channel.shape)
            values = self._spread(label)
            values -= channel[ours]
            np.fmin(penalty, values, out=penalty)
        penalty[~self._inside] = 0.0
        return penalty

    @cached_property
    def _inside(self) -> Bool:
        """(*box), True at the voxels that took part."""
        assert self.tiles is not None
        inside = self.tiles.sets.grid.voxels(self.tiles.sets.active)
        if self.tiles.mask is not None:
            inside &= self.tiles.mask
        return inside.reshape(self._box_shape)

    @property
    def _box_shape(self) -> tuple[int, ...]:
        return self._shape if self._box is None else tuple(axis.stop - axis.start for axis in self._box)

    def _spread(self, label: int) -> Float32:
        """Return a label's refined logits in the tiles where it took part, (*box); NaN in others."""
        assert self.tiles is not None
        tiles, entries = self.tiles.sets.entries_of(label)
        return self.tiles.sets.grid.spread(tiles, self.tiles.values[entries], np.float32(np.nan)).reshape(self._box_shape)

    def _in_labels(self, label: int, planes: slice, alone: tuple[float, float], output_temperature: float | None) -> Float32:
        """Return planes of a label's probabilities with an output temperature; None for its logits.

        `alone` are the values where it is the only label of a tile, and where another one is.
        """
        assert self._own is not None
        # Planes of a grid of two axes are rows of the only plane of the tiles' grid.
        own = planes if len(self._shape) == MAX_DIMS else slice(0, len(self._own))
        piece = np.where(self._own[own] == label, np.float32(alone[0]), np.float32(alone[1]))
        if self.tiles is not None and self.tiles.sets.num_entries:
            if output_temperature is None:
                self.tiles.write(label, own, piece, absent=ABSENT_LOGIT)
            else:
                sums = self._log_sums_of(output_temperature)

                def to_probabilities(values: Float32, places: NDArray[np.int64]) -> Float32:
                    values = over_output_temperature(values, output_temperature) - sums[places]
                    return np.exp(values, out=values)

                self.tiles.write(label, own, piece, absent=0.0, convert=to_probabilities)
        if self._outside is not None:
            self._outside.write(label, own, piece, output_temperature=output_temperature)
        return piece if own is planes else piece.reshape(self._shape)[planes]

    def _log_sums_of(self, output_temperature: float) -> Float32:
        """(active tiles, voxels of a tile), logarithm of the sum of exp(logit / temperature) of the labels that take part."""
        assert self.tiles is not None
        if output_temperature not in self._log_sums:
            values, starts = self.tiles.values, self.tiles.sets.first_entry[:-1]
            largest = over_output_temperature(np.maximum.reduceat(values, starts, axis=0), output_temperature)
            sums = np.zeros_like(largest)
            counts = np.diff(self.tiles.sets.first_entry)
            for number in range(int(counts.max())):
                some = np.flatnonzero(counts > number)
                sums[some] += np.exp(over_output_temperature(values[starts[some] + number], output_temperature) - largest[some])
            self._log_sums[output_temperature] = largest + np.log(sums)
        return self._log_sums[output_temperature]


def overlap(planes: slice, box: Box | None, shape: tuple[int, ...]) -> tuple[Box, Box]:
    """Return where planes of a grid and a box have voxels in common: in (planes, …) of that shape, and in the box."""
    if box is None:
        return (slice(0, shape[0]), *(slice(None),) * (len(shape) - 1)), (planes, *(slice(None),) * (len(shape) - 1))
    first, last = max(planes.start, box[0].start), min(planes.stop, box[0].stop)
    last = max(first, last)
    inner = slice(first - box[0].start, last - box[0].start)
    return (slice(first - planes.start, last - planes.start), *box[1:]), (inner, *(slice(None),) * (len(box) - 1))
