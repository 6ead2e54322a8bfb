"""The logits of a label map outside the mask, where every label keeps them: made where they are asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.refinement.tiles.grid import TILE, TileGrid
from crfrefine.refinement.tiles.label_source import find_tiles_near_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.label_source import LabelMapChannels


class OutsideLogits:
    """The logits over the temperature, and their softmax, at the voxels that a mask leaves out."""

    def __init__(
        self,
        source: LabelMapChannels,
        mask: NDArray[np.bool_],
        num_labels: int,
        temperature: float,
        threads: int | None,
    ) -> None:
        """Keep the parts.

        Args:
            source: the label map.
            mask: (*grid) of three axes, True where the model applies.
            num_labels: L.
            temperature: divides the logits.
            threads: None: the cores this process may use.
        """
        self._source = source
        self._outside = ~mask
        self._num_labels = num_labels
        self._temperature = np.float32(temperature)
        self._threads = threads
        self._sums: dict[float, NDArray[np.float32]] = {}

    def write(self, label: int, planes: slice, to: NDArray[np.float32], *, output_temperature: float | None) -> None:
        """Write a label's probabilities, or logits, at the voxels outside the mask.

        Args:
            label: the label.
            planes: of the slowest axis.
            to: (planes, y, x); written to.
            output_temperature: divides the logits where they become probabilities; None: logits are written.
        """
        outside = self._outside[planes]
        if not outside.any():
            return
        values = self._source.planes(planes.start, planes.stop).channel(label)[outside].astype(np.float32) / self._temperature
        if output_temperature is None:
            to[outside] = values
        else:
            to[outside] = np.exp(values / np.float32(output_temperature) - self._log_sums(output_temperature)[planes][outside])

    def _log_sums(self, output_temperature: float) -> NDArray[np.float32]:
        """Return what `_sum` does, once for each output temperature."""
        if output_temperature not in self._sums:
            self._sums[output_temperature] = self._sum(self._temperature * np.float32(output_temperature))
        return self._sums[output_temperature]

    def _sum(self, temperature: np.float32) -> NDArray[np.float32]:
        """Return (*grid), logarithm of the sum of exp(logit / temperature) over the labels; anything inside the mask."""
        grid = TileGrid.of(self._outside.shape)
        source, engine = self._source, grid.engine(self._threads)
        near = find_tiles_near_labels(grid, source.numbers, self._num_labels, source.reach, self._threads)
        near &= grid.sums(self._outside, np.int64) > 0
        # Relative to a voxel's own label, whose logit is the largest; labels that are not near add as much as one that is absent.
        absent = np.exp((np.float32(ABSENT_LOGIT) - np.float32(CONFIDENCE)) / temperature)
        sums = np.full((grid.num_tiles, math.prod(TILE)), np.float32(self._num_labels) * absent, np.float32)
        for label in range(self._num_labels):
            tiles = np.flatnonzero(near[label])
            if len(tiles):
                values = np.empty((len(tiles), math.prod(TILE)), np.float32)
                source.fill_entries(engine, label, tiles, np.arange(len(tiles)), values)
                sums[tiles] += np.exp((values - np.float32(CONFIDENCE)) / temperature) - absent
        everywhere = np.arange(grid.num_tiles)
        return grid.spread(everywhere, np.float32(CONFIDENCE) / temperature + np.log(sums), np.float32(0.0))
