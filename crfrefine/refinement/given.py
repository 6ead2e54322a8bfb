"""A case as it is given: the image, and what refines it, besides the network's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Float32, Labels
    from crfrefine.base.geometry import StorageOrder
    from crfrefine.engines.base import Backend, GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.strokes import Strokes


@dataclass(frozen=True, eq=False)
class Case:
    """A case besides the network's output.

    Its axes are in the user's order, until the case is stored: then they are in storage order, and
    the models are known.
    """

    image: GridImage  # raw intensities, and the user's mask; stored without the voxels that are NaN
    parameters: CrfParameters
    backend: Backend
    context: RunContext
    strokes: Strokes | None
    order: StorageOrder  # that the axes of the network's output are stored in
    # The regions of the channels; None means that they are labels.
    regions: RegionScheme | None = None
    # mm between voxels of the network; None means that they are the image's
    network_spacing: tuple[float, ...] | None = None
    # Stored: one model, or that of each region, all with the same kernels.
    models: Sequence[ModelSpec] = ()
    notes: tuple[str, ...] = ()  # on the image, for the user

    @property
    def model(self) -> ModelSpec:
        """The first model, which has the kernels of all."""
        return self.models[0]

    @property
    def voxel_ml(self) -> float:
        """The volume of a voxel."""
        return math.prod(self.image.spacing) / 1000.0

    def decode(self, channels: Float32) -> Labels:
        """Return the label map, (*grid), of channels, (channels, *grid)."""
        if self.regions is not None:
            return self.regions.decode(channels)
        return self.backend.label_map(channels, threads=self.context.threads)
