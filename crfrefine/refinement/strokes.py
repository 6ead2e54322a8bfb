"""Strokes that correct a network's result: an edit of its logits near the voxels that somebody drew.

A drawn voxel is fixed. Around it, the logit of its label rises by `strength * temperature * exp(-d²
/ 2 r² - Δ² / 2 s²)` at a voxel that is d mm away and whose normalized intensities differ by Δ; the
largest rise counts. r is the distance from the drawn voxel to the nearest voxel of its label in the
network's label map, so that a stroke reaches as far as the error that it corrects. Where the
network has the label already, nothing rises. A rise depends on the network, the image and the
voxels that are drawn there alone: not on strokes elsewhere, nor on how groups, boxes and tiles
divide the grid, which only save time. See docs/guide/strokes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, Box, count_labels, widen
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, RegionScheme
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid
from crfrefine.refinement.tiles.problem import ChannelSource

if TYPE_CHECKING:
    from crfrefine.parameters.sections import StrokesParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.planning import TilePlan

Integers = NDArray[np.int64]

BACKGROUND = 255  # value of a drawn voxel that is background; 0 means that nothing was drawn
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
        background: int | None = None,
        ignore: int = 0,
        name: str = "strokes",
    ) -> Strokes | None:
        """Return the drawn voxels of an array, (*grid) whole numbers; None if nothing is drawn."""
        # A value is `ignore` where nothing was drawn, a label, or `background` for label 0; None
        # means 255, or 0 with another `ignore`. Raises InputError for other shapes or values, or if
        # half is drawn.
        if values.shape != tuple(shape):
            expected = f"expected that of the image, {tuple(shape)}, without a label axis"
            raise InputError(f"{name}: shape {values.shape}; {expected}")
        if values.dtype.kind not in "iub":
            if (
                values.dtype.kind != "f"
                or not ((values == np.rint(values)) & (abs(values) < 2**53)).all()
            ):
                expected = f"{ignore} where nothing is drawn, the label elsewhere"
                raise InputError(f"{name}: expected whole numbers: {expected}")
            values = values.astype(np.int64)
        if background is None:
            background = BACKGROUND if ignore == 0 else 0
        if background == ignore:
            both = "both that nothing is drawn and that background is"
            raise InputError(f"{name}: {ignore} cannot mean {both}")
        order = StorageOrder.of_memory(values)
        drawn = order.to_storage(values != ignore)
        # np.nonzero is slow
        stored = np.stack(np.unravel_index(np.flatnonzero(drawn), drawn.shape))
        positions = stored[np.argsort(order.axes)]
        labels = values[tuple(positions)].astype(np.int64)
        unknown = (labels != background) & (
            (labels < (0 if ignore else 1)) | (labels >= num_labels)
        )
        if unknown.any():
            numbers = ", ".join(map(str, np.unique(labels[unknown])[:5].tolist()))
            raise InputError(
                f"{name}: has the values {numbers}; expected {ignore} where nothing is drawn, "
                f"{background} for background, and labels below {num_labels}. Files of another "
                "convention: --strokes-background VALUE, --strokes-ignore VALUE"
            )
        if 2 * len(labels) > values.size:
            raise InputError(
                f"{name}: {len(labels)} of {values.size} voxels are drawn; expected a few strokes. Is "
                f"it a label map? If {ignore} is a label there, --strokes-ignore is the value of "
                "voxels where nothing is drawn"
            )
        labels[labels == background] = 0
        if len(labels):
            return cls(positions, labels)
        return None

    def draw(self, label_map: Labels) -> Labels:
        """Return a label map with the drawn voxels."""
        if (label_map[tuple(self.positions)] != self.labels).any():
            label_map = label_map.copy(order="K")
            label_map[tuple(self.positions)] = self.labels
        return label_map


def combine(several: Sequence[Strokes], names: Sequence[str]) -> Strokes | None:
    """Return the strokes of several files of a case as one.

    InputError if they contradict each other.
    """
    if not several:
        return None
    rows = [np.vstack([strokes.positions, strokes.labels]) for strokes in several]
    *positions, labels = drawn = np.unique(np.concatenate(rows, axis=1), axis=1)
    again = (drawn[:-1, 1:] == drawn[:-1, :-1]).all(axis=0)
    contradicts = np.unique(drawn[:-1, 1:][:, again], axis=1).T.tolist()
    if contradicts:
        shown = ", ".join(str(tuple(place)) for place in contradicts[:3])
        raise InputError(
            f"{' and '.join(names)}: contradict each other at {counted(len(contradicts), 'voxel')}, such as "
            f"{shown}; give one file, or erase the voxels in one of them"
        )
    return Strokes(np.stack(positions), labels)


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
    """Return the edits of a case in storage order, whose grid may have further leading axes."""
    # The `network` is its label map, (*grid), or (R, *grid) log-odds of regions: a drawn voxel is
    # inside of those that have its label, and outside of others. `normalized` returns the
    # normalized image of a box, (M, *box); the mask, (*grid), is True where the model applies.
    shape = network.shape if regions is None else network.shape[1:]
    lead = len(shape) - len(spacing)
    spacing = (*(1.0,) * lead, *spacing)
    labels = strokes.labels
    positions = np.pad(strokes.positions, ((lead, 0), (0, 0)))
    if mask is not None:
        positions, labels = positions[:, mask[tuple(positions)]], labels[mask[tuple(positions)]]
    of_map = STRENGTH_OF_LABELS if model.kernels.network_spacing is None else STRENGTH_OF_SHARES
    strength = model.mean_field.temperature * (of_map if is_label_map else STRENGTH)
    if regions is None:
        members = labels == np.arange(model.mean_field.num_labels)[:, None]
        fixed = np.where(members, 0.0, ABSENT_LOGIT)
    else:
        members = np.stack([np.isin(labels, own) for own in regions.labels])
        fixed = np.where(members, MAX_LOG_ODDS, -MAX_LOG_ODDS)
    rises = []
    for channel, inside in enumerate(members):
        for chosen, is_up in ((inside, True), (~inside, False))[: 1 if regions is None else 2]:
            if not chosen.any():
                continue
            has_label = network == channel if regions is None else (network[channel] > 0) == is_up
            # Where the network has the label already, there is no error to follow.
            wrong = positions[:, chosen & ~has_label[tuple(positions)]]
            # Where a map lacks a label, its logits are as far below others at any temperature.
            rise = strength if has_label.any() or not is_label_map else max(strength, of_map)
            for box, closeness in _closeness(
                wrong, has_label, spacing, lead, parameters, normalized
            ):
                if mask is not None:
                    closeness *= mask[box]
                rises.append((channel, box, closeness * np.float32(rise if is_up else -rise)))
    return Edits(positions, labels, rises, fixed.astype(np.float32), is_label_map)


def _closeness(
    positions: Integers,
    has_label: Bool,
    spacing: Sequence[float],
    lead: int,
    parameters: StrokesParameters,
    normalized: Callable[[Box], Float32],
) -> Iterator[tuple[Box, Float32]]:
    """Yield the largest exp(-d² / 2 r² - Δ² / 2 s²) over drawn voxels, in boxes of whole tiles."""
    # No voxel has a value above 0 in two of the boxes. `has_label`, (*grid): the network has the
    # label of the drawn voxels already. The first `lead` axes are not the image's.
    from scipy.ndimage import label as connect

    num_dims = has_label.ndim
    reach = max(MIN_RADIUS, parameters.reach)
    largest_radius = _largest_radius(has_label, spacing, num_dims - lead, reach)
    far = NUM_RADII * reach / np.array(spacing)
    tile = np.array(((1,) * num_dims + TILE)[-num_dims:])
    # Voxels of different groups of cells are farther apart than twice `far` along some axis.
    cell = np.maximum(1, np.ceil(far)).astype(np.int64)
    cells = tuple(positions // cell[:, None])
    occupied = np.zeros(-(-np.array(has_label.shape) // cell), np.bool_)
    occupied[cells] = True
    numbers, count = connect(widen(occupied, (1,) * num_dims), np.ones((3,) * num_dims))
    for number in range(1, count + 1):
        members = positions[:, numbers[cells] == number]
        low = np.maximum(0, np.floor(members.min(axis=1) - far)).astype(np.int64) // tile * tile
        high = -(-np.ceil(members.max(axis=1) + 1 + far).astype(np.int64) // tile) * tile
        high = np.minimum(high, has_label.shape)
        box = tuple(map(slice, low.tolist(), high.tolist()))
        radii = _radii(members, has_label, largest_radius, spacing)
        members = members - low[:, None]
        image = normalized(box) * np.float32(1.0 / parameters.likeness)
        lowest = np.full(image.shape[1:], np.inf, np.float32)  # d² / r² + Δ² / s²
        for position, radius in zip(members.T.tolist(), radii.tolist(), strict=True):
            ends = [math.floor(NUM_RADII * radius / step) for step in spacing]
            sides = zip(position, ends, image.shape[1:], strict=True)
            ranges = [range(max(0, at - end), min(at + end + 1, size)) for at, end, size in sides]
            near = tuple(slice(along.start, along.stop) for along in ranges)
            part = image[(slice(None), *near)]
            total = np.zeros(part.shape[1:], np.float32)
            for along, at, step in zip(np.ix_(*ranges), position, spacing, strict=True):
                total += np.square((along - at) * (step / radius), dtype=np.float32)
            total[total > np.float32(NUM_RADII**2)] = np.inf
            for modality, at_stroke in zip(part, image[(slice(None), *position)], strict=True):
                total += np.square(modality - at_stroke)
            np.minimum(lowest[near], total, out=lowest[near])
        lowest *= np.float32(-0.5)
        yield box, np.exp(lowest, out=lowest)


def _largest_radius(
    has_label: Bool, spacing: Sequence[float], num_image_axes: int, reach: float
) -> float:
    """Return the largest radius of strokes of a label in mm.

    `has_label` is that of the whole grid.
    """
    num_voxels = np.count_nonzero(has_label)
    if num_voxels == 0:
        return reach
    edge = (num_voxels * math.prod(spacing)) ** (1 / num_image_axes)
    return min(reach, max(MIN_RADIUS, reach / 2, SHARE_OF_EDGE * edge))


def _radii(
    positions: Integers, has_label: Bool, largest_radius: float, spacing: Sequence[float]
) -> Float32:
    """Return the distance in mm from drawn voxels to the nearest one of their label, within limits."""
    # No voxel beyond the largest radius matters, so that a box around the drawn ones is searched.
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    steps = np.array(spacing)
    ends = np.ceil(largest_radius / steps).astype(np.int64)
    start = np.maximum(0, positions.min(axis=1) - ends)
    stop = positions.max(axis=1) + ends + 1
    near = has_label[tuple(map(slice, start, stop))]
    radii = np.full(positions.shape[1], largest_radius)
    if near.any():
        # Beyond the box counts as inside: the voxel nearest to one in the box is no face of the
        # box.
        surface = np.argwhere(near & ~binary_erosion(near, border_value=1))
        drawn = positions.T - start
        tree = KDTree(surface * steps)
        _, nearest = tree.query(drawn * steps, distance_upper_bound=largest_radius)
        found = nearest < len(surface)
        offsets = (surface[nearest[found]] - drawn[found]) * steps
        distances = np.sqrt(np.square(offsets).sum(axis=1))
        radii[found] = distances.clip(MIN_RADIUS, largest_radius)
    # Of two voxels at the same distance either may be found, and their sums are rounded
    # differently.
    return radii.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Edits:
    """The changes that strokes make to the logits of a case, in storage order."""

    positions: Integers  # (axes, N), the drawn voxels inside the mask
    labels: Integers  # (N,), their labels
    # Channel, box of whole tiles, and (*box) what is added to the channel there.
    rises: list[tuple[int, Box, Float32]]
    fixed: Float32  # (channels, N), the logits at the drawn voxels
    # whether logits near ABSENT_LOGIT, as of label maps, count as 0 where they rise
    lifts_absent: bool

    def apply(self, logits: Float32) -> None:
        """Change logits or log-odds, (channels, *grid), in place."""
        for channel, box, values in self.rises:
            self.raise_logits(logits[channel][box], values)
        logits[(slice(None), *self.positions)] = self.fixed

    def find_ruled_out(
        self, logits: Float32, temperature: float, *, are_regions: bool
    ) -> tuple[str, ...]:
        """Return a note if the network's logits or log-odds, (channels, *grid), rule out labels where they are drawn."""
        # Voxels around do not follow then.
        drawn = logits[(slice(None), *self.positions)]
        own = 0.0 if are_regions else drawn[self.labels, np.arange(len(self.labels))]
        behind = (np.where(self.fixed > 0, -drawn, drawn) - own).max(
            axis=0
        ) > RULED_OUT * temperature
        if not behind.any():
            return ()
        which = ", ".join(map(str, np.unique(self.labels[behind]).tolist()))
        return (
            f"strokes: the network rules out label {which} by more than {RULED_OUT:g} nats at "
            f"{counted(int(np.count_nonzero(behind)), 'drawn voxel')}; voxels around hardly follow: draw all of "
            "the error there, or raise mean_field.temperature",
        )

    def raise_logits(self, logits: Float32, rise: Float32) -> None:
        """Add a rise to logits in place."""
        if self.lifts_absent:
            np.copyto(logits, np.float32(0.0), where=(rise > 0) & (logits < 0.5 * ABSENT_LOGIT))
        logits += rise

    def edit_plan(self, plan: TilePlan, *, counts_gains: bool) -> tuple[TilePlan, Integers | None]:
        """Return the plan of a run on tiles in which labels take part where their logits rise, too."""
        # With `counts_gains` the second value, (L,), has the voxels that each label gains by that.
        problem = plan.problem
        grid = plan.problem.grid
        changed = np.zeros_like(problem.present)
        places, offsets = np.divmod(self.positions, np.array(TILE)[:, None])
        changed[(self.labels, *places)] = True
        drawn = (
            np.ravel_multi_index(tuple(places), grid.counts),
            np.ravel_multi_index(tuple(offsets), TILE),
        )
        rises = []
        numbers = np.arange(grid.num_tiles).reshape(grid.counts)
        while self.rises:  # Rises by tile take the place of those by box.
            channel, box, values = self.rises.pop()
            of_box = tuple(
                slice(axis.start // n, -(-axis.stop // n))
                for axis, n in zip(box, TILE, strict=True)
            )
            tiles = numbers[of_box].ravel()
            rise = TileGrid(values.shape).gather(values, np.arange(len(tiles)), 1)
            changed[channel].reshape(-1)[tiles] |= rise.any(axis=1)
            rises.append((channel, tiles, rise))
        source = StrokedChannels(problem.source, self, rises, *drawn, grid)
        problem = replace(
            problem,
            source=source,
            present=problem.present | changed,
            may_matter=problem.may_matter | changed,
        )
        sets = problem.label_sets()
        near = LabelSets(grid, sets.domains & changed.any(axis=0))
        # Without kernels nothing changes elsewhere, unless tiles were to be computed before.
        is_local = not problem.spec.kernels.kernels and not plan.sets.active.any()
        plan = replace(plan, problem=problem, sets=near if is_local else sets)
        if not counts_gains:
            return plan, None
        source.ensure(near.domains & near.active, None)
        counts = []
        for channels in (source.source, source):
            labels = np.zeros(grid.shape, np.uint16)
            if near.num_entries:
                near.engine(problem.mask, 1).decode(channels.of_entries(near, 1), labels)
            counts.append(count_labels(labels, len(near.domains)))
        return plan, np.diff(counts, axis=0)[0]


@dataclass(eq=False)
class StrokedChannels(ChannelSource):
    """The channels of another source, some planes of the grid, changed by strokes."""

    source: ChannelSource
    edits: Edits
    # Channel, ascending tiles, and (tiles, voxels of a tile) what is added to the channel there.
    rises: list[tuple[int, Integers, Float32]]
    tiles: Integers  # (N,), the tile of each drawn voxel
    offsets: Integers  # (N,), the voxel's number in its tile
    grid: TileGrid  # of the whole
    # the number of these planes' first tile; numbers are those of the whole grid
    first_tile: int = 0

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """See `ChannelSource`."""
        self.source.ensure(domains, threads)

    def planes(self, start: int, stop: int) -> StrokedChannels:
        """See `ChannelSource`."""
        first_tile = self.first_tile + self.grid.first_tile(start)
        return replace(self, source=self.source.planes(start, stop), first_tile=first_tile)

    def fill_entries(
        self, engine: Any, label: int, tiles: Integers, entries: Integers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        self.source.fill_entries(engine, label, tiles, entries, out)

        def find(own: Integers) -> tuple[Integers, Integers]:
            """Return the entries of those of some tiles that are among these, and their places."""
            at = np.minimum(np.searchsorted(tiles, own - self.first_tile), len(tiles) - 1)
            some = np.flatnonzero(tiles[at] == own - self.first_tile)
            return entries[at[some]], some

        for channel, own, values in self.rises:
            if channel == label:
                where, some = find(own)
                logits = out[where]
                self.edits.raise_logits(logits, values[some])
                out[where] = logits
        where, some = find(self.tiles)
        out[where, self.offsets[some]] = self.edits.fixed[label, some]
