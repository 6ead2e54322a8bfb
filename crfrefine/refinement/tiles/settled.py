"""The labels of settled tiles, where a bias of the labels may have chosen others than the network's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.refinement.tiles.grid import TILE
from crfrefine.refinement.tiles.solving import label_sets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.grid import TileGrid
    from crfrefine.refinement.tiles.problem import TileProblem
    from crfrefine.refinement.tiles.running import RefinedTiles


@dataclass(frozen=True, eq=False)
class SettledLabels:
    """The only label of each settled tile, which all its voxels inside the mask have.

    Attributes:
        grid: the tiles.
        labels: (*tiles), -1: the tile is not settled.
        mask: (*grid), True where the model applies; None: everywhere.
    """

    grid: TileGrid
    labels: NDArray[np.int32]
    mask: NDArray[np.bool_] | None

    def write(self, label_map: NDArray[np.unsignedinteger[Any]]) -> None:
        """Write the labels into a label map (*grid)."""
        depth, height, width = self.grid.shape
        for start in range(0, depth, TILE[0]):
            stop = min(start + TILE[0], depth)
            spread = self.grid.voxels(self.labels, (start, 0, 0), (stop, height, width))
            where = spread >= 0 if self.mask is None else (spread >= 0) & self.mask[start:stop]
            np.copyto(label_map[start:stop], spread.astype(label_map.dtype), where=where)


def find_settled_labels(problem: TileProblem, found: RefinedTiles | None) -> SettledLabels | None:
    """Return the labels of the tiles that took no part; None: they are the network's, since no label has a bias.

    Args:
        problem: the volume.
        found: what took part; None: nothing.
    """
    if problem.spec.mean_field.bias is None:
        return None
    sets = label_sets(problem) if found is None else found.sets
    return SettledLabels(problem.grid, sets.settled, problem.mask)
