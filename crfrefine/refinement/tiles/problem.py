"""A volume, or a slab of one, whose mean field runs on tiles, and the channels that it starts from.

`ChannelSource` gives the logits of labels in tiles; here are those of an array and of a label map.
`TilePlan` has the inputs of a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import (
    ABSENT_LOGIT,
    CONFIDENCE,
    Box,
    bounding_box,
    grown,
    log_shares,
    widen,
)
from crfrefine.base.array_types import Bool, Float32, Float64, Labels
from crfrefine.base.workers import run_all
from crfrefine.engines.base import FeatureOrigin, GridImage, first_inside
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.grid import (
    TILE,
    TILE_VOXELS,
    EntryNumbers,
    Extents,
    LabelSets,
    TileGrid,
    TileNumbers,
    box_between,
    num_rings,
    tile_rows,
)

if TYPE_CHECKING:
    from crfrefine.arrays.intensity import IntensityMap
    from crfrefine.refinement.tiles.survey import Presence


class ChannelSource(ABC):
    """The channels of a network's output."""

    @property
    def num_bytes(self) -> int:
        """The bytes that it has added to the input of the run."""
        return 0

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Make sure that labels can be had in some tiles, (L, *tiles).

        It may take another reading of a file.
        """
        return  # Channels in memory are there.

    def of_entries(self, sets: LabelSets, threads: int | None) -> Float32:
        """Return the logits of the labels that take part in tiles, (entries, voxels of a tile)."""
        values = np.empty((sets.num_entries, TILE_VOXELS), np.float32)
        engine = sets.grid.engine(threads)
        for label, (tiles, entries) in enumerate(sets.entries):
            if len(tiles):
                self.fill_entries(engine, label, tiles, entries, values)
        return values

    @abstractmethod
    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """Write a label's logits in some tiles to entries of `out`, (entries, voxels of a tile)."""

    @abstractmethod
    def planes(self, start: int, stop: int) -> ChannelSource:
        """Return the source of some planes, which begin and end with a tile, or with the grid."""


@dataclass(eq=False)
class DenseChannels(ChannelSource):
    """Channels in an array."""

    values: Float32  # (L, *grid) of three grid axes, with consecutive voxels along the last one
    is_probability: bool  # whether the values are probabilities, whose logarithm is taken

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        engine.fill_entries(self.values[label], True, tiles, self.is_probability, entries, out)

    def planes(self, start: int, stop: int) -> DenseChannels:
        """See `ChannelSource`."""
        return DenseChannels(self.values[:, start:stop], self.is_probability)


# Voxels of a tile and its surroundings up to which each tile is searched for a label by itself.
MAX_NEIGHBORHOOD = 1 << 17


@dataclass(eq=False)
class LabelMapChannels(ChannelSource):
    """The logits of a label map (`crfrefine.arrays.label_maps`), made where they are asked for.

    They are asked for in some planes; voxels of other planes count as neighbors.
    """

    numbers: Labels  # (z, y, x) channel of each voxel's label, C-contiguous
    reach: Extents  # voxels within which a label takes part
    first_plane: int
    num_planes: int

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        size = 1
        for tile, extent in zip(TILE, self.reach, strict=True):
            size *= tile + 2 * extent
        if size > MAX_NEIGHBORHOOD:
            engine.fill_entries(self.channel(label), True, tiles, False, entries, out)
            return
        logits = (CONFIDENCE, 0.0, ABSENT_LOGIT)
        engine.fill_labels(
            self.numbers, self.first_plane, label, self.reach, logits, tiles, entries, out
        )

    def planes(self, start: int, stop: int) -> LabelMapChannels:
        """See `ChannelSource`."""
        return replace(self, first_plane=self.first_plane + start, num_planes=stop - start)

    def channel(self, label: int) -> NDArray[np.float16]:
        """Return a label's logits in the planes that are asked for."""
        first = self.first_plane
        stop = self.first_plane + self.num_planes
        reach = self.reach[0]
        start = max(0, first - reach)
        occurs = self.numbers[start : stop + reach] == label
        logits = np.full(occurs.shape, ABSENT_LOGIT, np.float16)

        box = bounding_box(occurs)
        if box is not None:
            around = grown(box, self.reach, occurs.shape)
            is_near = widen(occurs[around], self.reach)
            logits[around][is_near] = 0.0
            logits[occurs] = CONFIDENCE
        return logits[first - start : stop - start]


_MAX_ROWS = 4  # rows of tiles whose shares are computed at once


@dataclass(eq=False)
class ShareChannels(ChannelSource):
    """Logarithms of the shares of labels in the map of a coarse network."""

    numbers: Labels  # (z, y, x) channel of each voxel's label, C-contiguous
    sigma: Sequence[float]  # the result of `share_sigma`, along three axes
    first_plane: int
    num_planes: int

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        plane_shape = self.numbers.shape[1:]
        grid = TileGrid((self.num_planes, *plane_shape))
        shares = partial(log_shares, self.numbers, label, self.sigma)
        fill_by_rows(grid, self.first_plane, shares, tiles, entries, out, num_rows=_MAX_ROWS)

    def planes(self, start: int, stop: int) -> ShareChannels:
        """See `ChannelSource`."""
        return replace(self, first_plane=self.first_plane + start, num_planes=stop - start)


