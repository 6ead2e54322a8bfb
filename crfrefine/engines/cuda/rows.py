"""Rows of channels, and memory that filterings share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDEST_ROW = 8


def row_width(num_channels: int) -> int:
    """Channels that lie side by side and are filtered together: 1, 2, 4 or 8."""
    return next((width for width in (1, 2, 4) if num_channels <= width), WIDEST_ROW)


def num_row_groups(num_channels: int) -> int:
    """Rows needed for so many channels; the last one may be filled in part."""
    return -(-num_channels // row_width(num_channels))


def row_constants(rows: Any) -> dict[str, int]:
    """The constants of kernels for (group, voxel, width) values."""
    return {"CRF_WIDTH": rows.shape[-1]}


def grouped(per_channel: NDArray[np.floating[Any]], width: int) -> NDArray[np.float32]:
    """(channel) numbers as (group, width) float32, padded with zeros."""
    padded = np.zeros((-(-len(per_channel) // width), width), dtype=np.float32)
    padded.flat[: len(per_channel)] = per_channel
    return padded


class Room:
    """Memory that all filterings of a filter use in turn: as much as the largest array so far has needed."""

    def __init__(self, xp: Any) -> None:
        """Take the device's array module."""
        self._xp, self._values = xp, xp.empty(0, dtype=np.float32)

    def array(self, *shape: int) -> Any:
        """Return a float32 array with any values in it, until the next call."""
        size = math.prod(shape)
        if self._values.size < size:
            self._values = None  # before more is allocated
            self._values = self._xp.empty(size, dtype=np.float32)
        return self._values[:size].reshape(shape)
