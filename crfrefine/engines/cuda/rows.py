"""Rows of channels, memory that filterings share, and sums over the voxels.

Sums stay on the device until they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from crfrefine.engines.cuda.cupy_device import CupyDevice

MAX_WIDTH = 8  # channels of the widest rows


def row_width(num_channels: int) -> int:
    """Return how many channels lie side by side and are filtered together: 1, 2, 4 or 8."""
    for width in (1, 2, 4):
        if num_channels <= width:
            return width
    return MAX_WIDTH


def shape_of_rows(num_channels: int, num_voxels: int) -> tuple[int, int, int]:
    """Return (group, voxel, width) of so many channels; the last group may be filled in part."""
    width = row_width(num_channels)
    return ceil_divide(num_channels, width), num_voxels, width


def ceil_divide(count: int, size: int) -> int:
    """Return the number of groups of at most `size` that hold `count` things."""
    return -(-count // size)


def upload_float32(device: CupyDevice, values: Any) -> Any:
    """Return numbers of the host on the device, in single precision; None if there are none."""
    if values is None:
        return None
    return device.upload(np.asarray(values, dtype=np.float32))


def to_rows(xp: Any, channels: Any) -> Any:
    """Return (channel, voxel) values as rows, (group, voxel, width), filled up with zeros."""
    rows = xp.zeros(shape_of_rows(*channels.shape), dtype=np.float32)
    fill_rows(channels, rows)
    return rows


def _in_groups(channels: Any, rows: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the channels of each group, and their places in its rows, both (channel, voxel)."""
    width = rows.shape[2]
    for number, group in enumerate(rows):
        of_group = channels[number * width : (number + 1) * width]
        yield of_group, group[:, : len(of_group)].T


def fill_rows(channels: Any, rows: Any) -> None:
    """Copy (channel, voxel) values into rows, (group, voxel, width)."""
    for of_group, places in _in_groups(channels, rows):
        places[...] = of_group


def from_rows(rows: Any, channels: Any) -> None:
    """Copy rows, (group, voxel, width), into (channel, voxel) values."""
    for of_group, places in _in_groups(channels, rows):
        of_group[...] = places


class Room:
    """Memory that all filterings of a filter use in turn: as much as the largest array needs."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._values = xp.empty(0, dtype=np.float32)

    def array(self, *shape: int) -> Any:
        """Return a float32 array with any values in it, until the next call."""
        size = math.prod(shape)
        if self._values.size < size:
            self._values = None  # freed before more is allocated
            self._values = self._xp.empty(size, dtype=np.float32)
        return self._values[:size].reshape(shape)


# Threads of the kernels that sum over voxels: enough to fill a GPU, few enough that their sums are
# quickly added up.
_MAX_THREADS = 1 << 16
_THREADS = 512  # threads of a block of `add_up`
_PAIR_THREADS = 128  # threads of a block of `add_products`
_SHARED_VALUES = 12 * 1024  # values that a block can share
_PAIR_SUMS = 1 << 19  # sums that all blocks of `add_products` have together, as a rule
_MIN_PAIR_BLOCKS = 256
_MAX_PAIR_BLOCKS = 2048


def sum_threads(num_voxels: int) -> int:
    """Return the number of threads that sum over the voxels.

    Each takes a few, so that their sums take less memory than the voxels.
    """
    return min(ceil_divide(num_voxels, 4), _MAX_THREADS)


def pair_blocks(num_sums: int, tile: int, num_voxels: int) -> int:
    """Return the number of blocks of `add_products`.

    They are enough to fill a GPU, and so few that their sums take little memory.
    """
    num_blocks = min(_PAIR_SUMS // num_sums, _MAX_PAIR_BLOCKS)
    return min(ceil_divide(num_voxels, tile), max(_MIN_PAIR_BLOCKS, num_blocks))


class Sums:
    """Parts of sums in float64: kernels add to them, one part per sum and thread or block.

    The parts of a sum are added up in a fixed order.
    """

    def __init__(self, device: CupyDevice) -> None:
        self.device = device
        self._parts: list[Any] = []

    def reserve(self, num_sums: int, count: int) -> Any:
        """Return (num_sums, count) zeros on the device, for kernels to add to."""
        part = self.device.xp.zeros((num_sums, count), dtype=np.float64)
        self._parts.append(part)
        return part

    def add_up(self) -> Any:
        """Return the totals on the device, one after the other in the order of `reserve`."""
        num_sums = sum(len(part) for part in self._parts)
        totals = self.device.xp.empty(num_sums, dtype=np.float64)
        begin = 0
        for part in self._parts:
            end = begin + len(part)
            add_up(self.device, part, totals[begin:end])
            begin = end
        return totals


class Products:
    """Sums over the voxels of the products of each row of one array with each row of another.

    They are the sums of one or more sets, for each of which the arrays have other values, and which
    one launch adds up. The parts, of `Sums`, have what each thread has added so far, (set, pair of
    rows, thread).
    """

    def __init__(
        self, sums: Sums, rows: Any, others: Any, part: Any = None, *, num_sets: int = 1
    ) -> None:
        """Take the (row, voxel) numbers `rows` and `others`, where None means ones.

        Only voxels where `part`, (voxel) uint8, is 1 count; None means all.
        """
        self._device = sums.device
        num_rows, num_voxels = rows.shape
        num_others = 1 if others is None else len(others)
        num_pairs = num_rows * num_others
        tile = _PAIR_THREADS  # voxels whose rows a block shares at a time
        while tile > 1 and (num_rows + num_others) * (tile + 1) > _SHARED_VALUES:
            tile //= 2
        num_slices = max(1, min(tile, _PAIR_THREADS // num_pairs))  # threads per pair of rows
        self._num_blocks = pair_blocks(num_pairs * num_slices, tile, num_voxels)
        self._constants = {
            "CRF_ROWS": num_rows,
            "CRF_OTHERS": num_others,
            "CRF_THREADS": _PAIR_THREADS,
            "CRF_TILE": tile,
        }
        num_parts = self._num_blocks * num_slices
        parts = sums.reserve(num_sets * num_pairs, num_parts)
        self._parts = parts.reshape(num_sets, num_pairs, num_parts)
        self._arrays = {"rows": rows, "others": others, "part": part, "num_voxels": num_voxels}

    def add(self, number: int = 0) -> None:
        """Add the products of the present values to the set of this number."""
        self._device.launch(
            "products",
            "add_products",
            self._constants,
            self._num_blocks,
            **self._arrays,
            num_blocks=self._num_blocks,
            sums=self._parts[number],
        )


def add_up(device: CupyDevice, parts: Any, totals: Any) -> None:
    """Add up (num_sums, count) numbers in float64, in a fixed order, into (num_sums) totals."""
    num_sums, count = parts.shape
    constants = {"CRF_THREADS": _THREADS}
    device.launch("sums", "add_up", constants, num_sums, partial=parts, count=count, sums=totals)