def fill_by_rows(
    grid: TileGrid,
    first_plane: int,
    values_of: Callable[[Box], Float32],
    tiles: TileNumbers,
    entries: EntryNumbers,
    out: Float32,
    *,
    num_rows: int = 1,
    threads: int = 1,
) -> None:
    """Fill entries as `ChannelSource.fill_entries` does, a few rows of tiles at a time.

    The grid begins at `first_plane` of the grid that boxes are in; `values_of` makes the values of
    a box, which lies around the tiles of some rows.
    """
    places = np.stack(np.unravel_index(tiles, grid.counts))
    group_of = places[0] // num_rows

    def fill(group: int) -> None:
        chosen = np.flatnonzero(group_of == group)
        first = places[:, chosen].min(axis=1)
        end = places[:, chosen].max(axis=1) + 1
        planes, *others = grid.voxels_in(box_between(first, end))
        planes = slice(planes.start + first_plane, planes.stop + first_plane)
        values = values_of((planes, *others))

        part = TileGrid(values.shape)
        places_in_part = places[:, chosen] - first[:, None]
        in_part = np.ravel_multi_index(tuple(places_in_part), part.counts)
        values = np.ascontiguousarray(values)
        out[entries[chosen]] = part.gather(values, in_part, 1)

    jobs = [partial(fill, group) for group in np.unique(group_of)]
    run_all(jobs, threads)


# ---- The volume


@dataclass(frozen=True)
class Slab:
    """Planes of a volume, and those beside them that take part in the computation."""

    start: int  # the first plane
    stop: int  # the end of the planes
    first: int  # the first plane that takes part
    last: int  # the end of the planes that take part

    @property
    def planes(self) -> slice:
        """The planes that take part."""
        return slice(self.first, self.last)

    @property
    def num_planes(self) -> int:
        """The number of planes that take part."""
        return self.last - self.first

    @property
    def rows(self) -> slice:
        """The rows of tiles that take part."""
        return tile_rows(self.first, self.last)


@dataclass(frozen=True, eq=False)
class TileProblem:
    """A volume, or a slab of one."""

    grid: TileGrid  # the tiles
    source: ChannelSource  # the network's logits
    presence: Presence  # where labels are
    image: GridImage  # the image; the mask is C-contiguous
    spec: ModelSpec  # the model of all labels
    # Largest probability that counts as nothing, for the check at the borders of domains; None
    # means no check.
    threshold: float | None
    # One of each modality, for an image that is not normalized; None means that it is.
    maps: Sequence[IntensityMap] | None = None
    # Logarithm of a probability; where all labels but one are below it, a voxel keeps the network's
    # marginals. Minus infinity means nowhere.
    settled: float = -math.inf
    precision: float = 0.0  # `mean_field.label_threshold`, by which `running.UNSENT` is measured
    # Most voxels of a slab and the planes beside it; None means any number.
    largest_slab: int | None = None

    @cached_property
    def mask(self) -> Bool | None:
        """(*grid) of three axes, True where the model applies; None means everywhere."""
        mask = self.image.mask
        if mask is None:
            return None
        return mask.reshape(self.grid.shape)

    @cached_property
    def reach(self) -> Extents:
        """Voxels along each axis after which every kernel ends, or the grid."""
        return self.spec.kernels.reach(self.image.spacing, self.grid.shape)

    def label_sets(self) -> LabelSets:
        """Return the labels of each tile: those that are present around it and may matter there."""
        # Farther away than that a label cannot rise, as the C++ engine confirms.
        present, may_matter = self.presence
        domains = np.zeros_like(present)
        rings = num_rings(self.reach)
        for label in np.flatnonzero(present.any(axis=(1, 2, 3))):
            near = widen(present[label], rings)
            domains[label] = near & may_matter[label]
        return LabelSets(self.grid, domains)

    def normalized(self, box: Box = ()) -> Float32:
        """Return the normalized image in a box of three axes, (M, *box) float32, C-contiguous."""
        values = self.image.values
        by_axis = values.reshape(-1, *self.grid.shape)
        part = by_axis[(slice(None), *box)]
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
            planes = slice(start, start + 2 * TILE[0])
            values = self.normalized((planes,))
            where = True if self.mask is None else self.mask[planes]
            of_planes = values.min(axis=(1, 2, 3), where=where, initial=np.inf)
            lowest = np.minimum(lowest, of_planes)

        position = (0,) * len(self.image.spacing)
        if self.image.mask is not None:
            position = first_inside(self.image.mask)
        origin = FeatureOrigin(position, tuple(lowest.tolist()))
        return replace(self, image=replace(self.image, origin=origin))

    def in_slab(self, slab: Slab) -> TileProblem:
        """Return the planes that take part in a slab, with their normalized image.

        The problem has the origin of `with_origin`.
        """
        origin = self.image.origin
        assert origin is not None
        first, *others = origin.position
        position = (first - slab.first, *others)
        mask = None if self.mask is None else self.mask[slab.planes]
        values = self.normalized((slab.planes,))
        origin = replace(origin, position=position)
        image = replace(self.image, values=values, mask=mask, origin=origin)
        return replace(
            self,
            grid=self.grid.with_planes(slab.num_planes),
            source=self.source.planes(slab.first, slab.last),
            presence=self.presence.in_rows(slab.rows),
            image=image,
            maps=None,
        )


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The inputs of a run on tiles."""

    problem: TileProblem  # the volume
    sets: LabelSets  # the labels of its tiles
    # (*tiles), sum over the voxels inside the mask of the largest logit, bias included, over the
    # temperature
    best: Float64
    is_direct: bool | None = None  # whether sums are direct; None means whichever is less work
    box: Box | None = None  # the part of the grid that tiles cover; None means all of it
    # (*grid), the network's label map; None means that it is to be found
    labels: Labels | None = None
    notes: tuple[str, ...] = ()  # notes for the user, one sentence each
    num_padding: int = 0  # voxels in the mask where all logits were equal
