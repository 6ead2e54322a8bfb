"""Refined logits of a case as they come from tiles: label maps at once, arrays of all labels when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.engines.base import MeanFieldReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.specs import MeanFieldSpec
    from crfrefine.tiles.running import RefinedTiles
    from crfrefine.tiles.settled import SettledLabels
    from crfrefine.tiles.sources import DenseChannels


class TiledLogits:
    """The refined logits of a case whose network's logits are in memory, in storage order."""

    def __init__(
        self,
        source: DenseChannels,
        run: MeanFieldSpec,
        mask: NDArray[np.bool_] | None,
        tiles: RefinedTiles | None,
        settled_energy: float,
        grid_shape: tuple[int, ...],
        threads: int | None = None,
        *,
        settled_labels: SettledLabels | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            source: the network's logits; they must not change.
            run: with the temperature that they are divided by, and the bias that is added to them.
            mask: (*box of the source), True where the model applies; None: everywhere.
            tiles: what was refined; None: nothing, every voxel was settled.
            settled_energy: energy of the voxels that took no part.
            grid_shape: of the original grid, whose axes may be fewer than those of the source.
            threads: for decoding; None: the cores this process may use.
            settled_labels: of the tiles that took no part; None: the network's.
        """
        self._source = source
        self._run = run
        self._settled_labels = settled_labels
        self._mask = mask
        self._tiles = tiles
        self._settled_energy = settled_energy
        self._grid_shape = grid_shape
        self._threads = threads

    @property
    def num_channels(self) -> int:
        """L."""
        return len(self._source.values)

    @property
    def report(self) -> MeanFieldReport:
        """Steps, energy and filters."""
        if self._tiles is None:
            return MeanFieldReport(0, True, (), ())
        report = self._tiles.report
        energy = tuple(value + self._settled_energy for value in report.energy)
        return MeanFieldReport(report.num_iterations, report.converged, energy, report.filters)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage."""
        return {} if self._tiles is None else dict(self._tiles.timings)

    def computed(self) -> NDArray[np.float32]:
        """Return what the engine computed, (channels, *box)."""
        return np.zeros((0, 1), np.float32) if self._tiles is None else self._tiles.computed()

    def label_map(self, network: NDArray[np.unsignedinteger[Any]], decode: object = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the refined label map, (*grid), from the network's; tiles are decoded in their own way."""
        labels = network.copy()
        part = labels.reshape(self._source.values.shape[1:])[self._source.box]
        if self._settled_labels is not None:
            self._settled_labels.write(part)
        if self._tiles is not None:
            inner = np.ascontiguousarray(part)
            self._tiles.decode(inner, self._threads)
            part[...] = inner
        return labels

    def dense(self) -> NDArray[np.float32]:
        """Return (L, *grid) refined logits.

        Where a label took no part, its penalty is taken to be the largest of those that did: it cannot be smaller. Voxels that took no part
        keep the network's logits, with the bias of the labels inside the mask, over the temperature.
        """
        logits = np.array(self._source.values, np.float32, order="C")
        if self._source.is_probability:
            take_logarithms(logits)
        inner = logits[(slice(None), *self._source.box)]
        if self._run.bias is not None:
            for channel, bias in zip(inner, self._run.bias, strict=True):
                np.add(channel, np.float32(bias), out=channel, where=True if self._mask is None else self._mask)
        logits *= np.float32(1.0) / np.float32(self._run.temperature)
        if self._tiles is None:
            return logits.reshape(self.num_channels, *self._grid_shape)
        grid = self._tiles.sets.grid
        inside = grid.voxels(self._tiles.sets.active)
        if self._mask is not None:
            inside &= self._mask
        # Missing tiles are NaN.
        refined = (self._spread(label) for label in range(self.num_channels))
        penalty = np.zeros(grid.shape, np.float32)
        for channel, values in zip(inner, refined, strict=True):
            np.fmin(penalty, values - channel, out=penalty)
        penalty[~inside] = 0.0
        inner += penalty
        for label, channel in enumerate(inner):
            values = self._spread(label)
            np.copyto(channel, values, where=inside & ~np.isnan(values))
        return logits.reshape(self.num_channels, *self._grid_shape)

    def _spread(self, label: int) -> NDArray[np.float32]:
        """Return the refined logits of a label in the source's box; NaN where it took no part."""
        assert self._tiles is not None
        tiles, values = self._tiles.entries_of(label)
        return self._tiles.sets.grid.spread(tiles, values, np.float32(np.nan))
