"""A volume, or a slab of one, with the labels that may take part in its tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.engines.grid_image import FeatureOrigin, first_inside
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid, num_rings

if TYPE_CHECKING:
    from crfrefine.arrays.intensity import IntensityMap
    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.grid import Extents
    from crfrefine.refinement.tiles.sources import ChannelSource


@dataclass(frozen=True)
class Slab:
    """Planes of a volume."""

    start: int  # the first plane
    stop: int  # the end of the planes
    first: int  # the first plane that takes part in the computation
    last: int  # the end of the planes that take part


@dataclass(frozen=True, eq=False)
class TileProblem:
    """A volume, or a slab of one."""

    grid: TileGrid  # the tiles
    source: ChannelSource  # the network's logits
    present: Bool  # (L, *tiles), where labels are present
    may_matter: Bool  # (L, *tiles), where they may become so; a superset
    image: GridImage  # the image; the mask is C-contiguous
    spec: ModelSpec  # the model of all labels
    threshold: float | None  # largest probability that counts as nothing, for the check at the borders of domains; None means no check
    maps: Sequence[IntensityMap] | None = None  # of the intensities of each modality, for an image that is not normalized
    # Logarithm of a probability; where all labels but one are below it, a voxel keeps the network's marginals; minus infinity: nowhere.
    settled: float = -math.inf
    precision: float = 0.0  # `mean_field.label_threshold`, by which `running.UNSENT` is measured
    largest_slab: int | None = None  # voxels of a slab and the planes beside it, if they are to be few

    @property
    def num_dims(self) -> int:
        """Axes of the original grid."""
        return len(self.image.spacing)

    @cached_property
    def mask(self) -> Bool | None:
        """(*grid) of three axes, True where the model applies; None: everywhere."""
        return None if self.image.mask is None else self.image.mask.reshape(self.grid.shape)

    @cached_property
    def reach(self) -> Extents:
        """Voxels along each axis after which every kernel ends, or the grid."""
        return self.spec.kernels.reach(self.image.spacing, self.grid.shape)

    def label_sets(self) -> LabelSets:
        """Return the labels of each tile: those that are present around it and may matter there.

        Farther from where it is present a label cannot rise, as `check_entries` in the C++ engine confirms.
        """
        domains, rings = np.zeros_like(self.present), num_rings(self.reach)
        for label in np.flatnonzero(self.present.any(axis=(1, 2, 3))):
            domains[label] = widen(self.present[label], rings) & self.may_matter[label]
        return LabelSets(self.grid, domains)

    def normalized(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return normalized planes of the slowest of three axes, (M, planes, y, x) float32, C-contiguous."""
        part = self.image.values.reshape(-1, *self.grid.shape)[:, start:stop]
        if self.maps is None:
            return np.ascontiguousarray(part)
        result = np.empty(part.shape, np.float32)
        for source, target, mapped in zip(part, result, self.maps, strict=True):
            mapped.apply(source, target)
        return result

    def with_origin(self) -> TileProblem:
        """Return the problem with the origin of features that engines would take by themselves."""
        lowest = np.full(len(self.image.values), np.inf)
        for start in range(0, self.grid.shape[0], 2 * TILE[0]):
            values = self.normalized(start, start + 2 * TILE[0])
            where = True if self.mask is None else self.mask[start : start + 2 * TILE[0]]
            lowest = np.minimum(lowest, values.min(axis=(1, 2, 3), where=where, initial=np.inf))
        first = (0,) * self.num_dims if self.image.mask is None else first_inside(self.image.mask)
        return replace(self, image=replace(self.image, origin=FeatureOrigin(first, tuple(lowest.tolist()))))

    def in_slab(self, slab: Slab) -> TileProblem:
        """Return the planes that take part in a slab, with their normalized image; an origin is there."""
        values, mask = self.normalized(slab.first, slab.last), None if self.mask is None else self.mask[slab.first : slab.last]
        return replace(
            self,
            grid=TileGrid((slab.last - slab.first, *self.grid.shape[1:])),
            source=self.source.planes(slab.first, slab.last),
            present=rows_of(self.present, slab),
            may_matter=rows_of(self.may_matter, slab),
            image=replace(self.image, values=values, mask=mask, origin=self.image.origin_from(slab.first)),
            maps=None,
        )


def rows_of(tiles: Bool, slab: Slab) -> Bool:
    """Return the tiles, (…, *tiles), of the planes that take part in a slab."""
    return tiles[..., slab.first // TILE[0] : -(-slab.last // TILE[0]), :, :]
