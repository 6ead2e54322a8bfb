"""Pieces of a file, cut so that each holds whole tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from crfrefine.refinement.tiles.grid import TILE

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Piece(Protocol):
    """Planes of some channels, as `crfrefine.io` reads them."""

    @property
    def channels(self) -> slice:
        """The channels."""
        ...

    @property
    def planes(self) -> slice:
        """The planes of the slowest axis."""
        ...

    @property
    def values(self) -> NDArray[Any]:
        """(channels, planes, …)."""
        ...


@dataclass(frozen=True)
class Brick:
    """Planes of a channel that begin and end with a tile, or with the grid.

    Attributes:
        label: the channel.
        first_plane: number of the first plane.
        values: (planes, y, x), C-contiguous.
    """

    label: int
    first_plane: int
    values: NDArray[Any]


def cut_bricks(pieces: Iterable[Piece], plane_shape: tuple[int, int], num_planes: int) -> Iterator[Brick]:
    """Yield the bricks of pieces that come with ascending planes for each channel; planes of incomplete tiles wait.

    Args:
        pieces: of all channels, each plane of each channel once.
        plane_shape: (y, x) of a grid of three axes.
        num_planes: of the grid.
    """
    waiting: dict[int, NDArray[Any]] = {}
    for piece in pieces:
        for label, values in zip(range(piece.channels.start, piece.channels.stop), piece.values, strict=True):
            planes = values.reshape(-1, *plane_shape)
            first, stop = piece.planes.start, piece.planes.stop
            if len(planes) != stop - first:  # A grid of two axes: its planes are rows of the only plane.
                planes, first, stop = values.reshape(1, *plane_shape), 0, 1
            if label in waiting:
                held = waiting.pop(label)
                planes, first = np.concatenate([held, planes]), first - len(held)
            num_whole = len(planes) if stop == num_planes else len(planes) // TILE[0] * TILE[0]
            if num_whole < len(planes):
                waiting[label] = planes[num_whole:].copy()
            if num_whole:
                yield Brick(label, first, np.ascontiguousarray(planes[:num_whole]))
