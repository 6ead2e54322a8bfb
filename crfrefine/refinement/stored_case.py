"""A case besides the network's output, in storage order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.geometry import StorageOrder
    from crfrefine.engines.base import Backend, GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.strokes import Strokes


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A case besides the network's output, in storage order."""

    image: GridImage  # raw intensities, and the user's mask without the voxels that are NaN
    parameters: CrfParameters
    models: Sequence[ModelSpec]  # one, or that of each region
    backend: Backend
    context: RunContext
    strokes: Strokes | None
    regions: RegionScheme | None  # of the channels; None means that they are labels
    order: StorageOrder  # of the axes

    @property
    def model(self) -> ModelSpec:
        """The model, or that of the first region, which has the kernels of all."""
        return self.models[0]

    @property
    def threads(self) -> int | None:
        """CPU threads; None means the cores this process may use."""
        return self.context.threads
