"""Refined logits of a case as they come from tiles: label maps at once, arrays of all labels when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.probabilities import add_bias, network_logits
from crfrefine.refinement.tiles.run_outcome import RunOutcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.gathering import Selection
    from crfrefine.parameters.specs import MeanFieldSpec
    from crfrefine.refinement.tiles.running import RefinedTiles
    from crfrefine.refinement.tiles.settled import SettledLabels
    from crfrefine.refinement.tiles.sources import DenseChannels


class TiledLogits(RunOutcome):
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
        super().__init__(tiles, settled_energy)
        self._source = source
        self._run = run
        self._settled_labels = settled_labels
        self._mask = mask
        self._grid_shape = grid_shape
        self._threads = threads

    @property
    def num_channels(self) -> int:
        """L."""
        return len(self._source.values)

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
        logits = network_logits(self._source.values, is_probability=self._source.is_probability)
        add_bias(logits[(slice(None), *self._source.box)], self._run.bias, self._mask)
        self._divide(logits)
        if self._tiles is None:
            return logits.reshape(self.num_channels, *self._grid_shape)
        self._refine(logits[(slice(None), *self._source.box)], lambda values: values)
        return logits.reshape(self.num_channels, *self._grid_shape)

    def at(self, voxels: Selection) -> NDArray[np.float32]:
        """Return (L, N) refined logits at some voxels, as `dense` has them."""
        source, num_dims = self._source, len(self._grid_shape)
        values = source.values.reshape(self.num_channels, *self._grid_shape)
        logits = voxels.take_network(values, is_probability=source.is_probability)
        inner, is_inside = voxels.within(source.box[-num_dims:])
        refined = logits[:, is_inside]
        add_bias(refined, self._run.bias, None if self._mask is None else inner.take(self._mask.reshape(self._mask.shape[-num_dims:])))
        logits[:, is_inside] = refined
        self._divide(logits)
        if self._tiles is None:
            return logits
        refined = logits[:, is_inside]
        self._refine(refined, lambda values: inner.take(values.reshape(values.shape[-num_dims:])))
        logits[:, is_inside] = refined
        return logits

    def _divide(self, logits: NDArray[np.float32]) -> None:
        """Divide logits by the temperature, in place."""
        if self._run.temperature != 1.0:  # A pass over all labels, which is worth saving.
            logits *= np.float32(1.0) / np.float32(self._run.temperature)

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
