"""The refined logits of a case, in storage order: one label in some planes at a time, and arrays when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, Box, bounding_box
from crfrefine.arrays.probabilities import over_output_temperature, take_logarithms
from crfrefine.base.array_types import Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.engines.base import MeanFieldResult
from crfrefine.parameters.specs import MeanFieldSpec
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE, TileGrid
from crfrefine.refinement.tiles.running import RefinedTiles
from crfrefine.refinement.volumes import matching_bias

if TYPE_CHECKING:
    from crfrefine.refinement.networks import Prepared


class RefinedChannels:
    """The refined logits of a case.

    `tiles` are those that took part; None means all labels everywhere. `computed` is the result of
    the engine: logits, or (1, entries, voxels of a tile) those of the tiles. `is_array` tells
    whether the logits are an array already, `is_streamed` whether they and the network's were never
    all in memory. `marginals` is the softmax of the whole array, if the engine computed it.
    """

    def __init__(
        self, outcome: MeanFieldResult | RefinedTiles, prepared: Prepared, run: MeanFieldSpec
    ) -> None:
        """Keep what the engine made of a prepared case, and the logits, or labels, of voxels that took no part."""
        plan = prepared.plan
        self._shape = prepared.logits.shape[1:]
        self._run = run
        self.tiles = outcome if isinstance(outcome, RefinedTiles) else None
        self.computed: Float32 = (
            outcome.values[None] if isinstance(outcome, RefinedTiles) else outcome.logits
        )
        box = prepared.box if plan is None else plan.box
        self._box = box or tuple(slice(0, extent) for extent in self._shape)
        self._mask = None if plan is None else plan.problem.mask  # of the tiles' grid
        self.is_array = plan is None and box is None
        self.is_streamed = not len(prepared.logits)
        if isinstance(outcome, MeanFieldResult) and self.is_array:
            self.marginals = outcome.marginals
        else:
            self.marginals = None
        self.num_channels = len(prepared.logits) or run.num_labels
        # The network's logits, or probabilities, (L, *grid), which must not change.
        self._network = None if self.is_array or self.is_streamed else prepared.logits
        self._is_probability = prepared.is_probability
        self.report = outcome.report
        self.timings = dict(outcome.timings)
        self._log_sums: dict[float, Float32] = {}
        if plan is not None and self.tiles is not None:
            # If every voxel is settled, no step is taken, and the energy is that of the network's
            # output.
            settled = -float(plan.best[~self.tiles.sets.active].sum())
            sets = self.tiles.sets
            if sets.num_entries:
                energy = tuple(value + settled for value in outcome.report.energy)
            else:
                energy = (settled,)
            self.report = replace(outcome.report, energy=energy)
        if plan is not None and self.is_streamed:
            assert plan.labels is not None
            plan.labels.setflags(write=False)  # They are shown to the user, too.
            self._labels = self._settled(plan.labels)

    def match_volumes(self, counts: NDArray[np.int64], network: Labels, mask: Bool | None) -> None:
        """Add a bias to each label's refined logits after which the labels have about these numbers of voxels."""
        # The (L,) counts are those inside the (*grid) mask; `network` is the network's label map.
        if self.tiles is None:
            logits = self.computed.reshape(self.num_channels, len(self.computed[0]), -1)
            inside = (np.ones(self._shape, np.bool_) if mask is None else mask)[self._box].reshape(
                logits.shape[1:]
            )
            biases = matching_bias([(slice(None), channel) for channel in logits], inside, counts)
            for channel, bias in zip(logits, biases, strict=True):
                np.add(channel, np.float32(bias), out=channel, where=inside)
            self.marginals = None
            return
        sets = self.tiles.sets
        values = self.tiles.values
        # The voxels of settled tiles keep their label.
        fixed = ~sets.grid.voxels(sets.active)
        if self._mask is not None:
            fixed &= self._mask
        settled = self._settled(network)[self._box].reshape(sets.grid.shape)[fixed]
        wanted = counts - np.bincount(settled, minlength=self.num_channels)
        entries = [(np.searchsorted(sets.tiles, tiles), values[own]) for tiles, own in sets.entries]
        biases = matching_bias(entries, sets.grid.by_tile(self._mask, sets.tiles), wanted)
        for (_, own), bias in zip(sets.entries, biases, strict=True):
            values[own] += np.float32(bias)

    def label_map(
        self, network: Labels, decode: Callable[[Float32], Labels], *, threads: int | None = None
    ) -> Labels:
        """Return the refined label map, (*grid), of what is no array, from the network's.

        `decode` turns logits into labels.
        """
        labels = self._settled(network).copy()
        part = labels[self._box]
        if self.tiles is None:
            part[...] = decode(self.computed)
        elif self.tiles.sets.num_entries:
            inner = np.ascontiguousarray(part).reshape(self.tiles.sets.grid.shape)
            self.tiles.sets.engine(self._mask, threads).decode(self.tiles.values, inner)
            part[...] = inner.reshape(part.shape)
        return labels

    def _settled(self, network: Labels) -> Labels:
        """Return the network's label map with the only label of each settled tile, which a bias may have chosen."""
        if self.tiles is None or self._run.bias is None:
            return network
        labels = network.copy()
        grid = self.tiles.sets.grid
        mask = self._mask
        part = labels[self._box]
        inner = np.ascontiguousarray(part).reshape(grid.shape)
        for row, start in enumerate(range(0, grid.shape[0], TILE[0])):
            planes = inner[start : start + TILE[0]]
            only = TileGrid(planes.shape).voxels(self.tiles.sets.settled[row : row + 1])
            where = only >= 0 if mask is None else (only >= 0) & mask[start : start + TILE[0]]
            np.copyto(planes, only.astype(labels.dtype), where=where)
        part[...] = inner.reshape(part.shape)
        return labels

    def channel(self, label: int, planes: slice) -> Float32:
        """Return planes of a label's refined logits."""
        # Where a label took no part in a tile, its penalty is the largest of those that did;
        # without logits in memory it is ABSENT_LOGIT, and 0 where it was the only one.
        if self.is_array:
            return self.computed[label, planes]
        if self._network is None:
            return self._streamed(label, planes, 0.0, ABSENT_LOGIT)
        piece = self._network_channel(label, planes)
        ours, of_box = overlap(planes, self._box)
        if self.tiles is None:
            piece[ours] = self.computed[label, of_box]
            return piece
        refined, where = self._spread(label, of_box)
        piece[ours] += self._penalty[of_box]
        np.copyto(piece[ours], refined, where=where & ~np.isnan(refined))
        return piece

    def _network_channel(self, label: int, planes: slice) -> Float32:
        """Return planes of a label's network logits, with its bias inside the mask, over the temperature, in a new array."""
        assert self._network is not None
        logits: Float32 = np.array(self._network[label, planes], np.float32, order="C")
        if self._is_probability:
            take_logarithms(logits)
        if self.tiles is not None and self._run.bias is not None:
            ours, of_box = overlap(planes, self._box)
            part = logits[ours]
            inside = True if self._mask is None else self._mask.reshape(self._box_shape)[of_box]
            np.add(part, np.float32(self._run.bias[label]), out=part, where=inside)
        if self._run.temperature != 1.0:  # A pass over all labels, which is worth saving.
            logits *= np.float32(1.0) / np.float32(self._run.temperature)
        return logits

    @property
    def _box_shape(self) -> tuple[int, ...]:
        return tuple(axis.stop - axis.start for axis in self._box)

    def probabilities(
        self, label: int, planes: slice, *, output_temperature: float = 1.0
    ) -> Float32:
        """Return planes of a label's marginals of a streamed case: 1 or 0 where one label took part, and outside the mask."""
        return self._streamed(label, planes, 1.0, 0.0, output_temperature)

    def dense(self) -> Float32:
        """Return (channels, *grid) refined logits."""
        if self.is_array:
            return self.computed
        logits = np.empty((self.num_channels, *self._shape), np.float32)
        for label, channel in enumerate(logits):
            channel[...] = self.channel(label, slice(0, self._shape[0]))
        return logits

    def at(self, where: Bool, order: StorageOrder) -> Float32:
        """Return (channels, N) refined logits at the voxels of a mask, (*grid) in the user's order of axes, one label after the other."""
        box = bounding_box(where) or (slice(0, 0),) * where.ndim
        planes, *others = (box[axis] for axis in order.axes)
        inside = where[box]
        values = np.empty((self.num_channels, int(np.count_nonzero(inside))), np.float32)
        for label, row in enumerate(values):
            row[:] = order.to_user(self.channel(label, planes)[(slice(None), *others)])[inside]
        return values

    def _streamed(
        self,
        label: int,
        planes: slice,
        only: float,
        absent: float,
        output_temperature: float | None = None,
    ) -> Float32:
        """Return planes of a label's logits, or probabilities: `only` where it is the single label, `absent` where it took no part."""
        piece = np.where(self._labels[planes] == label, np.float32(only), np.float32(absent))
        refined, where = self._spread(label, planes, output_temperature)
        np.copyto(piece, np.where(np.isnan(refined), np.float32(absent), refined), where=where)
        return piece

    @cached_property
    def _penalty(self) -> Float32:
        """(*box), the largest penalty of the labels that took part in a tile.

        0 at voxels that took no part.
        """
        penalty = np.zeros((), np.float32)
        where = np.zeros((), np.bool_)
        ours, of_box = overlap(self._box[0], self._box)
        for label in range(self.num_channels):
            refined, where = self._spread(label, of_box)
            penalty = np.fmin(penalty, refined - self._network_channel(label, self._box[0])[ours])
        return np.where(where, penalty, np.float32(0.0))

    def _spread(
        self, label: int, planes: slice, output_temperature: float | None = None
    ) -> tuple[Float32, Bool]:
        """Return planes of the box: a label's refined logits, NaN in tiles where it took no part, and the voxels where labels took part."""
        # With an output temperature the values are probabilities.
        assert self.tiles is not None
        sets = self.tiles.sets
        mask = self._mask
        # Planes of a grid of two axes are rows of the only plane of the tiles' grid.
        own = planes if len(self._shape) == MAX_DIMS else slice(0, 1)
        rows = slice(own.start // TILE[0], -(-own.stop // TILE[0]))
        first = rows.start * TILE[0]
        last = min(rows.stop * TILE[0], sets.grid.shape[0])
        part = TileGrid((last - first, *sets.grid.shape[1:]))
        start = sets.grid.first_tile(first)
        tiles, entries = sets.entries[label]
        inner = slice(*np.searchsorted(tiles, [start, start + part.num_tiles]))
        values = self.tiles.values[entries[inner]]
        if output_temperature is not None and len(values):
            sums = self._log_sums_of(output_temperature)[np.searchsorted(sets.tiles, tiles[inner])]
            values = np.exp(over_output_temperature(values, output_temperature) - sums)
        refined = part.spread(tiles[inner] - start, values)
        where = part.voxels(sets.active[rows])
        if mask is not None:
            where &= mask[first:last]
        if own is planes:
            inside = slice(own.start - first, own.stop - first)
            return refined[inside], where[inside]
        return refined.reshape(self._box_shape)[planes], where.reshape(self._box_shape)[planes]

    def _log_sums_of(self, output_temperature: float) -> Float32:
        """(active tiles, voxels of a tile), logarithm of the sum of exp(logit / temperature) of the labels that take part."""
        assert self.tiles is not None
        if output_temperature not in self._log_sums:
            values = self.tiles.values
            starts = self.tiles.sets.first_entry[:-1]
            largest = over_output_temperature(
                np.maximum.reduceat(values, starts, axis=0), output_temperature
            )
            sums = np.zeros_like(largest)
            counts = np.diff(self.tiles.sets.first_entry)
            for number in range(int(counts.max())):
                some = np.flatnonzero(counts > number)
                sums[some] += np.exp(
                    over_output_temperature(values[starts[some] + number], output_temperature)
                    - largest[some]
                )
            self._log_sums[output_temperature] = largest + np.log(sums)
        return self._log_sums[output_temperature]


def overlap(planes: slice, box: Box) -> tuple[Box, slice]:
    """Return where planes of a grid and a box have voxels in common: in an array of these planes, and in planes of the box."""
    first = max(planes.start, box[0].start)
    last = max(first, min(planes.stop, box[0].stop))
    return (slice(first - planes.start, last - planes.start), *box[1:]), slice(
        first - box[0].start, last - box[0].start
    )
