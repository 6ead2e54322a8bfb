"""Refined logits of a case as they come from tiles: label maps at once, arrays of all labels when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.engines.base import MeanFieldReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.gathering import Selection
    from crfrefine.tiles.running import RefinedTiles
    from crfrefine.tiles.sources import DenseChannels


class TiledLogits:
    """The refined logits of a case whose network's logits are in memory, in storage order."""

    def __init__(
        self,
        source: DenseChannels,
        temperature: float,
        mask: NDArray[np.bool_] | None,
        tiles: RefinedTiles | None,
        settled_energy: float,
        grid_shape: tuple[int, ...],
        threads: int | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            source: the network's logits; they must not change.
            temperature: what they are divided by.
            mask: (*box of the source), True where the model applies; None: everywhere.
            tiles: what was refined; None: nothing, every voxel was settled.
            settled_energy: energy of the voxels that took no part.
            grid_shape: of the original grid, whose axes may be fewer than those of the source.
            threads: for decoding; None: the cores this process may use.
        """
        self._source = source
        self._temperature = temperature
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
        if self._tiles is not None:
            part = labels.reshape(self._source.values.shape[1:])[self._source.box]
            inner = np.ascontiguousarray(part)
            self._tiles.decode(inner, self._threads)
            part[...] = inner
        return labels

    def dense(self) -> NDArray[np.float32]:
        """Return (L, *grid) refined logits.

        Where a label took no part, its penalty is taken to be the largest of those that did: it cannot be smaller. Voxels that took no part
        keep the network's logits over the temperature.
        """
        logits = np.array(self._source.values, np.float32, order="C")
        if self._source.is_probability:
            take_logarithms(logits)
        logits *= np.float32(1.0) / np.float32(self._temperature)
        if self._tiles is None:
            return logits.reshape(self.num_channels, *self._grid_shape)
        self._refine(logits[(slice(None), *self._source.box)], lambda values: values)
        return logits.reshape(self.num_channels, *self._grid_shape)

    def at(self, voxels: Selection) -> NDArray[np.float32]:
        """Return (L, N) refined logits at some voxels, as `dense` has them."""
        source, num_dims = self._source, len(self._grid_shape)
        values = source.values.reshape(self.num_channels, *self._grid_shape)
        logits = voxels.take_input(values, self._temperature, is_probability=source.is_probability)
        if self._tiles is None:
            return logits
        inner, is_inside = voxels.within(source.box[-num_dims:])
        refined = logits[:, is_inside]
        self._refine(refined, lambda values: inner.take(values.reshape(values.shape[-num_dims:])))
        logits[:, is_inside] = refined
        return logits

    def _refine(self, logits: NDArray[np.float32], take: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Replace the network's logits over the temperature by refined ones.

        Args:
            logits: (L, ...) values of the source's box, in the form of `take`; written to.
            take: brings an array on the source's box into that form.
        """
        assert self._tiles is not None
        inside = self._tiles.sets.grid.voxels(self._tiles.sets.active)
        if self._mask is not None:
            inside &= self._mask
        inside = take(inside)
        # Missing tiles are NaN.
        refined = (take(self._spread(label)) for label in range(self.num_channels))
        penalty = np.zeros(inside.shape, np.float32)
        for channel, values in zip(logits, refined, strict=True):
            np.fmin(penalty, values - channel, out=penalty)
        penalty[~inside] = 0.0
        logits += penalty
        for label, channel in enumerate(logits):
            values = take(self._spread(label))
            np.copyto(channel, values, where=inside & ~np.isnan(values))

    def _spread(self, label: int) -> NDArray[np.float32]:
        """Return the refined logits of a label in the source's box; NaN where it took no part."""
        assert self._tiles is not None
        tiles, values = self._tiles.entries_of(label)
        return self._tiles.sets.grid.spread(tiles, values, np.float32(np.nan))
