"""A case as it is refined, and as it is prepared.

`CaseToRefine` does not change. `Prepared` is filled step by step by `preparing` and
`tiles.planning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.arrays.network import LabelMapNetwork, Network
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.axes import Axes
from crfrefine.engines.results import label_map
from crfrefine.refinement.tiles.grid import MAX_DIMS
from crfrefine.refinement.tiles.survey import Thresholds, find_thresholds

if TYPE_CHECKING:
    from crfrefine.arrays.components import Cleaned
    from crfrefine.arrays.label_maps import Box
    from crfrefine.arrays.strokes import Strokes
    from crfrefine.base.array_types import Bool, Float32, Float64, Integers, Labels
    from crfrefine.base.notes import Notes
    from crfrefine.engines.base import Backend, GridImage, RunContext
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.problem import TileProblem


class CaseToRefine(NamedTuple):
    """A case that is checked and in storage order, unlike a `Case` of `crfrefine.cases`."""

    # Channels in memory are finite logits or probabilities, or log-odds of regions. A label map has
    # the numbers of channels. Channels in files are as they were given.
    network: Network
    image: GridImage  # raw intensities, and the user's mask without the voxels that are NaN
    parameters: CrfParameters  # of the labels that have channels
    model: ModelSpec  # of the labels, or of the regions
    backend: Backend
    context: RunContext
    order: Axes  # that the axes of the network's output are stored in
    channel_labels: Sequence[int]  # the label of each channel; empty for regions
    strokes: Strokes | None  # of labels that have channels, or of regions
    # A label map whose volumes are kept, after the small-object rules; None for others
    cleaned: Cleaned | None
    notes: Notes  # on the inputs, for the user

    @property
    def regions(self) -> RegionScheme | None:
        """The regions of the channels; None means that they are labels."""
        return self.network.regions

    @property
    def thresholds(self) -> Thresholds:
        """Those below which labels can be left out of tiles."""
        return find_thresholds(self.parameters.mean_field.label_threshold, self.model)

    @property
    def is_label_map(self) -> bool:
        """Whether the network's output is a label map."""
        return isinstance(self.network, LabelMapNetwork)

    @property
    def can_have_tiles(self) -> bool:
        """Whether labels can be left out on tiles, as only the C++ engine does."""
        has_labels = self.regions is None
        return has_labels and self.backend.name == "cpu" and len(self.image.spacing) <= MAX_DIMS

    @property
    def can_leave_out_labels(self) -> bool:
        """Whether labels are left out on tiles where they cannot matter."""
        return self.can_have_tiles and self.parameters.can_leave_out_labels

    def decode(self, channels: Float32) -> Labels:
        """Return the label map, (*grid), of channels, (channels, *grid)."""
        if self.regions is not None:
            return self.regions.decode(channels)
        return label_map(channels, self.context.threads)


@dataclass(eq=False)
class Prepared:
    """The inputs of a mean field, in storage order; a user's array is copied before it changes."""

    # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    logits: Float32
    image: GridImage  # raw, then normalized, of the box; with tiles that of their problem counts
    # (*grid), True inside the mask and outside the padding; None means everywhere
    mask: Bool | None
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
    gained: Integers | None = None
    # (*grid), True where the network saw nothing, inside the mask or outside; None means nowhere
    unseen: Bool | None = None
    num_padding: int = 0  # voxels in the mask that are padding
    notes: Notes = ()  # for the user
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
