"""A volume, or a slab of one, whose mean field runs on tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.intensity import IntensityMap
from crfrefine.arrays.label_maps import Box, dilated
from crfrefine.base.array_types import Array, Bool, Float32, Shape
from crfrefine.base.numerics import CHANNEL_GROUP, TRUNCATION_RADIUS
from crfrefine.engines.base import FeatureOrigin, GridImage, first_inside
from crfrefine.engines.choices import MAX_DIRECT_REACH
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.channels import ChannelSource
from crfrefine.refinement.tiles.grid import (
    LabelSets,
    TileGrid,
    label_sets,
    num_rings,
    tile_layers,
)
from crfrefine.refinement.tiles.survey import Thresholds

if TYPE_CHECKING:
    from crfrefine.refinement.edits import Edits


# Kinds of kernels that tiles have sums for; others are filtered as on a whole volume.
DIRECT_KINDS = frozenset({"bilateral", "spatial"})
BALL = 4.0 / 3.0 * math.pi  # volume of a ball of radius 1


@dataclass(frozen=True, eq=False)
class TileProblem:
    """A volume, or a slab of one, and the labels that take part in its tiles."""

    source: ChannelSource  # the network's logits in the whole volume
    sets: LabelSets  # the labels of the tiles
    present: Bool  # (L, *tiles), where labels are present
    may_matter: Bool  # (L, *tiles), where they may matter; a superset
    image: GridImage
    spec: ModelSpec  # the model of all labels
    # `mean_field.label_threshold`, the largest probability that counts as nothing
    threshold: float
    # Those of the labels in tiles. Where all labels but one are below `may_matter`, a voxel keeps
    # the network's marginals.
    thresholds: Thresholds
    # How each modality is normalized, where that is still to be done; None means that it is done.
    maps: Sequence[IntensityMap] | None = None
    # Most voxels of a slab and the planes beside it; None means any number.
    largest_slab: int | None = None
    is_direct: bool | None = None  # whether sums are direct; None means whichever is less work
    edits: Edits | None = None  # the strokes' changes of the logits
    first_tile: int = 0  # of a slab, the number of its first tile

    @property
    def grid(self) -> TileGrid:
        """The tiles."""
        return self.sets.grid

    @property
    def checks_borders(self) -> bool:
        """Whether domains grow where a label exceeds the threshold near the border."""
        return not self.thresholds.leave_out_nothing

    @cached_property
    def mask(self) -> Bool | None:
        """(*grid) of three axes, True where the model applies; None means everywhere."""
        return self.grid.mask(self.image.mask)

    @cached_property
    def reach(self) -> Shape:
        """Voxels along each axis after which every kernel ends, or the grid."""
        return self.spec.kernels.reach(self.image.spacing, self.grid.shape)

    @property
    def num_pairs(self) -> float:
        """Voxels that a direct sum visits for one voxel: those in its kernels' windows.

        0 if direct sums are asked for, infinite if they are impossible. The spatial kernel's sums
        are separable and count as nothing.
        """
        kernels = self.spec.kernels
        if max(self.reach) > MAX_DIRECT_REACH or kernels.filter not in ("auto", "truncated"):
            return math.inf
        if any(kernel.kind not in DIRECT_KINDS for kernel in kernels.kernels):
            return math.inf
        if kernels.filter == "truncated":
            return 0.0
        voxel = math.prod(kernels.distances(self.image.spacing))
        windows = 0.0
        for kernel in kernels.bilateral:
            reach = [TRUNCATION_RADIUS * theta for theta in kernel.theta_position]
            windows += math.prod(reach)
        return BALL * windows / voxel

    @cached_property
    def num_tiles_around(self) -> int:
        """Tiles that messages of active ones reach."""
        around = dilated(self.sets.active, num_rings(self.reach))
        return int(np.count_nonzero(around))

    @property
    def num_filtered_tiles(self) -> int:
        """Tiles around the active ones that filters take, once for each channel group."""
        most_labels = int(self.sets.num_labels_of.max())
        num_groups = math.ceil(most_labels / CHANNEL_GROUP)
        return self.num_tiles_around * num_groups

    def with_presence(self, present: Bool, may_matter: Bool) -> TileProblem:
        """Return the problem with labels present in other tiles, (L, *tiles) each."""
        sets = label_sets(self.grid, present, may_matter, self.reach)
        return replace(self, sets=sets, present=present, may_matter=may_matter)

    def logits(self, threads: int | None) -> Float32:
        """Return the logits of the labels that take part in tiles, (entries, voxels of a tile)."""
        logits = self.source.of_entries(self.sets, threads, self.first_tile)
        if self.edits is not None:
            self.edits.apply_to_tiles(logits, self.sets, self.source.grid, self.first_tile)
        return logits

    def normalized(self, box: Box = ()) -> Float32:
        """Return the normalized image in a box of three axes, (M, *box) float32, C-contiguous."""
        values = self.image.values
        by_axis = values.reshape(-1, *self.grid.shape)
        return self._normalize(by_axis[(slice(None), *box)])

    def _normalize(self, values: Array) -> Float32:
        """Return intensities of the image, (M, ...), normalized, C-contiguous."""
        if self.maps is None:
            return np.ascontiguousarray(values)
        result = np.empty(values.shape, np.float32)
        for source, target, mapped in zip(values, result, self.maps, strict=True):
            mapped.apply(source, target)
        return result

    @cached_property
    def origin(self) -> FeatureOrigin:
        """The origin of features that engines would take by themselves for the whole volume."""
        values = self.image.values
        mask = self.image.mask
        where = True if mask is None else mask
        # The map of a modality keeps the order of intensities.
        lowest = [of_one.min(where=where, initial=of_one.max()) for of_one in values]
        normalized = self._normalize(np.array(lowest)[:, None])
        return first_inside(mask, values.shape[1:]), tuple(normalized.ravel().tolist())

    def in_slab(self, planes: slice) -> TileProblem:
        """Return the problem of some planes, which begin and end with a tile, or with the grid.

        Its image is normalized, and has the origin of the whole.
        """
        (first, *others), lowest = self.origin
        mask = None if self.mask is None else self.mask[planes]
        values = self.normalized((planes,))
        origin = ((first - planes.start, *others), lowest)
        layers = tile_layers(planes)
        grid = self.grid.with_planes(planes)
        return replace(
            self,
            sets=LabelSets(grid, self.sets.domains[:, layers]),
            present=self.present[:, layers],
            may_matter=self.may_matter[:, layers],
            image=replace(self.image, values=values, mask=mask, origin=origin),
            maps=None,
            first_tile=self.grid.tiles_in(planes).start,
        )
