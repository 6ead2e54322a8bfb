"""What a run on tiles tells of itself: the same for logits in memory and for streamed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import MeanFieldReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.refinement.tiles.running import RefinedTiles


class RunOutcome:
    """The tiles that took part in a run, and the energy of those that did not."""

    def __init__(self, tiles: RefinedTiles | None, settled_energy: float) -> None:
        """Keep the parts.

        Args:
            tiles: what was refined; None: nothing, every voxel was settled.
            settled_energy: energy of the voxels that took no part.
        """
        self._tiles = tiles
        self._settled_energy = settled_energy

    @property
    def report(self) -> MeanFieldReport:
        """Steps, energy and filters. If every voxel is settled, no step is taken, and the energy is that of the network's output."""
        if self._tiles is None:
            return MeanFieldReport(0, True, (self._settled_energy,), ())
        report = self._tiles.report
        energy = tuple(value + self._settled_energy for value in report.energy)
        return MeanFieldReport(report.num_iterations, report.converged, energy, report.filters)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage."""
        return {} if self._tiles is None else dict(self._tiles.timings)

    def computed(self) -> NDArray[np.float32]:
        """Return what the engine computed, (1, entries, voxels of a tile)."""
        return np.zeros((0, 1), np.float32) if self._tiles is None else self._tiles.computed()
