"""Slabs of planes, each with as many planes around it as messages can cross."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from crfrefine.refinement.tiles.grid import TILE


@dataclass(frozen=True)
class Slab:
    """Planes of a volume."""

    start: int  # the first plane
    stop: int  # the end of the planes
    first: int  # the first plane that takes part in the computation
    last: int  # the end of those

    @property
    def extent(self) -> int:
        """Planes that take part."""
        return self.last - self.first


def halo_planes(num_iterations: int, reach: int) -> int:
    """Return the number of planes on each side that the result of a plane can depend on, a multiple of TILE[0].

    In each step messages come from within the reach, and their normalization from within the reach of those who send.
    """
    return math.ceil((num_iterations + 1) * reach / TILE[0]) * TILE[0]


def cuts(num_planes: int, halo: int) -> Iterator[list[Slab]]:
    """Yield the ways to cut a volume into slabs of equal height, whose last one may be lower; the fewest slabs come first."""
    rows = math.ceil(num_planes / TILE[0])
    for count in range(1, rows + 1):
        height = math.ceil(rows / count) * TILE[0]
        starts = range(0, num_planes, height)
        yield [Slab(s, min(s + height, num_planes), max(0, s - halo), min(s + height + halo, num_planes)) for s in starts]
