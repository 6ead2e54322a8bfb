"""A volume, or a slab of one, whose mean field runs on tiles, and how much work that is.

Messages are direct sums, tile by tile, or come from filters of the whole volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import Box, count_inside, widen
from crfrefine.base.array_types import Bool, Float32
from crfrefine.engines.base import GridImage, first_inside
from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.sections import TRUNCATION_RADIUS
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.tiles.channels import ChannelSource
from crfrefine.refinement.tiles.grid import (
    TILE,
    TILE_VOXELS,
    Extents,
    LabelSets,
    TileGrid,
    num_rings,
    tile_layers,
)
from crfrefine.refinement.tiles.survey import Survey

if TYPE_CHECKING:
    from crfrefine.arrays.intensity import IntensityMap
    from crfrefine.refinement.strokes import Edits


@dataclass(frozen=True, eq=False)
class TileProblem:
    """A volume, or a slab of one, and the labels that take part in its tiles."""

    source: ChannelSource  # the network's logits in the whole volume
    sets: LabelSets  # the labels of the tiles
    present: Bool  # (L, *tiles), where labels are present
    may_matter: Bool  # (L, *tiles), where they may matter; a superset
    image: GridImage  # the image; the mask is C-contiguous
    spec: ModelSpec  # the model of all labels
    # `mean_field.label_threshold`, the largest probability that counts as nothing
    threshold: float
    checks_borders: bool = True  # whether domains grow where a label exceeds that near the border
    # Logarithm of a probability; where all labels but one are below it, a voxel keeps the network's
    # marginals. Minus infinity means nowhere.
    settled_below: float = -math.inf
    # One of each modality, for an image that is not normalized; None means that it is.
    maps: Sequence[IntensityMap] | None = None
    # Most voxels of a slab and the planes beside it; None means any number.
    largest_slab: int | None = None
    is_direct: bool | None = None  # whether sums are direct; None means whichever is less work
    edits: Edits | None = None  # the strokes' changes of the logits
    first_plane: int = 0  # of a slab, the number of its first plane

    @property
    def grid(self) -> TileGrid:
        """The tiles."""
        return self.sets.grid

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

    def with_presence(self, present: Bool, may_matter: Bool) -> TileProblem:
        """Return the problem with labels present in other tiles, (L, *tiles) each."""
        sets = label_sets(self.grid, present, may_matter, self.reach)
        return replace(self, sets=sets, present=present, may_matter=may_matter)

    def logits(self, threads: int | None) -> Float32:
        """Return the logits of the labels that take part in tiles, (entries, voxels of a tile)."""
        planes = slice(self.first_plane, self.first_plane + self.grid.shape[0])
        first_tile = self.source.grid.tiles_in(planes).start
        logits = self.source.of_entries(self.sets, threads, first_tile)
        if self.edits is not None:
            self.edits.apply_to_tiles(logits, self.sets, self.source.grid, first_tile)
        return logits

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
        origin = (position, tuple(lowest.tolist()))
        return replace(self, image=replace(self.image, origin=origin))

    def in_slab(self, planes: slice) -> TileProblem:
        """Return the problem of some planes, which begin and end with a tile, or with the grid.

        The problem has the origin of `with_origin`; the slab's image is normalized.
        """
        assert self.image.origin is not None
        (first, *others), lowest = self.image.origin
        mask = None if self.mask is None else self.mask[planes]
        values = self.normalized((planes,))
        origin = ((first - planes.start, *others), lowest)
        layers = tile_layers(planes.start, planes.stop)
        grid = self.grid.with_planes(planes.stop - planes.start)
        return replace(
            self,
            sets=LabelSets(grid, self.sets.domains[:, layers]),
            present=self.present[:, layers],
            may_matter=self.may_matter[:, layers],
            image=replace(self.image, values=values, mask=mask, origin=origin),
            maps=None,
            first_plane=planes.start,
        )


def label_sets(grid: TileGrid, present: Bool, may_matter: Bool, reach: Extents) -> LabelSets:
    """Return the labels of each tile: those that are present around it and may matter there.

    Where labels are is (L, *tiles) each; kernels end after `reach` voxels.
    """
    # Farther away than that a label cannot rise, as the C++ engine confirms.
    domains = np.zeros_like(present)
    rings = num_rings(reach)
    for label in np.flatnonzero(present.any(axis=(1, 2, 3))):
        near = widen(present[label], rings)
        domains[label] = near & may_matter[label]
    return LabelSets(grid, domains)


# ---- Work: whether tiles save any, and with which sums of messages

# voxels along an axis up to which sums are direct: else the copies of tiles outgrow the cache
MAX_DIRECT_REACH = 12
# Kinds of kernels that tiles have sums for; others are filtered as on a whole volume.
DIRECT_KINDS = frozenset({"bilateral", "spatial"})
BALL = 4.0 / 3.0 * math.pi  # volume of a ball of radius 1
# Pairs of a direct sum that take as long as a grid or a lattice for one voxel and up to GROUP
# channels; and for volumes that are streamed, where filters need arrays of all voxels around.
PAIRS_OF_FILTERS = 120
PAIRS_OF_LARGE_FILTERS = 400
GROUP = 4  # channels that are filtered together
# Share of the work with all labels below which tiles are used: with direct sums, with filters.
WORTH_TILES = 0.9
WORTH_CHANNELS = 0.5
# Share of a grid's rows that is filtered over that of uncertain voxels; work below which it is
# used.
ROWS_OF_UNCERTAIN = 6.0
WORTH_ROWS = 0.8


def count_pairs(problem: TileProblem) -> float:
    """Return the voxels in all windows; 0 if direct sums are asked for, infinite if impossible."""
    kernels = problem.spec.kernels
    if max(problem.reach) > MAX_DIRECT_REACH or kernels.filter not in ("auto", "truncated"):
        return math.inf
    if any(kernel.kind not in DIRECT_KINDS for kernel in kernels.kernels):
        return math.inf
    if kernels.filter == "truncated":
        return 0.0
    voxel = math.prod(kernels.distances(problem.image.spacing))
    windows = 0.0
    for kernel in kernels.bilateral:
        reach = [TRUNCATION_RADIUS * theta for theta in kernel.theta_position]
        windows += math.prod(reach)
    return BALL * windows / voxel


def sums_are_direct(problem: TileProblem) -> bool:
    """Return whether each voxel's window is summed directly.

    It is if that is asked for, or less work than a filter of all voxels around.
    """
    work = PAIRS_OF_LARGE_FILTERS * _filtered_tiles(problem)
    return count_pairs(problem) * len(problem.sets.tiles) <= work


def _num_tiles_around(problem: TileProblem) -> int:
    """Return the number of tiles that messages of active ones reach."""
    around = widen(problem.sets.active, num_rings(problem.reach))
    return int(np.count_nonzero(around))


def _filtered_tiles(problem: TileProblem) -> int:
    """Return the tiles around the active ones that filters take, once for each channel group."""
    most_labels = int(problem.sets.num_labels_of.max())
    num_groups = math.ceil(most_labels / GROUP)
    return _num_tiles_around(problem) * num_groups


def choose_tiles(problem: TileProblem, threads: int | None, survey: Survey) -> bool | None:
    """Return whether a case in memory has direct sums on tiles (True), or filters (False).

    None means that tiles save no work, and all labels take part everywhere.
    """
    sets = problem.sets
    if not sets.active.any():
        return True
    channels = problem.spec.mean_field.num_channels
    kernels = problem.spec.kernels
    num_voxels = count_inside(problem.mask, problem.grid.shape)
    if sets.num_entries * TILE_VOXELS >= WORTH_TILES * channels * num_voxels:
        return None
    name = kernels.filter
    if name == "auto" and kernels.bilateral:
        # The filter that the engine takes for the first kernel, with all labels everywhere.
        name = CpuBackend().plan_filters(problem.image, kernels, threads)[0]
    if name == "exact":
        return None  # So small that it does not matter.

    pairs = count_pairs(problem) * len(sets.tiles) * TILE_VOXELS
    everywhere = float(math.ceil(channels / GROUP) * num_voxels)
    on_tiles = float(_filtered_tiles(problem) * TILE_VOXELS)
    fewest_filtered = min(on_tiles, everywhere)
    are_few_pairs = name == "truncated" or pairs <= PAIRS_OF_FILTERS * fewest_filtered
    if pairs < math.inf and are_few_pairs:
        return True
    if name == "grid":
        # A grid filters only the rows of uncertain voxels. Besides the steps the work is the
        # normalization, twice with all labels everywhere, and what settled voxels send, the last
        # label included.
        steps = kernels.num_iterations * channels
        most_labels = int(sets.num_labels_of.max())
        around = _num_tiles_around(problem) * TILE_VOXELS * (1 + most_labels)
        share = min(1.0, ROWS_OF_UNCERTAIN * survey.uncertain_share(problem.settled_below))
        if around + num_voxels * steps * share < WORTH_ROWS * num_voxels * (2 + steps):
            return False
    if on_tiles < WORTH_CHANNELS * everywhere:
        return False
    return None
