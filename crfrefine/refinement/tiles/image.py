"""The image of a volume, normalized for the planes that are worked on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.intensity import IntensityMap


class TileImage:
    """The modalities of a volume in storage order, with the maps of their intensities."""

    def __init__(self, values: NDArray[Any], maps: Sequence[IntensityMap] | None = None) -> None:
        """Take an image.

        Args:
            values: (M, *grid) of three axes, in any type.
            maps: of each modality; None: the values are normalized float32.
        """
        self._values = values
        self._maps = maps

    @property
    def num_modalities(self) -> int:
        """M."""
        return len(self._values)

    @property
    def is_normalized(self) -> bool:
        """Whether the normalized image is in memory as a whole."""
        return self._maps is None

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return normalized planes of the slowest axis, (M, planes, y, x) float32, C-contiguous."""
        part = self._values[:, start:stop]
        if self._maps is None:
            return np.ascontiguousarray(part)
        result = np.empty(part.shape, np.float32)
        for source, target, mapped in zip(part, result, self._maps, strict=True):
            mapped.apply(source, target)
        return result

    def lowest(self, mask: NDArray[np.bool_] | None, planes_at_once: int = 16) -> tuple[float, ...]:
        """Return the smallest normalized intensity of each modality inside a mask, (*grid)."""
        least = [np.inf] * self.num_modalities
        for start in range(0, self._values.shape[1], planes_at_once):
            inside = None if mask is None else mask[start : start + planes_at_once]
            if inside is not None and not inside.any():
                continue
            for modality, values in enumerate(self.planes(start, start + planes_at_once)):
                least[modality] = min(least[modality], float((values if inside is None else values[inside]).min()))
        return tuple(least)
