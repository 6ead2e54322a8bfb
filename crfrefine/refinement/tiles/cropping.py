"""All labels of the voxels in a mask's bounding box: what lies outside costs one pass of reading and writing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import Box, bounding_box
from crfrefine.arrays.probabilities import divided_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.gathering import Selection
    from crfrefine.engines.base import MeanFieldReport, MeanFieldResult

WORTH_IT = 0.9
"""Share of the grid below which its voxels in the box are copied."""


def box_of(mask: NDArray[np.bool_] | None) -> Box | None:
    """Return the mask's bounding box; None if it is nearly the whole grid."""
    box = None if mask is None else bounding_box(mask)
    if mask is None or box is None:
        return None
    inside = math.prod(axis.stop - axis.start for axis in box)
    return box if inside < WORTH_IT * mask.size else None


class CroppedLogits:
    """The refined logits of a case that was refined in a box, in storage order.

    Attributes:
        box: the part of the grid.
    """

    def __init__(
        self, values: NDArray[np.float32], box: Box, temperature: float, refined: MeanFieldResult, *, is_probability: bool = False
    ) -> None:
        """Keep the parts.

        Args:
            values: (L, *grid) the network's logits, or probabilities; they must not change.
            box: the part of the grid that was refined.
            temperature: divides the logits.
            refined: (L, *box).
            is_probability: whether `values` are probabilities.
        """
        self._values = values
        self.box = box
        self._temperature = temperature
        self._refined = refined
        self._is_probability = is_probability

    @property
    def num_channels(self) -> int:
        """L."""
        return len(self._values)

    @property
    def report(self) -> MeanFieldReport:
        """Steps, energy and filters."""
        return self._refined.report

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage."""
        return self._refined.timings

    def computed(self) -> NDArray[np.float32]:
        """Return what the engine computed, (L, *box)."""
        return self._refined.logits

    def label_map(
        self, network: NDArray[np.unsignedinteger[Any]], decode: Callable[[NDArray[np.float32]], NDArray[np.unsignedinteger[Any]]]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Return the refined label map, (*grid), from the network's; `decode` turns logits into labels."""
        labels = network.copy()
        labels[self.box] = decode(self._refined.logits)
        return labels

    def dense(self) -> NDArray[np.float32]:
        """Return (L, *grid) refined logits; outside the box the network's over the temperature."""
        logits = divided_logits(self._values, self._temperature, is_probability=self._is_probability)
        logits[(slice(None), *self.box)] = self._refined.logits
        return logits

    def at(self, voxels: Selection) -> NDArray[np.float32]:
        """Return (L, N) refined logits at some voxels."""
        inner, is_inside = voxels.within(self.box)
        refined = inner.take_all(self._refined.logits, self.num_channels)
        if inner.count == voxels.count:
            return refined
        logits = voxels.take_input(self._values, self._temperature, is_probability=self._is_probability)
        logits[:, is_inside] = refined
        return logits
