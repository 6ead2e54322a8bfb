"""Strokes that correct a network's result, as an edit of its logits near the drawn voxels.

A drawn voxel is fixed. Around it, the logit of its label rises by `strength * temperature * exp(-d²
/ 2 r² - Δ² / 2 s²)` at a voxel that is d mm away and whose normalized intensities differ by Δ; the
largest rise counts. r is the distance from the drawn voxel to the nearest voxel of its label in the
network's label map, so that a stroke covers the error that it corrects. Where the network has
the label already, nothing rises. A rise depends only on the network, the image and the voxels that
are drawn there. Strokes elsewhere do not matter, and groups, boxes and tiles only save time. See
docs/guide/strokes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, MIN_SHARE, Box, count_labels, widen
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, RegionScheme
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import SAME_LENGTH, StorageOrder
from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.refinement.tiles.grid import (
    TILE,
    EntryNumbers,
    LabelSets,
    TileGrid,
    TileNumbers,
    box_between,
    tiles_around,
)
from crfrefine.refinement.tiles.problem import ChannelSource

if TYPE_CHECKING:
    from crfrefine.parameters.sections import StrokesParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.problem import TilePlan

Integers = NDArray[np.int64]

BACKGROUND = 255  # value of a drawn voxel that is background; 0 means that nothing was drawn
OTHER_NUMBERS = "`crfrefine convert --map OLD=NEW` gives strokes with other numbers these"
# Rise of the logit at a drawn voxel over the temperature; labels of maps are 2, or at most 7,
# apart.
STRENGTH = 7.5
STRENGTH_OF_LABELS = 3.0
STRENGTH_OF_SHARES = 8.0
MIN_RADIUS = 1.5  # smallest r in mm
# Largest r over the edge of a cube as large as all voxels of the label in the network's label map,
# which a wrong stroke would take; half of the reach is always allowed.
SHARE_OF_EDGE = 0.25
NUM_RADII = 3.0  # radii after which a rise ends: it is 1 % of the strength there
# Nats over the temperature below the largest logit from which on a rise changes nothing around.
RULED_OUT = 20.0


@dataclass(frozen=True, eq=False)
class Strokes:
    """The drawn voxels of a case."""

    positions: Integers  # (axes, N), indices of voxels
    labels: Integers  # (N,), their labels; 0 is background

    @classmethod
    def of_array(
        cls,
        values: Array,
        shape: Sequence[int],
        num_labels: int,
        *,
        name: str = "strokes",
    ) -> Strokes | None:
        """Return the drawn voxels of an array, (*grid) whole numbers; None if nothing is drawn.

        A value is 0 where nothing was drawn, a label, or 255 for background. Raises InputError for
        other shapes or values, or if half is drawn.
        """
        if values.shape != tuple(shape):
            expected = f"expected that of the image, {tuple(shape)}, without a label axis"
            raise InputError(f"{name}: shape {values.shape}; {expected}")
        values = _whole_numbers(values, name)
        order = StorageOrder.of_memory(values)
        drawn = order.to_storage(values != 0)
        # np.nonzero is slow
        voxels = np.flatnonzero(drawn)
        stored = np.stack(np.unravel_index(voxels, drawn.shape))
        positions = stored[np.argsort(order.axes)]
        labels = values[tuple(positions)].astype(np.int64)
        is_label = (labels >= 1) & (labels < num_labels)
        is_label |= labels == BACKGROUND
        unknown = np.unique(labels[~is_label])
        if len(unknown):
            numbers = ", ".join(str(number) for number in unknown[:5].tolist())
            raise InputError(
                f"{name}: has the values {numbers}; expected 0 where nothing is drawn, "
                f"{BACKGROUND} for background, and labels below {num_labels}. {OTHER_NUMBERS}"
            )
        if 2 * len(labels) > values.size:
            raise InputError(
                f"{name}: {len(labels)} of {values.size} voxels are drawn; expected a few strokes. "
                f"Is it a label map? {OTHER_NUMBERS}"
            )
        if not len(labels):
            return None
        labels[labels == BACKGROUND] = 0
        return cls(positions, labels)

    def draw(self, label_map: Labels) -> Labels:
        """Return a label map with the drawn voxels."""
        if (label_map[tuple(self.positions)] != self.labels).any():
            label_map = label_map.copy(order="K")
            label_map[tuple(self.positions)] = self.labels
        return label_map


def _whole_numbers(values: Array, name: str) -> Array:
    """Return the values in a type of whole numbers; InputError if they are others."""
    if values.dtype.kind in "iub":
        return values
    is_float = values.dtype.kind == "f"
    if is_float and ((values == np.rint(values)) & (abs(values) < 2**53)).all():
        return values.astype(np.int64)
    expected = "0 where nothing is drawn, the label elsewhere"
    raise InputError(f"{name}: expected whole numbers: {expected}")


def combine(several: Sequence[Strokes], names: Sequence[str]) -> Strokes | None:
    """Return the strokes of several files of a case as one.

    InputError if they contradict each other.
    """
    if not several:
        return None
    rows = []
    for strokes in several:
        rows.append(np.vstack([strokes.positions, strokes.labels]))
    drawn = np.unique(np.concatenate(rows, axis=1), axis=1)
    positions = drawn[:-1]
    later = positions[:, 1:]
    is_repeated = (later == positions[:, :-1]).all(axis=0)
    repeated = np.unique(later[:, is_repeated], axis=1)
    contradictions = repeated.T.tolist()
    if contradictions:
        shown = ", ".join(str(tuple(place)) for place in contradictions[:3])
        count = counted(len(contradictions), "voxel")
        raise InputError(
            f"{' and '.join(names)}: contradict each other at {count}, such as "
            f"{shown}; give one file, or erase the voxels in one of them"
        )
    return Strokes(positions, drawn[-1])


def plan_edits(
    strokes: Strokes,
    parameters: StrokesParameters,
    model: ModelSpec,
    spacing: Sequence[float],
    mask: Bool | None,
    normalized: Callable[[Box], Float32],
    network: Array,
    regions: RegionScheme | None = None,
    *,
    is_label_map: bool,
) -> Edits:
    """Return the edits of a case in storage order, whose grid may have further leading axes.

    Args:
        strokes: the drawn voxels.
        parameters: reach and likeness.
        model: of the case, or of any of its regions.
        spacing: mm along each axis of the image.
        mask: (*grid), True where the model applies; None means everywhere.
        normalized: returns the normalized image of a box, (M, *box).
        network: the network's label map, (*grid), or (R, *grid) log-odds of regions.
        regions: a drawn voxel is inside of those that have its label, and outside of others.
        is_label_map: whether the network's output is a label map.
    """
    shape = network.shape if regions is None else network.shape[1:]
    num_leading = len(shape) - len(spacing)
    spacing = (*(1.0,) * num_leading, *spacing)
    labels = strokes.labels
    positions = np.pad(strokes.positions, ((num_leading, 0), (0, 0)))
    if mask is not None:
        is_inside = mask[tuple(positions)]
        positions = positions[:, is_inside]
        labels = labels[is_inside]
    if regions is None:
        members = labels == np.arange(model.mean_field.num_labels)[:, None]
        fixed = np.where(members, 0.0, ABSENT_LOGIT)
    else:
        members = np.stack([np.isin(labels, region) for region in regions.labels])
        fixed = np.where(members, MAX_LOG_ODDS, -MAX_LOG_ODDS)

    strength_of_map = STRENGTH_OF_LABELS
    lifted: float | None = 0.0
    if model.kernels.network_spacing is not None:
        strength_of_map = STRENGTH_OF_SHARES
        lifted = math.log(MIN_SHARE)
    if not is_label_map:
        lifted = None
    strength = model.mean_field.temperature * (strength_of_map if is_label_map else STRENGTH)
    rises = []
    for target in _targets(members, network, are_regions=regions is not None):
        # Where the network has the label already, there is no error to follow.
        is_right = target.has_label[tuple(positions)]
        is_wrong = target.is_drawn & ~is_right
        rise = strength
        if is_label_map and not target.has_label.any():
            # Where a map lacks a label, its logits are as far below others at any temperature.
            rise = max(strength, strength_of_map)
        for box, closeness in _closeness(
            positions[:, is_wrong], target.has_label, spacing, num_leading, parameters, normalized
        ):
            if mask is not None:
                closeness *= mask[box]
            values = closeness * np.float32(target.sign * rise)
            rises.append(Rise(target.channel, box, values))
    return Edits(
        positions, labels, rises, fixed.astype(np.float32), lifted if is_label_map else None
    )


class _Target(NamedTuple):
    """A channel that strokes raise, or lower."""

    channel: int
    sign: int  # 1 or -1
    is_drawn: Bool  # (N,), the drawn voxels that do so
    has_label: Bool  # (*grid), where the network agrees with them already


def _targets(members: Bool, network: Array, *, are_regions: bool) -> Iterator[_Target]:
    """Yield the channels to raise: those of labels that are drawn.

    Of regions, also those to lower, where others are drawn. The network is that of `plan_edits`.
    """
    for channel, is_drawn in enumerate(members):
        if not (are_regions or is_drawn.any()):
            continue
        has_label = network[channel] > 0 if are_regions else network == channel
        if is_drawn.any():
            yield _Target(channel, 1, is_drawn, has_label)
        if are_regions and not is_drawn.all():
            yield _Target(channel, -1, ~is_drawn, ~has_label)


def _closeness(
    positions: Integers,
    has_label: Bool,
    spacing: Sequence[float],
    num_leading: int,
    parameters: StrokesParameters,
    normalized: Callable[[Box], Float32],
) -> Iterator[tuple[Box, Float32]]:
    """Yield the largest exp(-d² / 2 r² - Δ² / 2 s²) over drawn voxels, in boxes of whole tiles.

    No voxel has a value above 0 in two of the boxes. `has_label` is True at the voxels of the grid
    where the network has the label of the drawn voxels already. The first `num_leading` axes are
    not the image's.
    """
    reach = max(MIN_RADIUS, parameters.reach)
    largest_radius = reach
    num_voxels = np.count_nonzero(has_label)
    if num_voxels:
        volume = num_voxels * math.prod(spacing)
        edge = volume ** (1 / (has_label.ndim - num_leading))
        largest_radius = min(reach, max(MIN_RADIUS, reach / 2, SHARE_OF_EDGE * edge))
    ends = NUM_RADII * reach / np.array(spacing)
    for members, box in _groups(positions, ends, has_label.shape):
        radii = _radii(members, has_label, largest_radius, spacing)
        start = np.array([[along.start] for along in box])
        image = normalized(box) * np.float32(1.0 / parameters.likeness)
        closeness = _lowest_distance(members - start, radii, image, spacing)
        closeness *= np.float32(-0.5)
        yield box, np.exp(closeness, out=closeness)


def _groups(
    positions: Integers, ends: NDArray[np.float64], shape: Sequence[int]
) -> Iterator[tuple[Integers, Box]]:
    """Yield groups of drawn voxels, and the box of tiles within `ends` voxels of each group."""
    from scipy.ndimage import label as connect

    num_dims = len(shape)
    tile = np.array(((1,) * num_dims + TILE)[-num_dims:])
    # Voxels of different groups of cells are farther apart than twice the ends along some axis.
    cell = np.ceil(ends).clip(1).astype(np.int64)
    cells = tuple(positions // cell[:, None])
    num_cells = -(-np.array(shape) // cell)
    occupied = np.zeros(num_cells, np.bool_)
    occupied[cells] = True
    neighbors = np.ones((3,) * num_dims)
    around = widen(occupied, (1,) * num_dims)
    numbers, count = connect(around, neighbors)
    for number in range(1, count + 1):
        members = positions[:, numbers[cells] == number]
        lowest = np.floor(members.min(axis=1) - ends)
        highest = np.ceil(members.max(axis=1) + 1 + ends)
        start = np.maximum(0, lowest).astype(np.int64) // tile * tile
        stop = -(-highest.astype(np.int64) // tile) * tile
        yield members, box_between(start, np.minimum(stop, shape))


def _lowest_distance(
    positions: Integers, radii: Float32, image: Float32, spacing: Sequence[float]
) -> Float32:
    """Return the lowest d² / r² + Δ² / s² over drawn voxels, (*box); the image is divided by s."""
    shape = image.shape[1:]
    lowest = np.full(shape, np.inf, np.float32)
    for position, radius in zip(positions.T.tolist(), radii.tolist(), strict=True):
        ranges = []
        for place, step, extent in zip(position, spacing, shape, strict=True):
            end = math.floor(NUM_RADII * radius / step * (1.0 + SAME_LENGTH))
            first = max(0, place - end)
            stop = min(place + end + 1, extent)
            ranges.append(range(first, stop))
        near = tuple(slice(along.start, along.stop) for along in ranges)
        part = image[(slice(None), *near)]
        total = np.zeros(part.shape[1:], np.float32)
        for along, place, step in zip(np.ix_(*ranges), position, spacing, strict=True):
            distance = (along - place) * (step / radius)
            total += np.square(distance, dtype=np.float32)
        # A voxel at the last radius is near, however its distance was rounded.
        total[total > np.float32(NUM_RADII**2 * (1.0 + SAME_LENGTH))] = np.inf
        for modality, at_stroke in zip(part, image[(slice(None), *position)], strict=True):
            total += np.square(modality - at_stroke)
        np.minimum(lowest[near], total, out=lowest[near])
    return lowest


def _radii(
    positions: Integers, has_label: Bool, largest_radius: float, spacing: Sequence[float]
) -> Float32:
    """Return the mm from drawn voxels to the nearest one of their label, within limits."""
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    steps = np.array(spacing)
    ends = np.ceil(largest_radius / steps).astype(np.int64)
    start = np.maximum(0, positions.min(axis=1) - ends)
    stop = positions.max(axis=1) + ends + 1
    near = has_label[box_between(start, stop)]
    radii = np.full(positions.shape[1], largest_radius)
    if near.any():
        # Beyond the box counts as inside: the voxel nearest to one in the box is no face of the
        # box.
        surface = np.argwhere(near & ~binary_erosion(near, border_value=1))
        drawn = positions.T - start
        tree = KDTree(surface * steps)
        _, nearest = tree.query(drawn * steps, distance_upper_bound=largest_radius)
        found = nearest < len(surface)
        places = surface[nearest[found]]
        offsets = (places - drawn[found]) * steps
        distances = np.sqrt(np.square(offsets).sum(axis=1))
        radii[found] = distances.clip(MIN_RADIUS, largest_radius)
    # Of two voxels at the same distance either may be found, and their sums are rounded
    # differently.
    return radii.astype(np.float32)


class Rise(NamedTuple):
    """What strokes add to the logits of a channel in a box."""

    channel: int
    box: Box  # of whole tiles
    values: Float32  # (*box)


class RiseInTiles(NamedTuple):
    """What strokes add to the logits of a channel in some tiles."""

    channel: int
    tiles: TileNumbers  # (n,), ascending
    values: Float32  # (n, voxels of a tile)


@dataclass(frozen=True, eq=False)
class Edits:
    """The changes that strokes make to the logits of a case, in storage order."""

    positions: Integers  # (axes, N), the drawn voxels inside the mask
    labels: Integers  # (N,), their labels
    rises: list[Rise]
    fixed: Float32  # (channels, N), the logits at the drawn voxels
    # what logits near ABSENT_LOGIT, as of label maps, count as where they rise; None: themselves
    lifted: float | None

    def apply(self, logits: Float32) -> None:
        """Change logits or log-odds, (channels, *grid), in place."""
        for rise in self.rises:
            channel = logits[rise.channel]
            self.raise_logits(channel[rise.box], rise.values)
        logits[(slice(None), *self.positions)] = self.fixed

    def find_ruled_out(
        self, logits: Float32, temperature: float, *, are_regions: bool
    ) -> tuple[str, ...]:
        """Return a note if the network rules out labels where they are drawn.

        Voxels around do not follow then. The network's logits or log-odds are (channels, *grid).
        """
        drawn = logits[(slice(None), *self.positions)]
        behind = np.where(self.fixed > 0, -drawn, drawn)
        labels_drawn = self.labels
        if not are_regions:
            logits_of_labels = drawn[labels_drawn, np.arange(len(labels_drawn))]
            behind = behind - logits_of_labels
        is_ruled_out = behind.max(axis=0) > RULED_OUT * temperature
        if not is_ruled_out.any():
            return ()
        labels = np.unique(labels_drawn[is_ruled_out]).tolist()
        count = counted(int(np.count_nonzero(is_ruled_out)), "drawn voxel")
        return (
            f"strokes: the network rules out label {', '.join(str(label) for label in labels)} "
            f"by more than {RULED_OUT:g} nats at {count}; voxels around hardly follow: draw all of "
            "the error there, or raise mean_field.temperature",
        )

    def raise_logits(self, logits: Float32, rise: Float32) -> None:
        """Add a rise to logits in place."""
        if self.lifted is not None:
            is_lifted = (rise > 0) & (logits < 0.5 * ABSENT_LOGIT)
            np.copyto(logits, np.float32(self.lifted), where=is_lifted)
        logits += rise

    def edit_plan(self, plan: TilePlan) -> EditedPlan:
        """Return the plan of a run on tiles in which labels take part where their logits rise, too.

        The rises of the edits move into it.
        """
        problem = plan.problem
        grid = problem.grid
        tile = np.array(TILE)[:, None]
        places, offsets = np.divmod(self.positions, tile)
        changed = np.zeros_like(problem.presence.present)
        changed[(self.labels, *places)] = True
        rises = []
        numbers = np.arange(grid.num_tiles).reshape(grid.counts)
        while self.rises:  # Rises by tile take the place of those by box, the last one first.
            channel, box, values = self.rises.pop()
            tiles = numbers[tiles_around(box)].ravel()
            values = TileGrid(values.shape).gather(values, np.arange(len(tiles)), 1)
            rises.append(RiseInTiles(channel, tiles, values))
            by_tile = changed[channel].reshape(-1)
            by_tile[tiles] |= values.any(axis=1)
        tiles = np.ravel_multi_index(tuple(places), grid.counts)
        offsets = np.ravel_multi_index(tuple(offsets), TILE)
        source = StrokedChannels(problem.source, self, rises, tiles, offsets, grid)
        problem = replace(problem, source=source, presence=problem.presence.joined(changed))
        sets = problem.label_sets()
        near = LabelSets(grid, sets.domains & changed.any(axis=0))
        # Without kernels nothing changes elsewhere, unless tiles were to be computed before.
        is_local = not problem.spec.kernels.kernels and not plan.sets.active.any()
        plan = replace(plan, problem=problem, sets=near if is_local else sets)
        return EditedPlan(plan, source, near)


class EditedPlan(NamedTuple):
    """The plan of a run on tiles with strokes."""

    plan: TilePlan
    source: StrokedChannels  # the channels of the plan
    near: LabelSets  # the labels of the tiles where logits change

    def count_gains(self) -> Integers:
        """Return the voxels that each label gains by the strokes before the mean field, (L,)."""
        source = self.source
        source.ensure(self.near.domains & self.near.active, None)
        return self._count_labels(source) - self._count_labels(source.source)

    def _count_labels(self, channels: ChannelSource) -> Integers:
        """Return the voxels of the largest logits of each label near the strokes, (L,)."""
        near = self.near
        labels = np.zeros(near.grid.shape, np.uint16)
        if near.num_entries:
            engine = near.engine(self.plan.problem.mask, 1)
            engine.decode(channels.of_entries(near, 1), labels)
        return np.array(count_labels(labels, len(near.domains)))


@dataclass(eq=False)
class StrokedChannels(ChannelSource):
    """The channels of another source, some planes of the grid, changed by strokes."""

    source: ChannelSource
    edits: Edits
    rises: list[RiseInTiles]
    tiles: TileNumbers  # (N,), the tile of each drawn voxel
    offsets: Integers  # (N,), the voxel's number in its tile
    grid: TileGrid  # of the whole
    # the number of these planes' first tile; numbers are those of the whole grid
    first_tile: int = 0

    @property
    def num_bytes(self) -> int:
        """See `ChannelSource`."""
        return self.source.num_bytes

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """See `ChannelSource`."""
        self.source.ensure(domains, threads)

    def planes(self, start: int, stop: int) -> StrokedChannels:
        """See `ChannelSource`."""
        first_tile = self.first_tile + self.grid.first_tile(start)
        return replace(self, source=self.source.planes(start, stop), first_tile=first_tile)

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        self.source.fill_entries(engine, label, tiles, entries, out)

        def find(searched: TileNumbers) -> tuple[EntryNumbers, Integers]:
            """Return the entries of searched tiles that are among these, and their places."""
            numbers = searched - self.first_tile
            places = np.searchsorted(tiles, numbers)
            nearest = np.minimum(places, len(tiles) - 1)
            places = np.flatnonzero(tiles[nearest] == numbers)
            return entries[nearest[places]], places

        for rise in self.rises:
            if rise.channel == label:
                changed, places = find(rise.tiles)
                logits = out[changed]
                self.edits.raise_logits(logits, rise.values[places])
                out[changed] = logits
        changed, places = find(self.tiles)
        out[changed, self.offsets[places]] = self.edits.fixed[label, places]
