"""The order of a grid's axes: the user's, (x, y, z), and that of storage in memory and files, slowest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T")


@dataclass(frozen=True)
class StorageOrder:
    """The order in which the user's axes are stored. Arrays are transposed as views; nothing is copied."""

    axes: tuple[int, ...]  # for each axis in storage, slowest first, the user's number of it

    @classmethod
    def of_files(cls, num_axes: int) -> StorageOrder:
        """Return the order of files: x fastest."""
        return cls(tuple(reversed(range(num_axes))))

    @classmethod
    def of_memory(cls, grid: NDArray[Any]) -> StorageOrder:
        """Return the memory order of the axes of an array (*grid)."""
        return cls(tuple(sorted(range(grid.ndim), key=lambda axis: -abs(grid.strides[axis]))))

    def to_storage(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a user's array (*grid) or (channels, *grid) with its axes in storage order."""
        num_leading = array.ndim - len(self.axes)
        return array.transpose(*range(num_leading), *(axis + num_leading for axis in self.axes))

    def to_user(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array (*grid) or (channels, *grid) in storage order with its axes in the user's order."""
        places = sorted(range(len(self.axes)), key=self.axes.__getitem__)  # of each of the user's axes
        return StorageOrder(tuple(places)).to_storage(array)

    def axes_to_storage(self, per_axis: Sequence[_T]) -> tuple[_T, ...]:
        """Return values per user's axis, such as a spacing, in storage order."""
        return tuple(per_axis[axis] for axis in self.axes)


@dataclass(frozen=True)
class Reorientation:
    """How the axes of a stored grid become those of another one: exchanged, mirrored, or both."""

    axes: tuple[int, ...]  # for each axis (x, y, z) of the other grid, the number of the stored axis
    mirrored: tuple[bool, ...]  # for each of them, whether the stored axis runs the other way

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array ([channels,] z, y, x) of the stored grid on the other grid."""
        num_leading = values.ndim - 3
        order = (*range(num_leading), *(num_leading + 2 - axis for axis in reversed(self.axes)))
        z, y, x = (slice(None, None, -1 if is_mirrored else 1) for is_mirrored in reversed(self.mirrored))
        return values.transpose(order)[..., z, y, x]


def file_order(channels: NDArray[Any]) -> StorageOrder:
    """Return the order of files for an array (channels, *grid)."""
    return StorageOrder.of_files(channels.ndim - 1)
