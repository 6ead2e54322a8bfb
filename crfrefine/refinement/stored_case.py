"""A case besides the network's output, in storage order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
class StoredCase:
    """A case besides the network's output, in storage order."""

    image: GridImage  # raw intensities, and the user's mask without the voxels that are NaN
    parameters: CrfParameters
    models: Sequence[ModelSpec]  # one, or that of each region
    model: ModelSpec  # the first of them, which has the kernels of all
    backend: Backend
    context: RunContext
    strokes: Strokes | None
    regions: RegionScheme | None  # of the channels; None means that they are labels
    order: StorageOrder  # of the axes
    decode: Callable[[Float32], Labels]  # makes a label map of channels
    notes: tuple[str, ...]  # on the image, for the user
