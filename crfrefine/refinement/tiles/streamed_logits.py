"""The refined case of a volume whose channels were streamed: label maps, and channels plane by plane when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.arrays.output_temperature import over_output_temperature
from crfrefine.refinement.tiles.grid import MOST_DIMS, TILE, TileGrid
from crfrefine.refinement.tiles.run_outcome import RunOutcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.gathering import Selection
    from crfrefine.refinement.tiles.outside import OutsideLogits
    from crfrefine.refinement.tiles.running import RefinedTiles
    from crfrefine.refinement.tiles.settled import SettledLabels


class StreamedLogits(RunOutcome):
    """A refined case; all arrays are in storage order.

    Attributes:
        num_channels: L.
        notes: what the user should know, one sentence each.
        num_padding: voxels in the mask where all logits were equal.
    """

    def __init__(
        self,
        grid_shape: tuple[int, ...],
        num_labels: int,
        labels: NDArray[np.unsignedinteger[Any]],
        mask: NDArray[np.bool_] | None,
        tiles: RefinedTiles | None,
        settled_energy: float,
        notes: tuple[str, ...],
        num_padding: int,
        *,
        settled_labels: SettledLabels | None = None,
        outside: OutsideLogits | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            grid_shape: of the original grid.
            num_labels: L.
            labels: the network's label map on a grid of three axes.
            mask: (*grid), True where the model applies; None: everywhere.
            tiles: what was refined; None: nothing.
            settled_energy: energy of the voxels that took no part.
            notes: what the user should know.
            num_padding: voxels in the mask where all logits were equal.
            settled_labels: of the tiles that took no part; None: the network's.
            outside: the logits outside the mask; None: they are not known, or there is no mask.
        """
        super().__init__(tiles, settled_energy)
        self.num_channels = num_labels
        self.notes = notes
        self.num_padding = num_padding
        self._shape = grid_shape
        self._mask = mask
        self._outside = outside
        self._network = labels
        self._network.setflags(write=False)
        self._log_sums: dict[float, NDArray[np.float32]] = {}
        self._own = labels if settled_labels is None else labels.copy()
        if settled_labels is not None:
            settled_labels.write(self._own)

    @property
    def network_label_map(self) -> NDArray[np.unsignedinteger[Any]]:
        """(*grid), the network's labels."""
        return self._network.reshape(self._shape)

    def label_map(self, threads: int | None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the refined label map, (*grid)."""
        labels = self._own.copy()
        if self._tiles is not None:
            self._tiles.decode(labels, threads)
        return labels.reshape(self._shape)

    def probabilities(self, label: int, planes: slice, *, output_temperature: float = 1.0) -> NDArray[np.float32]:
        """Return planes of a label's marginals: 1 or 0 where one label took part, and where logits outside the mask are not known."""
        return self._piece(label, planes, alone=(1.0, 0.0), output_temperature=output_temperature)

    def logits(self, label: int, planes: slice) -> NDArray[np.float32]:
        """Return planes of a label's refined logits: ABSENT_LOGIT where it took no part, 0 where it was the only one.

        Outside the mask these are the network's over the temperature, if they are known.
        """
        return self._piece(label, planes, alone=(0.0, ABSENT_LOGIT), output_temperature=None)

    def dense(self) -> NDArray[np.float32]:
        """Return (L, *grid) refined logits."""
        everything = slice(0, self._shape[0])
        return np.stack([self.logits(label, everything) for label in range(self.num_channels)])

    def at(self, voxels: Selection) -> NDArray[np.float32]:
        """Return (L, N) refined logits at some voxels; one label's planes at a time are spread out."""
        planes = voxels.storage_box[0]
        inner, _ = voxels.within((planes, *(slice(0, extent) for extent in self._shape[1:])))
        return inner.take_all((self.logits(label, planes) for label in range(self.num_channels)), self.num_channels)

    def _piece(self, label: int, planes: slice, *, alone: tuple[float, float], output_temperature: float | None) -> NDArray[np.float32]:
        """Return planes of a label's probabilities with an output temperature; None: of its logits.

        `alone` are the values where it is the only label of a tile, and where another one is.
        """
        if len(self._shape) == MOST_DIMS:
            return self._on_tiles(label, planes, alone, output_temperature)
        # Planes of a grid of two axes are rows of the only plane of the tiles' grid.
        whole = self._on_tiles(label, slice(0, len(self._own)), alone, output_temperature)
        return whole.reshape(self._shape)[planes]

    def _on_tiles(self, label: int, planes: slice, alone: tuple[float, float], output_temperature: float | None) -> NDArray[np.float32]:
        piece = np.where(self._own[planes] == label, np.float32(alone[0]), np.float32(alone[1]))
        if self._tiles is not None:
            piece = self._refined(label, planes.start, planes.stop, piece, output_temperature)
        if self._outside is not None:
            self._outside.write(label, planes, piece, output_temperature=output_temperature)
        return piece

    def _refined(
        self, label: int, start: int, stop: int, piece: NDArray[np.float32], output_temperature: float | None
    ) -> NDArray[np.float32]:
        """Write what was refined of planes start … stop into their piece."""
        assert self._tiles is not None
        sets = self._tiles.sets
        first, last = start // TILE[0], -(-stop // TILE[0])
        per_row = sets.grid.counts[1] * sets.grid.counts[2]
        shape = (min(last * TILE[0], sets.grid.shape[0]) - first * TILE[0], *sets.grid.shape[1:])
        tiles, entries = sets.entries_of(label)
        begin, end = np.searchsorted(tiles, (first * per_row, last * per_row))
        values = self._tiles.values[entries[begin:end]]
        if output_temperature is not None:
            values = over_output_temperature(values, output_temperature)
            values = np.exp(values - self._log_sums_of(output_temperature)[np.searchsorted(sets.tiles, tiles[begin:end])])
        part = TileGrid.of(shape)
        active = part.voxels(sets.active[first:last])
        spread = part.spread(tiles[begin:end] - first * per_row, values, np.float32(ABSENT_LOGIT if output_temperature is None else 0.0))
        if self._mask is not None:
            active &= self._mask[first * TILE[0] : first * TILE[0] + shape[0]]
        own = slice(start - first * TILE[0], stop - first * TILE[0])
        return np.where(active[own], spread[own], piece)

    def _log_sums_of(self, output_temperature: float) -> NDArray[np.float32]:
        """(active tiles, voxels of a tile), logarithm of the sum of exp(logit / temperature) of the labels that take part."""
        assert self._tiles is not None
        if output_temperature not in self._log_sums:
            values, starts = self._tiles.values, self._tiles.sets.first_entry[:-1]
            largest = over_output_temperature(np.maximum.reduceat(values, starts, axis=0), output_temperature)
            sums = np.zeros_like(largest)
            counts = np.diff(self._tiles.sets.first_entry)
            for number in range(int(counts.max())):
                some = np.flatnonzero(counts > number)
                sums[some] += np.exp(over_output_temperature(values[starts[some] + number], output_temperature) - largest[some])
            self._log_sums[output_temperature] = largest + np.log(sums)
        return self._log_sums[output_temperature]
