"""Strokes that correct a network's result: an edit of its logits near the voxels that somebody drew.

A drawn voxel is fixed. Around it, the logit of its label rises by
`strength * temperature * exp(-d² / 2 r² - Δ² / 2 s²)` at a voxel that is d mm away and whose
normalized intensities differ by Δ; the largest rise counts. r is the distance from the drawn voxel
to the nearest voxel of its label in the network's label map, so that a stroke reaches as far as the
error that it corrects. Where the network has the label already, nothing rises. See
docs/guide/strokes.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, Box, count_labels, widen
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS, RegionScheme
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import StorageOrder
from crfrefine.errors import InputError
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE, LabelSets, TileGrid
from crfrefine.refinement.tiles.problem import ChannelSource

if TYPE_CHECKING:
    from crfrefine.parameters.sections import StrokesParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.planning import TilePlan

BACKGROUND = 255  # value of a drawn voxel that is background; 0 means that nothing was drawn
# Rise of the logit at a drawn voxel over the temperature; labels of maps are 2, or at most 7, apart.
STRENGTH, STRENGTH_OF_LABELS, STRENGTH_OF_SHARES = 7.5, 3.0, 8.0
MIN_RADIUS = 1.5  # smallest r in mm
# Largest r over the edge of a cube as large as the structure, which a wrong stroke would take; half
# of the reach is always allowed.
SHARE_OF_EDGE = 0.25
NUM_RADII = 3.0  # radii after which a rise ends: it is 1 % of the strength there
# Nats over the temperature below the largest logit from which on a rise changes nothing around.
RULED_OUT = 20.0


@dataclass(frozen=True, eq=False)
class Strokes:
    """The drawn voxels of a case."""

    positions: NDArray[np.int64]  # (axes, N), indices of voxels
    labels: NDArray[np.int64]  # (N,), their labels; 0 is background
    shape: tuple[int, ...]  # (*grid)

    @classmethod
    def of_array(
        cls, values: Array, shape: Sequence[int], num_labels: int, *, background: int | None = None, ignore: int = 0, name: str = "strokes"
    ) -> Strokes | None:
        """Return the drawn voxels of an array, (*grid) whole numbers; None if nothing is drawn."""
        # A value is `ignore` where nothing was drawn, a label, or `background` for label 0; None means 255, or
        # 0 with another `ignore`. Raises InputError for other shapes or values, or if half is drawn.
        if values.shape != tuple(shape):
            raise InputError(f"{name}: shape {values.shape}; expected that of the image, {tuple(shape)}, without a label axis")
        if values.dtype.kind not in "iub":
            if values.dtype.kind != "f" or not (values == np.rint(values)).all():
                raise InputError(f"{name}: expected whole numbers: {ignore} where nothing is drawn, the label elsewhere")
            values = values.astype(np.int64)
        if background is None:
            background = BACKGROUND if ignore == 0 else 0
        if background == ignore:
            raise InputError(f"{name}: {ignore} cannot mean both that nothing is drawn and that background is")
        order = StorageOrder.of_memory(values)
        drawn = order.to_storage(values != ignore)
        stored = np.unravel_index(np.flatnonzero(drawn), drawn.shape)  # faster than np.nonzero by far
        positions = np.stack([stored[order.axes.index(axis)] for axis in range(values.ndim)])
        positions = positions[:, np.lexsort(positions[::-1])]
        labels = values[tuple(positions)].astype(np.int64)
        unknown = (labels != background) & ((labels < (0 if ignore else 1)) | (labels >= num_labels))
        if unknown.any():
            numbers = ", ".join(map(str, np.unique(labels[unknown])[:5].tolist()))
            raise InputError(
                f"{name}: has the values {numbers}; expected {ignore} where nothing is drawn, {background} for "
                f"background, and labels below {num_labels}. Files of another convention: --strokes-background VALUE, "
                "--strokes-ignore VALUE"
            )
        if 2 * len(labels) > values.size:
            raise InputError(
                f"{name}: {len(labels)} of {values.size} voxels are drawn; expected a few strokes. Is it a label map? If {ignore} is a "
                "label there, --strokes-ignore is the value of voxels where nothing is drawn"
            )
        labels[labels == background] = 0
        return cls(positions, labels, tuple(shape)) if len(labels) else None

    def in_storage(self, order: StorageOrder) -> Strokes:
        """Return the strokes for a grid whose axes are in storage order."""
        return replace(self, positions=self.positions[list(order.axes)], shape=tuple(self.shape[axis] for axis in order.axes))

    def on_tiles(self) -> Strokes:
        """Return the strokes for a grid of three axes, the leading ones of one voxel."""
        lead = MAX_DIMS - len(self.shape)
        positions = np.concatenate([np.zeros((lead, len(self.labels)), np.int64), self.positions])
        return replace(self, positions=positions, shape=(1,) * lead + self.shape)

    def describe(self) -> str:
        """Return a note on what was drawn."""
        counts = Counter(self.labels.tolist())
        return f"strokes: {', '.join(f'{counts[label]} voxels of label {label}' for label in sorted(counts))}"

    def inside(self, mask: Bool | None) -> Strokes:
        """Return the drawn voxels inside a mask."""
        if mask is None:
            return self
        chosen = mask[tuple(self.positions)]
        return replace(self, positions=self.positions[:, chosen], labels=self.labels[chosen])

    def draw(self, label_map: Labels) -> Labels:
        """Return a label map with the drawn voxels."""
        if (label_map[tuple(self.positions)] == self.labels).all():
            return label_map
        label_map = label_map.copy(order="K")
        label_map[tuple(self.positions)] = self.labels
        return label_map


def combine(several: Sequence[Strokes], names: Sequence[str]) -> Strokes | None:
    """Return the strokes of several files of a case as one; raise InputError if they contradict each other."""
    if len(several) < 2:
        return several[0] if several else None
    shape, first = several[0].shape, several[0]
    labels = np.concatenate([strokes.labels for strokes in several])
    flat = np.concatenate([np.ravel_multi_index(tuple(strokes.positions), shape) for strokes in several])
    places, chosen, own = np.unique(flat, return_index=True, return_inverse=True)
    contradicts = np.unique(flat[labels != labels[chosen][own]])
    if contradicts.size:
        shown = ", ".join(str(tuple(map(int, np.unravel_index(place, shape)))) for place in contradicts[:3])
        raise InputError(
            f"{' and '.join(names)}: contradict each other at {contradicts.size} voxels, such as {shown}; give one file, or erase the "
            "voxels in one of them"
        )
    return replace(first, positions=np.stack(np.unravel_index(places, shape)), labels=labels[chosen])


@dataclass(frozen=True, eq=False)
class Rise:
    """A rise of one channel in a box of whole tiles."""

    channel: int
    box: Box
    values: Float32  # (*box)


@dataclass(frozen=True, eq=False)
class StrokeModel:
    """What the rises depend on besides the strokes."""

    parameters: StrokesParameters
    model: ModelSpec  # of the case
    spacing: Sequence[float]  # mm along each axis
    mask: Bool | None  # (*grid), True where the model applies
    normalized: Callable[[Box], Float32]  # returns the normalized image of a box, (M, *box)
    is_label_map: bool  # whether the network's output is a label map; logits near ABSENT_LOGIT then count as 0 where they rise

    def rises(self, strokes: Strokes, channel: int, chosen: Bool, has_label: Bool, sign: float = 1.0) -> Iterator[Rise]:
        """Yield the rises of a channel around the `chosen`, (N,), in boxes without a voxel that two of them change."""
        # `has_label`, (*grid): the network has their label already; `sign`: -1 for log-odds that fall.
        strength = STRENGTH
        if self.is_label_map:
            strength = STRENGTH_OF_LABELS if self.model.kernels.network_spacing is None else STRENGTH_OF_SHARES
        strength *= sign * self.model.mean_field.temperature
        far = [NUM_RADII * max(MIN_RADIUS, self.parameters.reach) / step for step in self.spacing]
        volume = np.count_nonzero(has_label) * math.prod(self.spacing)
        tiles = ((1,) * len(far) + TILE)[-len(far) :]
        # Where the network has the label already, there is no error to follow.
        chosen = chosen & ~has_label[tuple(strokes.positions)]
        for members in _groups(strokes.positions[:, chosen], strokes.shape, far):
            low, high = members.min(axis=1), members.max(axis=1) + 1
            box = tuple(
                slice(max(0, math.floor(a - more)) // tile * tile, min(-(-math.ceil(b + more) // tile) * tile, extent))
                for a, b, more, extent, tile in zip(low, high, far, strokes.shape, tiles, strict=True)
            )
            start = np.array([[axis.start] for axis in box])
            closeness = self._closeness(members - start, self._radii(members - start, has_label[box], volume), self.normalized(box))
            if self.mask is not None:
                closeness *= self.mask[box]
            yield Rise(channel, box, closeness * np.float32(strength))

    def _radii(self, positions: NDArray[np.int64], has_label: Bool, volume: float) -> NDArray[np.float64]:
        """Return the distance in mm from drawn voxels to the nearest one of their label, of `volume` mm³, within the allowed range."""
        from scipy.ndimage import binary_erosion
        from scipy.spatial import KDTree

        reach, steps = max(MIN_RADIUS, self.parameters.reach), np.array(self.spacing)[:, None]
        if not has_label.any():
            return np.full(positions.shape[1], reach)
        highest = min(reach, max(MIN_RADIUS, reach / 2, SHARE_OF_EDGE * volume ** (1 / has_label.ndim)))
        ends = np.ceil(highest / steps).astype(np.int64)
        start = np.maximum(0, positions - ends).min(axis=1, keepdims=True)
        near = has_label[tuple(map(slice, start.ravel(), (positions + ends).max(axis=1) + 1))]
        surface = np.argwhere(near & ~binary_erosion(near, border_value=1))
        distance, _ = KDTree(surface * steps.T).query(((positions - start) * steps).T, distance_upper_bound=highest)
        radii: NDArray[np.float64] = np.clip(distance, MIN_RADIUS, highest)
        return radii

    def _closeness(self, positions: NDArray[np.int64], radii: NDArray[np.float64], image: Float32) -> Float32:
        """Return the largest exp(-d² / 2 r² - Δ² / 2 s²) over the drawn voxels, (*box); 0 beyond NUM_RADII radii."""
        shape = image.shape[1:]
        image = image * np.float32(1.0 / self.parameters.likeness)
        lowest = np.full(shape, np.inf, np.float32)  # d² / r² + Δ² / s²
        for position, radius in zip(positions.T.tolist(), radii.tolist(), strict=True):
            ends = [math.floor(NUM_RADII * radius / step) for step in self.spacing]
            near = tuple(slice(max(0, at - end), at + end + 1) for at, end in zip(position, ends, strict=True))
            part = image[(slice(None), *near)]
            at_stroke = image[(slice(None), *position)]
            total = np.zeros(part.shape[1:], np.float32)
            for axis, (at, step, along) in enumerate(zip(position, self.spacing, near, strict=True)):
                offsets = (np.arange(along.start, along.start + part.shape[axis + 1]) - at) * (step / radius)
                total += np.square(offsets, dtype=np.float32).reshape([-1 if other == axis else 1 for other in range(len(shape))])
            total[total > np.float32(NUM_RADII**2)] = np.inf
            for modality, value in zip(part, at_stroke, strict=True):
                difference = modality - value
                total += np.square(difference, out=difference)
            np.minimum(lowest[near], total, out=lowest[near])
        lowest *= np.float32(-0.5)
        return np.exp(lowest, out=lowest)


def _groups(positions: NDArray[np.int64], shape: Sequence[int], far: Sequence[float]) -> Iterator[NDArray[np.int64]]:
    """Yield drawn voxels in groups; two voxels of different groups are farther apart than twice `far`, in voxels, along some axis."""
    from scipy.ndimage import label as connect

    cell = np.array([[max(1, math.ceil(extent))] for extent in far])
    counts = [-(-extent // int(size)) for extent, size in zip(shape, cell[:, 0], strict=True)]
    occupied = np.zeros(counts, np.bool_)
    cells = tuple(positions // cell)
    occupied[cells] = True
    numbers, count = connect(widen(occupied, (1,) * len(shape)), structure=np.ones((3,) * len(shape)))
    of_voxel = numbers[cells]
    for number in range(1, count + 1):
        yield positions[:, of_voxel == number]


@dataclass(frozen=True, eq=False)
class Edits:
    """The changes that strokes make to the logits of a case, in storage order."""

    strokes: Strokes  # inside the mask
    rises: tuple[Rise, ...]
    fixed: NDArray[np.float32]  # (channels, N), the logits at the drawn voxels
    lifts_absent: bool = False  # see `StrokeModel.is_label_map`

    @classmethod
    def of_labels(cls, strokes: Strokes, model: StrokeModel, labels: Labels, num_labels: int) -> Edits:
        """Return the edits of (num_labels, *grid) logits; `labels`, (*grid), is the network's label map."""
        strokes = strokes.inside(model.mask)
        rises = [
            rise
            for label in np.unique(strokes.labels).tolist()
            for rise in model.rises(strokes, label, strokes.labels == label, labels == label)
        ]
        fixed = np.full((num_labels, len(strokes.labels)), ABSENT_LOGIT, np.float32)
        fixed[strokes.labels, np.arange(len(strokes.labels))] = 0.0
        return cls(strokes, tuple(rises), fixed, model.is_label_map)

    @classmethod
    def of_regions(cls, strokes: Strokes, model: StrokeModel, log_odds: Float32, scheme: RegionScheme) -> Edits:
        """Return the edits of (R, *grid) log-odds: a drawn voxel is inside of the regions that have its label, and outside of others."""
        strokes = strokes.inside(model.mask)
        rises: list[Rise] = []
        fixed = np.empty((len(log_odds), len(strokes.labels)), np.float32)
        for region, members in enumerate(scheme.labels):
            inside = np.isin(strokes.labels, members)
            fixed[region] = np.where(inside, MAX_LOG_ODDS, -MAX_LOG_ODDS)
            for chosen, sign in ((inside, 1.0), (~inside, -1.0)):
                if chosen.any():
                    rises += model.rises(strokes, region, chosen, (log_odds[region] > 0) == (sign > 0), sign)
        return cls(strokes, tuple(rises), fixed)

    def apply(self, logits: Float32) -> None:
        """Change logits or log-odds, (channels, *grid), in place."""
        for rise in self.rises:
            self.raise_logits(logits[rise.channel][rise.box], rise.values)
        logits[(slice(None), *self.strokes.positions)] = self.fixed

    def find_ruled_out(self, logits: Float32, temperature: float) -> tuple[str, ...]:
        """Return a note if the network's logits, (L, *grid), rule out labels where they are drawn: voxels around do not follow."""
        drawn, labels = logits[(slice(None), *self.strokes.positions)], self.strokes.labels
        behind = drawn.max(axis=0) - drawn[labels, np.arange(len(labels))] > RULED_OUT * temperature
        if not behind.any():
            return ()
        which = ", ".join(map(str, np.unique(labels[behind]).tolist()))
        return (
            f"strokes: the network rules out label {which} by more than {RULED_OUT:g} nats at {np.count_nonzero(behind)} drawn voxels; "
            "voxels around them hardly follow: draw all of the error there, or raise mean_field.temperature",
        )

    def raise_logits(self, logits: Float32, rise: Float32) -> None:
        """Add a rise to logits in place."""
        if self.lifts_absent:
            np.copyto(logits, np.float32(0.0), where=(rise > 0) & (logits < 0.5 * ABSENT_LOGIT))
        logits += rise

    def edit_plan(self, plan: TilePlan, *, counts_gains: bool) -> tuple[TilePlan, NDArray[np.int64] | None]:
        """Return the plan of a run on tiles in which labels take part where their logits rise, too."""
        # With `counts_gains` the second value, (L,), has the voxels that each label gains by that.
        problem = plan.problem
        grid, strokes = problem.grid, self.strokes
        changed = np.zeros_like(problem.present)
        tiles = tuple(axis // tile for axis, tile in zip(strokes.positions, TILE, strict=True))
        for label, *place in zip(strokes.labels.tolist(), *tiles, strict=True):
            changed[label][tuple(place)] = True
        for rise in self.rises:
            first = [axis.start // tile for axis, tile in zip(rise.box, TILE, strict=True)]
            risen = TileGrid(rise.values.shape).reduced(np.maximum, rise.values, np.float32) > MIN_RISE
            changed[rise.channel][tuple(slice(a, a + n) for a, n in zip(first, risen.shape, strict=True))] |= risen
        source = StrokedChannels(problem.source, self, grid)
        problem = replace(problem, source=source, present=problem.present | changed, may_matter=problem.may_matter | changed)
        sets = problem.label_sets()
        near = LabelSets(grid, sets.domains & changed.any(axis=0))
        if not problem.spec.kernels.kernels:  # Nothing changes elsewhere.
            sets = near
        plan = replace(plan, problem=problem, sets=sets)
        if not counts_gains:
            return plan, None
        source.ensure(near.domains & near.active, None)
        gained = np.zeros(len(near.domains), np.int64)
        for channels, sign in ((source, 1), (source.source, -1)):
            labels = np.zeros(grid.shape, np.uint16)
            if near.num_entries:
                near.engine(problem.mask, 1).decode(channels.of_entries(near, 1), labels)
            gained += sign * np.array(count_labels(labels, len(gained)))
        return plan, gained


MIN_RISE = 0.1  # nats of a rise below which a label need not take part in a tile


@dataclass(eq=False)
class StrokedChannels(ChannelSource):
    """The channels of another source, some planes of the grid from `first_plane` on, changed by strokes."""

    source: ChannelSource
    edits: Edits
    grid: TileGrid  # the tiles of these planes
    first_plane: int = 0

    def __post_init__(self) -> None:
        self.is_probability = self.source.is_probability

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """See `ChannelSource`."""
        self.source.ensure(domains, threads)

    def planes(self, start: int, stop: int) -> StrokedChannels:
        """See `ChannelSource`."""
        part = TileGrid((stop - start, *self.grid.shape[1:]))
        return StrokedChannels(self.source.planes(start, stop), self.edits, part, self.first_plane + start)

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """See `ChannelSource`."""
        self.source.fill_entries(engine, label, tiles, entries, out)
        places = np.stack(np.unravel_index(tiles, self.grid.counts))
        places[0] += self.first_plane // TILE[0]  # tiles of the whole grid
        for rise in self.edits.rises:
            if rise.channel != label:
                continue
            part = TileGrid(rise.values.shape)
            own = places - np.array([[axis.start // tile] for axis, tile in zip(rise.box, TILE, strict=True)])
            among = np.flatnonzero(((own >= 0) & (own < np.array(part.counts)[:, None])).all(axis=0))
            values = np.empty((len(among), out.shape[1]), np.float32)
            part.engine(1).gather(rise.values, np.ravel_multi_index(tuple(own[:, among]), part.counts), values)
            logits = out[entries[among]]
            self.edits.raise_logits(logits, values)
            out[entries[among]] = logits
        positions, size = self.edits.strokes.positions, np.array(TILE)[:, None]
        drawn = positions // size
        drawn[0] -= self.first_plane // TILE[0]
        inside = np.flatnonzero((drawn[0] >= 0) & (drawn[0] < self.grid.counts[0]))
        of_drawn = np.ravel_multi_index(tuple(drawn[:, inside]), self.grid.counts)
        at = np.minimum(np.searchsorted(tiles, of_drawn), len(tiles) - 1)  # Tiles ascend.
        is_there = tiles[at] == of_drawn
        chosen = inside[is_there]
        offsets = np.ravel_multi_index(tuple(positions[:, chosen] % size), TILE)
        out[entries[at[is_there]], offsets] = self.edits.fixed[label, chosen]
