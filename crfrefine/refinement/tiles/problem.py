"""A volume, or a slab of one, with the labels that may take part in its tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.refinement.tiles.grid import kernel_reach

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.grid_image import FeatureOrigin
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.grid import Extents, TileGrid
    from crfrefine.refinement.tiles.image import TileImage
    from crfrefine.refinement.tiles.sources import ChannelSource


@dataclass(frozen=True, eq=False)
class TileProblem:
    """A volume, or a slab of one.

    Attributes:
        grid: the tiles.
        source: the network's logits.
        present: (L, *tiles), where labels are present.
        may_matter: (L, *tiles), where they may become so; a superset.
        mask: (*grid), True where the model applies; None: everywhere.
        image: its intensities.
        spacing: mm, one per axis of the original grid in storage order.
        spec: the model of all labels.
        threshold: largest probability that counts as nothing, for the check at the borders of domains; None: no check.
        settled: logarithm of a probability; where all labels but one are below it, a voxel keeps the network's marginals; minus infinity:
            nowhere.
        axes: as in `Backend.kernels`.
        origin: that of the whole volume, for a slab; None: this is the whole.
        precision: `mean_field.label_threshold`, by which `running.UNSENT` is measured.
    """

    grid: TileGrid
    source: ChannelSource
    present: NDArray[np.bool_]
    may_matter: NDArray[np.bool_]
    mask: NDArray[np.bool_] | None
    image: TileImage
    spacing: Sequence[float]
    spec: ModelSpec
    threshold: float | None
    settled: float = -math.inf
    axes: Sequence[int] | None = None
    origin: FeatureOrigin | None = None
    precision: float = 0.0

    @property
    def num_dims(self) -> int:
        """Axes of the original grid."""
        return len(self.spacing)

    @property
    def reach(self) -> Extents:
        """Voxels along each axis after which every kernel ends, or the grid."""
        return kernel_reach(self.spec.kernels, self.spacing, self.grid)

    @property
    def num_voxels(self) -> int:
        """Voxels inside the mask."""
        return math.prod(self.grid.shape) if self.mask is None else int(np.count_nonzero(self.mask))
