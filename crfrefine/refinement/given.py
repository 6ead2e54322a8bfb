"""A case as it is given, besides the network's output, and as it is prepared for the mean field.

`Case` does not change. `Prepared` is filled step by step by `preparing` and `tiles.planning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.refinement.tiles.grid import MAX_DIMS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Bool, Float32, Float64, Labels
    from crfrefine.base.geometry import StorageOrder
    from crfrefine.base.notes import Note
    from crfrefine.engines.base import Backend, GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.strokes import Strokes
    from crfrefine.refinement.tiles.problem import TileProblem


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
    is_label_map: bool = False  # whether the network's output is a label map
    # Stored: one model, or that of each region, all with the same kernels.
    models: Sequence[ModelSpec] = ()
    notes: tuple[Note, ...] = ()  # on the image, for the user

    @property
    def model(self) -> ModelSpec:
        """The first model, which has the kernels of all."""
        return self.models[0]

    @property
    def can_have_tiles(self) -> bool:
        """Whether labels can be left out on tiles, which the C++ engine alone does."""
        num_dims = len(self.image.spacing)
        return self.backend.name == "cpu" and num_dims <= MAX_DIMS and self.regions is None

    def decode(self, channels: Float32) -> Labels:
        """Return the label map, (*grid), of channels, (channels, *grid)."""
        if self.regions is not None:
            return self.regions.decode(channels)
        return self.backend.label_map(channels, threads=self.context.threads)


@dataclass(eq=False)
class Prepared:
    """The inputs of a refinement, in storage order. Copies take the place of a user's arrays."""

    # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    logits: Float32
    image: GridImage  # raw, then normalized, of the box; with tiles that of their problem counts
    # (*grid), True inside the mask and outside the padding; None means everywhere
    mask: Bool | None
    largest: float = 0.0  # the largest magnitude of a logit, for checks while it is prepared
    # Whether `logits` are probabilities of labels, whose logarithm is still to be taken.
    is_probability: bool = False
    # (*grid) the network's label map; None means that it is still to be made from the logits
    labels: Labels | None = None
    # The part of the grid that is refined, or that tiles cover; None means all of it.
    box: Box | None = None
    problem: TileProblem | None = None  # that on tiles; None means all labels everywhere
    # (*tiles), sum over the voxels inside the mask of the largest logit, bias included, over the
    # temperature; None without tiles
    largest_sums: Float64 | None = None
    # (L,), voxels that each label gains by strokes before the mean field; None means none, or that
    # no volumes are kept
    gained: NDArray[np.int64] | None = None
    num_padding: int = 0  # voxels in the mask that are padding
    notes: tuple[Note, ...] = ()  # for the user
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage

    def image_in(self, box: Box) -> Float32:
        """Return the normalized image in a box of the grid, (M, *box)."""
        values = self.image.values
        if self.box is None:
            return values[(slice(None), *box)]
        # Values outside the image's box are those at its faces: they do not matter outside the
        # mask.
        inner = [np.arange(len(values))]
        for along, of_image in zip(box, self.box, strict=True):
            first = of_image.start
            places = np.arange(along.start, along.stop)
            inner.append(places.clip(first, of_image.stop - 1) - first)
        return values[np.ix_(*inner)]
