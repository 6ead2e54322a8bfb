"""The refined logits of a case, in storage order.

They are given as planes of a label, and as arrays when these are asked for.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from crfrefine.arrays.label_maps import Box, bounding_box, count_labels, whole_box
from crfrefine.arrays.softmax import (
    log_sums_of_tiles,
    marginal,
    over_output_temperature,
    take_logarithms,
)
from crfrefine.base.array_types import Array, Bool, Float32, Integers, Labels, Shape
from crfrefine.base.axes import Axes
from crfrefine.engines.base import MeanFieldResult
from crfrefine.engines.volumes import matching_bias
from crfrefine.errors import InputError
from crfrefine.parameters.specs import MeanFieldSpec
from crfrefine.refinement.certain import CERTAIN, CertainVoxels
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE, LabelSets, tile_layers

# A volume is missed if it differs by more than so many voxels, and by more than this share.
FEW_VOXELS = 5
MISSED_SHARE = 0.02


class RefinedChannels:
    """The refined logits of a case.

    All labels were refined everywhere (`is_array`), or in the mask's box; or labels took part in
    tiles (`sets`). Voxels and labels that were not refined follow from the network's logits, or
    where these are not in memory (`is_streamed`), from its label map: they are `CERTAIN`.

    Attributes:
        computed: the result of the engine: (channels, *box) logits, or with tiles (1, entries,
            voxels of a tile), the entries of all labels as if they were one channel.
        sets: the labels that took part in tiles; None means all labels everywhere.
        is_array: whether the logits are an array already.
        is_streamed: whether these logits and the network's were never all in memory: those of
            files, or of a label map with many labels.
        marginals: the softmax of the whole array, if the engine computed it.
        num_channels: of labels or regions.
        report: steps, energy and filters.
        timings: seconds of each stage.
        missed_volumes: for each label whose volume was to be kept, and by far could not be: the
            voxels that it should have, and those that it has.
    """

    def __init__(
        self,
        outcome: MeanFieldResult,
        sets: LabelSets | None,
        prepared: Prepared,
        mean_field: MeanFieldSpec,
    ) -> None:
        """Keep the engine's results, and the logits, or labels, of all other voxels."""
        self._shape = prepared.logits.shape[1:]
        self._mean_field = mean_field
        # By temperature, (tiles, voxels of a tile): log sum exp(logit / temperature).
        self._log_sums: dict[float, Float32] = {}
        self.is_streamed = not len(prepared.logits)
        self.num_channels = len(prepared.logits) or mean_field.num_labels
        self.report = outcome.report
        self.timings = dict(outcome.timings)
        self.sets = sets
        self.missed_volumes: dict[int, tuple[int, int]] = {}
        self.marginals: Float32 | None = None
        box = prepared.box
        if sets is not None:
            assert prepared.problem is not None
            assert prepared.largest_sums is not None
            self.computed: Float32 = outcome.logits[None]
            self._mask = prepared.problem.mask  # of the tiles' grid
            self.is_array = False
            # The energy of each step with that of the voxels of settled tiles. If every voxel is
            # settled, no step is taken, and the energy is that of the network's output.
            settled = -float(prepared.largest_sums[~sets.active].sum())
            of_steps = outcome.report.energy if sets.num_entries else (0.0,)
            energy = tuple(value + settled for value in of_steps)
            self.report = outcome.report._replace(energy=energy)
        else:
            self.computed = outcome.logits
            self._mask = None
            self.is_array = box is None
            if self.is_array:
                self.marginals = outcome.marginals
        self._box = box or whole_box(self._shape)

        # The network's logits, or probabilities, (L, *grid), which must not change, and their
        # checksum if a caller may do that.
        self._network: Float32 | None = None
        self._checksum: int | None = None
        if not self.is_array and not self.is_streamed:
            self._network = prepared.logits
        self._is_probability = prepared.is_probability
        if self.is_streamed:
            assert prepared.labels is not None
            prepared.labels.setflags(write=False)  # The result shows them to the user, too.
            self._labels = self._with_settled_labels(prepared.labels)

    def settle(self, prepared: Prepared, case: CaseToRefine) -> None:
        """Make voxels certain that no mean field decides, once the label map is made."""
        self._certain = certain = CertainVoxels(prepared, case)
        if not (certain.are_any and self.is_array):
            return
        if np.may_share_memory(self.computed, prepared.logits):
            self.computed = self.computed.copy()
        planes = slice(0, self._shape[0])
        for label, channel in enumerate(self.computed):
            certain.write(channel, label, planes, "logits")
        if self.marginals is not None:
            for label, channel in enumerate(self.marginals):
                certain.write(channel, label, planes, "probabilities")

    def watch(self, given: Array) -> None:
        """Remember a checksum of the network's values if they are those of a caller's array."""
        if self._network is not None and np.may_share_memory(self._network, given):
            self._checksum = _checksum_of(self._network)

    def require_unchanged(self) -> None:
        """Raise InputError if the caller has changed the network's values since `watch`."""
        if self._network is None or self._checksum is None:
            return
        if _checksum_of(self._network) != self._checksum:
            raise InputError(
                "the array of logits was changed after it was refined, and the logits and "
                "marginals of a result are partly made from it when they are asked for; ask for "
                "them before you change it, or give `refine` a copy"
            )

    def match_volumes(self, network: Labels, prepared: Prepared) -> Integers | None:
        """Add a bias to each label's refined logits, which gives labels the network's volumes.

        They have the voxels of the network's label map, and those gained by strokes. Return these
        volumes, (L,), if a bias would have to be larger than it may be; otherwise None.
        """
        mask = prepared.mask
        counted = network if mask is None else network[mask]
        counts = np.array(count_labels(counted, self.num_channels))
        if prepared.gained is not None:
            counts = np.maximum(counts + prepared.gained, 0)
        sets = self.sets
        if sets is None:
            logits = self.computed.reshape(self.num_channels, len(self.computed[0]), -1)
            inside = mask
            if inside is None:
                inside = np.ones(self._shape, np.bool_)
            inside = inside[self._box].reshape(logits.shape[1:])
            channels = [(slice(None), channel) for channel in logits]
            biases, is_limited = matching_bias(channels, inside, counts)
            for channel, bias in zip(logits, biases, strict=True):
                np.add(channel, np.float32(bias), out=channel, where=inside)
            self.marginals = None
            return counts if is_limited.any() else None

        # The voxels of settled tiles keep their label.
        is_settled = ~sets.grid.to_voxels(sets.active)
        if self._mask is not None:
            is_settled &= self._mask
        labels = self._with_settled_labels(network)[self._box].reshape(sets.grid.shape)
        settled = np.bincount(labels[is_settled], minlength=self.num_channels)
        (values,) = self.computed
        members = []
        for tiles, entries in sets.entries:
            members.append((np.searchsorted(sets.tiles, tiles), values[entries]))
        inside = sets.voxels_inside(self._mask)
        biases, is_limited = matching_bias(members, inside, counts - settled)
        for (_, entries), bias in zip(sets.entries, biases, strict=True):
            values[entries] += np.float32(bias)
        return counts if is_limited.any() else None

    def label_maps(self, prepared: Prepared, case: CaseToRefine) -> tuple[Labels, Labels]:
        """Return the network's label map and the refined one.

        If volumes are kept, the refined logits get a bias for that first. Voxels that were not
        refined keep the network's label.
        """
        network = prepared.labels
        if network is None:
            network = case.decode(prepared.logits)
        wanted = None
        if case.parameters.volume.match_input:
            wanted = self.match_volumes(network, prepared)
        if self.is_array:
            labels = case.decode(self.computed)
        else:
            labels = self._with_settled_labels(network).copy()
            part = labels[self._box]
            if self.sets is None:
                part[...] = case.decode(self.computed)
            elif self.sets.num_entries:
                inner = np.ascontiguousarray(part).reshape(self.sets.grid.shape)
                engine = self.sets.engine(self._mask, case.context.threads)
                engine.decode(self.computed[0], inner)
                part[...] = inner.reshape(part.shape)
        if case.model.kernels.network_spacing is not None and prepared.mask is not None:
            # The largest share may be that of another label.
            labels = np.where(prepared.mask, labels, network)
        if wanted is not None:
            counted = labels if prepared.mask is None else labels[prepared.mask]
            found = count_labels(counted, len(wanted))
            for label in range(1, len(wanted)):  # Background gets the rest.
                voxels = int(wanted[label])
                if abs(found[label] - voxels) > max(FEW_VOXELS, MISSED_SHARE * voxels):
                    self.missed_volumes[label] = (voxels, found[label])
        return network, labels

    def _with_settled_labels(self, network: Labels) -> Labels:
        """Return the network's labels, and in settled tiles the label that a bias leaves there."""
        if self.sets is None or self._mean_field.bias is None:
            return network
        labels = network.copy()
        grid = self.sets.grid
        part = labels[self._box]
        by_tile = self.sets.settled
        where = grid.to_voxels(by_tile >= 0)
        if self._mask is not None:
            where &= self._mask
        settled = grid.to_voxels(by_tile.clip(0).astype(labels.dtype))
        np.copyto(part, settled.reshape(part.shape), where=where.reshape(part.shape))
        return labels

    def channel(
        self, label: int, planes: slice, output_temperature: float | None = None
    ) -> Float32:
        """Return planes of a label's refined logits.

        With an output temperature they are its marginals, which only a streamed case has plane by
        plane.
        """
        if self.is_array:
            return self.computed[label, planes]
        kind = "logits" if output_temperature is None else "probabilities"
        single, absent = CERTAIN[kind]
        if self._network is None:
            is_label = self._labels[planes] == label
            piece = np.where(is_label, np.float32(single), np.float32(absent))
        else:
            piece = self._network_channel(label, planes)
        in_piece, of_box = self._overlap(planes)
        part = piece[in_piece]
        if self.sets is None:
            part[...] = self.computed[label, of_box]
        else:
            refined, where = self._planes_on_tiles(label, of_box, output_temperature)
            # Where a label took no part in a tile, its penalty is the largest of those that did.
            if self._network is None:
                np.copyto(part, absent, where=where)
            else:
                part += self._penalty[of_box]
            where &= ~np.isnan(refined)
            np.copyto(part, refined, where=where)
        self._certain.write(piece, label, planes, kind)
        return piece

    def _network_channel(self, label: int, planes: slice) -> Float32:
        """Return a copy of a label's logits over the temperature, with the bias on tiles."""
        assert self._network is not None
        values = self._network[label, planes]
        logits: Float32 = np.array(values, np.float32, order="C")
        if self._is_probability:
            take_logarithms(logits)
        mean_field = self._mean_field
        if self.sets is not None and mean_field.bias is not None:
            in_piece, of_box = self._overlap(planes)
            part = logits[in_piece]
            inside: Bool | bool = True
            if self._mask is not None:
                mask = self._mask.reshape(self._box_shape)
                inside = mask[of_box]
            bias = np.float32(mean_field.bias[label])
            np.add(part, bias, out=part, where=inside)
        if mean_field.temperature != 1.0:  # A pass over all labels, which is worth saving.
            logits *= np.float32(1.0) / np.float32(mean_field.temperature)
        return logits

    def _overlap(self, planes: slice) -> tuple[Box, slice]:
        """Return the voxels that planes of the grid and the box have in common.

        They are a box in an array of these planes, and planes of the box.
        """
        along, *others = self._box
        first = max(planes.start, along.start)
        last = max(first, min(planes.stop, along.stop))
        in_planes = slice(first - planes.start, last - planes.start)
        return (in_planes, *others), slice(first - along.start, last - along.start)

    @property
    def _box_shape(self) -> Shape:
        """Voxels along each axis of the box."""
        return tuple(axis.stop - axis.start for axis in self._box)

    def dense(self) -> Float32:
        """Return (channels, *grid) refined logits; errors are those of `require_unchanged`."""
        if self.is_array:
            return self.computed
        self.require_unchanged()
        logits = np.empty((self.num_channels, *self._shape), np.float32)
        for label, channel in enumerate(logits):
            channel[...] = self.channel(label, slice(0, self._shape[0]))
        return logits

    def at(self, where: Bool, order: Axes) -> Float32:
        """Return (channels, N) refined logits at the voxels of a mask, one label after the other.

        The mask is (*grid) in the user's order of axes. Errors are those of `require_unchanged`.
        """
        self.require_unchanged()
        box = bounding_box(where) or (slice(0, 0),) * where.ndim
        planes, *others = order.along(box)
        inside = where[box]
        num_voxels = int(np.count_nonzero(inside))
        values = np.empty((self.num_channels, num_voxels), np.float32)
        for label, row in enumerate(values):
            logits = self.channel(label, planes)[(slice(None), *others)]
            row[:] = order.undo(logits)[inside]
            del logits  # The next channel takes its memory.
        return values

    @cached_property
    def _penalty(self) -> Float32:
        """(*box), the largest penalty of labels that took part in a tile; 0 where none did."""
        penalty = np.zeros((), np.float32)
        where = np.zeros((), np.bool_)
        planes = self._box[0]
        in_planes, of_box = self._overlap(planes)
        for label in range(self.num_channels):
            refined, where = self._planes_on_tiles(label, of_box)
            network = self._network_channel(label, planes)[in_planes]
            penalty = np.fmin(penalty, refined - network)
        return np.where(where, penalty, np.float32(0.0))

    def _planes_on_tiles(
        self, label: int, planes: slice, output_temperature: float | None = None
    ) -> tuple[Float32, Bool]:
        """Return planes of a label's refined logits in the box, and the voxels that took part.

        The logits are NaN in tiles where the label took no part; with an output temperature they
        are probabilities.
        """
        sets = self.sets
        assert sets is not None
        # Planes of a grid of two axes are rows of the only plane of the tiles' grid.
        layers = tile_layers(planes if len(self._shape) == MAX_DIMS else slice(0, 1))
        first = layers.start * TILE[0]
        grid = sets.grid
        last = min(layers.stop * TILE[0], grid.shape[0])
        part = grid.with_planes(slice(first, last))
        tiles, entries = sets.entries[label]
        tiles_of_part = grid.tiles_in(slice(first, last))
        start, stop = np.searchsorted(tiles, [tiles_of_part.start, tiles_of_part.stop])
        tiles = tiles[start:stop]
        values = self.computed[0, entries[start:stop]]
        if output_temperature is not None and len(values):
            if output_temperature not in self._log_sums:
                sums = log_sums_of_tiles(self.computed[0], sets.first_entry, output_temperature)
                self._log_sums[output_temperature] = sums
            places = np.searchsorted(sets.tiles, tiles)
            scaled = over_output_temperature(values, output_temperature)
            values = marginal(scaled, self._log_sums[output_temperature][places])

        refined = part.scatter(tiles - tiles_of_part.start, values)
        where = part.to_voxels(sets.active[layers])
        if self._mask is not None:
            where &= self._mask[first:last]
        shape = (-1, *self._box_shape[1:])
        inside = slice(planes.start - first, planes.stop - first)
        return refined.reshape(shape)[inside], where.reshape(shape)[inside]


def _checksum_of(channels: Float32) -> int:
    """Return the checksum of (channels, *grid) values."""
    from isal import isal_zlib

    checksum = 0
    for channel in channels:
        checksum = isal_zlib.crc32(np.ascontiguousarray(channel), checksum)
    return checksum
