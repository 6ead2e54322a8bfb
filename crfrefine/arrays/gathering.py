"""Values of channels at the voxels of a mask, in the C order of the user's axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.probabilities import take_logarithms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.axes import StorageOrder

BLOCK_VOXELS = 1 << 18


class Selection:
    """The voxels of a grid where a mask is True."""

    def __init__(self, where: NDArray[np.bool_], order: StorageOrder) -> None:
        """Take a mask.

        Args:
            where: (*grid) in the user's order of axes.
            order: of the axes of arrays that values are taken from.
        """
        self.count = int(np.count_nonzero(where))
        self._where = where
        self._order = order
        self._box = bounding_box(where) or (slice(0, 0),) * where.ndim
        self._inside = where[self._box]

    @property
    def storage_box(self) -> Box:
        """The bounding box of the voxels, axes in storage order."""
        return self._order.axes_to_storage(self._box)

    def within(self, box: Box) -> tuple[Selection, NDArray[np.bool_]]:
        """Return the selection on a box of the grid, and which of the voxels it has, (count,).

        Args:
            box: axes in storage order.
        """
        of_user = tuple(box[axis] for axis in self._order.inverse)
        inner = np.zeros(self._where.shape, np.bool_)
        inner[of_user] = True
        return Selection(self._where[of_user], self._order), inner[self._box][self._inside]

    def take(self, channel: NDArray[Any]) -> NDArray[Any]:
        """Return the values of (*grid), axes in storage order, at the voxels, (count,)."""
        return self._order.to_user(channel)[self._box][self._inside]

    def take_all(self, channels: Iterable[NDArray[Any]], num_channels: int) -> NDArray[np.float32]:
        """Return the values of channels, each (*grid) in storage order, at the voxels, (channels, count) float32."""
        values = np.empty((num_channels, self.count), np.float32)
        for row, channel in zip(values, channels, strict=True):
            row[:] = self.take(channel)
        return values

    def take_input(self, values: NDArray[np.float32], temperature: float, *, is_probability: bool) -> NDArray[np.float32]:
        """Return a network's logits over the temperature at the voxels, (L, count).

        Args:
            values: (L, *grid) in storage order, logits or probabilities.
            temperature: divides the logits.
            is_probability: whether `values` are probabilities.
        """
        logits = self.take_network(values, is_probability=is_probability)
        logits *= np.float32(1.0) / np.float32(temperature)
        return logits

    def take_network(self, values: NDArray[np.float32], *, is_probability: bool) -> NDArray[np.float32]:
        """Return a network's logits at the voxels, (L, count); arguments as for `take_input`."""
        logits = self.take_all(values, len(values))
        if is_probability:
            take_logarithms(logits)
        return logits


def blocks(num_voxels: int) -> Iterator[slice]:
    """Yield slices of a few hundred thousand voxels."""
    return (slice(start, start + BLOCK_VOXELS) for start in range(0, num_voxels, BLOCK_VOXELS))
