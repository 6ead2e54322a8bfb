"""The logits of a label map outside the mask, where every label keeps them: made where they are asked for."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.tiles.grid import TILE, TileGrid
from crfrefine.tiles.label_source import find_tiles_near_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.tiles.label_source import LabelMapChannels


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

    def write(self, label: int, planes: slice, to: NDArray[np.float32], *, is_probability: bool) -> None:
        """Write a label's logits, or marginals, at the voxels outside the mask.

        Args:
            label: the label.
            planes: of the slowest axis.
            to: (planes, y, x); written to.
            is_probability: whether marginals are written.
        """
        outside = self._outside[planes]
        if not outside.any():
            return
        values = self._source.planes(planes.start, planes.stop).channel(label)[outside].astype(np.float32) / self._temperature
        to[outside] = np.exp(values - self._log_sums[planes][outside]) if is_probability else values

    @cached_property
    def _log_sums(self) -> NDArray[np.float32]:
        """(*grid), logarithm of the sum of exp(logit / temperature) over the labels; anything inside the mask."""
        grid = TileGrid.of(self._outside.shape)
        source, engine = self._source, grid.engine(self._threads)
        near = find_tiles_near_labels(grid, source.numbers, self._num_labels, source.reach, self._threads)
        near &= grid.sums(self._outside, np.int64) > 0
        # Relative to a voxel's own label, whose logit is the largest; labels that are not near add as much as one that is absent.
        absent = np.exp((np.float32(ABSENT_LOGIT) - np.float32(CONFIDENCE)) / self._temperature)
        sums = np.full((grid.num_tiles, math.prod(TILE)), np.float32(self._num_labels) * absent, np.float32)
        for label in range(self._num_labels):
            tiles = np.flatnonzero(near[label])
            if len(tiles):
                values = np.empty((len(tiles), math.prod(TILE)), np.float32)
                source.fill_entries(engine, label, tiles, np.arange(len(tiles)), values)
                sums[tiles] += np.exp((values - np.float32(CONFIDENCE)) / self._temperature) - absent
        everywhere = np.arange(grid.num_tiles)
        return grid.spread(everywhere, np.float32(CONFIDENCE) / self._temperature + np.log(sums), np.float32(0.0))
