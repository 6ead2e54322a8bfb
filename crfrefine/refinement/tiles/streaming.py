"""A network's channels, streamed from a file in one pass: only tiles where a label may take part are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import widen
from crfrefine.arrays.probabilities import SUM_TOLERANCE, Look, decide
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.limits import format_size
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import MeanFieldSpec
from crfrefine.refinement.tiles.grid import TILE, Extents, TileGrid, num_rings
from crfrefine.refinement.tiles.problem import ChannelSource
from crfrefine.refinement.tiles.survey import Survey, Thresholds

if TYPE_CHECKING:
    from crfrefine.engines.base import RunContext
    from crfrefine.io.reading import Piece

# Returns the pieces of a network's output, from the beginning at each call.
ReadPieces = Callable[[], "Iterable[Piece]"]


@dataclass(frozen=True, eq=False)
class StreamedNetwork:
    """A network's output in files."""

    read: ReadPieces  # returns the pieces, from the beginning at each call
    num_labels: int  # L
    grid_shape: tuple[int, ...]  # in storage order
    input_type: str  # "auto", "logits" or "probabilities"
    kind: str | None  # the same if the file declares it
    path: Path  # the file, for messages


@dataclass(frozen=True)
class Brick:
    """Planes of a channel that begin and end with a tile, or with the grid."""

    label: int  # the channel
    first_plane: int  # number of the first plane
    values: Array  # (planes, y, x), C-contiguous

    def tiles(self, grid: TileGrid) -> slice:
        """Return the flat numbers of its tiles."""
        first = first_tile(grid, self.first_plane)
        return slice(first, first + TileGrid(self.values.shape).num_tiles)

    def gather(self, tiles: NDArray[np.int64], threads: int | None) -> Array:
        """Return (n, voxels of a tile), the values of some of its tiles, counted from its first one."""
        values = np.empty((len(tiles), math.prod(TILE)), self.values.dtype)
        if len(tiles):
            TileGrid(self.values.shape).engine(threads).gather(self.values, tiles, values)
        return values


def read_bricks(read: ReadPieces, grid: TileGrid) -> Iterator[Brick]:
    """Yield the bricks of pieces that come with ascending planes for each channel; planes of incomplete tiles wait."""
    # Types other than float32 and float16 are converted, exactly.
    num_planes, *plane_shape = grid.shape
    waiting: dict[int, Array] = {}
    for piece in read():
        for label, values in zip(range(piece.channels.start, piece.channels.stop), piece.values, strict=True):
            planes = values.reshape(-1, *plane_shape)
            first, stop = piece.planes.start, piece.planes.stop
            if len(planes) != stop - first:  # A grid of two axes: its planes are rows of the only plane.
                planes, first, stop = values.reshape(1, *plane_shape), 0, 1
            if label in waiting:
                held = waiting.pop(label)
                planes, first = np.concatenate([held, planes]), first - len(held)
            num_whole = len(planes) if stop == num_planes else len(planes) // TILE[0] * TILE[0]
            if num_whole < len(planes):
                waiting[label] = planes[num_whole:].copy()
            if num_whole:
                dtype = planes.dtype if planes.dtype in (np.float32, np.float16) else np.float32
                yield Brick(label, first, np.ascontiguousarray(planes[:num_whole], dtype))


class StoredChannels(ChannelSource):
    """Some tiles of each label's channel."""

    def __init__(self, grid: TileGrid, num_labels: int, *, is_probability: bool = False, read: ReadPieces | None = None) -> None:
        """Start with no tile; `read` returns the pieces, for tiles that are wanted later."""
        self._read = read
        self.grid = grid
        self.num_labels = num_labels
        self.is_probability = is_probability
        self._parts: list[list[tuple[NDArray[np.int64], Array]]] = [[] for _ in range(num_labels)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tiles."""
        return sum(values.nbytes for parts in self._parts for _, values in parts)

    def keep(self, label: int, tiles: NDArray[np.int64], values: Array) -> None:
        """Keep (n, voxels of a tile) float32 or float16 values of tiles of a label, all of them new."""
        if len(tiles):
            self._parts[label].append((tiles, values))

    def retain(self, label: int, wanted: Bool) -> None:
        """Forget a label's tiles except those that are True in `wanted`, (*tiles)."""
        tiles, values = self.joined(label)
        chosen = wanted.reshape(-1)[tiles]
        if not chosen.all():
            self._parts[label] = [(tiles[chosen], values[chosen])]

    def ensure(self, domains: Bool, threads: int | None) -> None:
        """Read tiles that are not kept yet."""
        missing = domains.copy()
        for label, tiles in enumerate(missing):
            tiles.reshape(-1)[self.joined(label)[0]] = False
        if not missing.any():
            return
        assert self._read is not None
        for brick in read_bricks(self._read, self.grid):
            own = brick.tiles(self.grid)
            tiles = np.flatnonzero(missing[brick.label].reshape(-1)[own])
            self.keep(brick.label, tiles + own.start, brick.gather(tiles, threads))

    def fill_entries(self, engine: Any, label: int, tiles: NDArray[np.int64], entries: NDArray[np.int64], out: Float32) -> None:
        """See `ChannelSource`."""
        kept, values = self.joined(label)
        if len(tiles) != len(kept):
            values = values[np.searchsorted(kept, tiles)]
        engine.fill_entries(values, False, tiles, self.is_probability, entries, out)

    def planes(self, start: int, stop: int) -> StoredChannels:
        """See `ChannelSource`."""
        first, end = first_tile(self.grid, start), first_tile(self.grid, stop + TILE[0] - 1)
        part = StoredChannels(TileGrid((stop - start, *self.grid.shape[1:])), self.num_labels, is_probability=self.is_probability)
        for label in range(self.num_labels):
            tiles, values = self.joined(label)
            chosen = slice(*np.searchsorted(tiles, (first, end)))
            part.keep(label, tiles[chosen] - first, values[chosen])
        return part

    def joined(self, label: int) -> tuple[NDArray[np.int64], Array]:
        """Return a label's tiles as ascending flat numbers, and their values, (n, voxels of a tile)."""
        parts = self._parts[label]
        if not parts:
            return np.zeros(0, np.int64), np.zeros((0, math.prod(TILE)), np.float32)
        if len(parts) > 1:
            joined, values = np.concatenate([tiles for tiles, _ in parts]), np.concatenate([values for _, values in parts])
            if (np.diff(joined) < 0).any():
                order = np.argsort(joined)
                joined, values = joined[order], values[order]
            parts[:] = [(joined, values)]
        return parts[0]


def first_tile(grid: TileGrid, plane: int) -> int:
    """Return the flat number of the first tile of the row of tiles that holds a plane."""
    return plane // TILE[0] * grid.counts[1] * grid.counts[2]


# Bytes of candidates at which it is first looked whether they all still matter.
FIRST_LOOK = 1 << 26


class Candidates:
    """Tiles where a label may take part, kept while the channels are surveyed; if there is no room for them, they are read once more."""

    def __init__(
        self, read: ReadPieces, thresholds: Thresholds, max_bytes: int | None, threads: int | None, reach: Extents | None = None
    ) -> None:
        """Start with no tile; the tiles that are kept take `max_bytes`, where None means any amount."""
        # With `reach`, as of `store`, tiles farther from those where a label may be present are not
        # kept: `store` would forget them.
        self._read, self._thresholds, self._threads = read, thresholds, threads
        self._rings = None if reach is None else num_rings(reach)
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._parts: dict[int, list[tuple[NDArray[np.int64], Array]]] | None = {}  # of each label; None if there was no room
        self._num_bytes, self._next_look = 0, min(FIRST_LOOK, self._max_bytes)

    def add(self, survey: Survey, brick: Brick) -> None:
        """Keep the tiles of a brick, just surveyed, where its label may matter beside those so far."""
        if self._parts is None:
            return
        tiles, values = self._tiles_of(survey, brick)
        self._parts.setdefault(brick.label, []).append((tiles, values))
        self._num_bytes += values.nbytes
        if self._num_bytes <= self._next_look:
            return
        # Beside later labels most of them no longer matter.
        for label, parts in self._parts.items():
            parts[:] = [self._that_matter(survey, label, *part, math.inf)[:2] for part in parts]
        self._num_bytes = sum(values.nbytes for parts in self._parts.values() for _, values in parts)
        self._next_look = min(max(2 * self._num_bytes, FIRST_LOOK), self._max_bytes)
        if 2 * self._num_bytes > self._max_bytes:
            self._parts = None

    def store(self, survey: Survey, reach: Extents, num_bytes: int | None) -> tuple[StoredChannels, Bool, Bool]:
        """Return the channels, where labels are present, and where they may matter, (L, *tiles); the candidates are forgotten."""
        # Labels take part within `reach`. Raises CapacityError if the tiles take more than
        # `num_bytes`.
        has_room = self._parts is not None  # Candidates are in memory already.
        store = StoredChannels(survey.grid, survey.num_labels, is_probability=survey.is_probability, read=self._read)
        present, may_matter = np.zeros((2, *survey.margins.shape), np.bool_)
        for label, candidates, is_last in self._all(survey):
            tiles, values, margins = self._that_matter(survey, label, *candidates, self._thresholds.may_matter[label])
            present[label].flat[tiles] = margins > self._thresholds.present[label]
            may_matter[label].flat[tiles] = True
            store.keep(label, tiles, values)
            if is_last:
                store.retain(label, widen(present[label], num_rings(reach)) & may_matter[label])
            if num_bytes is not None and not has_room and store.num_bytes > num_bytes:
                raise CapacityError(
                    f"the logits of labels that may take part need more than the {format_size(max(0, num_bytes))} that are left, up to "
                    f"label {label} of {survey.num_labels - 1}; allow more memory (--max-memory), or use a mask or a smaller region"
                )
        return store, present, may_matter

    def _all(self, survey: Survey) -> Iterator[tuple[int, tuple[NDArray[np.int64], Array], bool]]:
        """Yield (label, tiles and their values, whether they are the label's last)."""
        if self._parts is None:
            for brick in read_bricks(self._read, survey.grid):
                yield brick.label, self._tiles_of(survey, brick), brick.first_plane + len(brick.values) == survey.grid.shape[0]
            return
        for label in list(self._parts):
            parts = self._parts.pop(label)
            while parts:
                yield label, parts.pop(0), not parts

    def _tiles_of(self, survey: Survey, brick: Brick) -> tuple[NDArray[np.int64], Array]:
        """Return the tiles of a brick where its label mattered when it was surveyed."""
        own = brick.tiles(survey.grid)
        margins = survey.margins[brick.label].reshape(-1)[own]
        matters = margins > self._thresholds.may_matter[brick.label]
        if self._rings is not None:
            near = widen((margins > self._thresholds.present[brick.label]).reshape(-1, *survey.grid.counts[1:]), self._rings)
            rows = self._rings[0]
            if brick.first_plane > 0:  # Tiles of the bricks before and behind it may be near.
                near[:rows] = True
            if brick.first_plane + len(brick.values) < survey.grid.shape[0]:
                near[-rows:] = True
            matters &= near.reshape(-1)
        tiles = np.flatnonzero(matters)
        return tiles + own.start, brick.gather(tiles, self._threads)

    def _that_matter(
        self, survey: Survey, label: int, tiles: NDArray[np.int64], values: Array, exact_above: float
    ) -> tuple[NDArray[np.int64], Array, NDArray[np.float32]]:
        """Return tiles where a label may matter beside all that were surveyed, their values, and its largest probability's logarithm."""
        if not len(tiles):
            return tiles, values, np.zeros(0, np.float32)
        margins = survey.margins_of(label, values, tiles, is_whole_grid=False, exact_above=exact_above)
        chosen = margins > self._thresholds.may_matter[label]
        return (tiles, values, margins) if chosen.all() else (tiles[chosen], values[chosen], margins[chosen])


# One part in so many of the memory that is left may hold tiles that are kept in the first pass;
# else channels stream by twice.
SHARE_OF_CANDIDATES = 4


def survey_stream(
    stream: StreamedNetwork,
    grid: TileGrid,
    run: MeanFieldSpec,
    mask: Bool | None,
    thresholds: Thresholds,
    context: RunContext,
    reach: Extents | None = None,
) -> tuple[Survey, Candidates, str]:
    """Return what one pass over the channels finds, the tiles where labels may take part, and a sentence on the kind of the channels."""
    # Padding is known after the last channel, so a kind that is not declared is guessed from the
    # first brick. After a wrong guess the channels are read again. `reach` is that of `Candidates`.
    left = None if context.num_bytes is None else context.num_bytes()
    max_bytes = None if left is None else left // SHARE_OF_CANDIDATES
    said = stream.kind if stream.input_type == "auto" else stream.input_type
    is_probability = None if said is None else said == "probabilities"
    while True:
        survey, values = Survey(grid, run, mask, context.threads), _StreamedValues(grid)
        candidates = Candidates(stream.read, thresholds, max_bytes, context.threads, reach)
        for brick in read_bricks(stream.read, grid):
            if is_probability is None:
                outside = brick.values[(brick.values < -SUM_TOLERANCE) | (brick.values > 1 + SUM_TOLERANCE)]
                is_probability = not outside.size or bool((outside == outside[0]).all())  # Padding usually has a single value.
            if context.progress is not None:
                context.progress("channels", brick.label, stream.num_labels)
            survey.is_probability = is_probability
            survey.add(brick.label, brick.values, brick.first_plane)
            candidates.add(survey, brick)
            values.add(brick, survey.is_equal)
        kind, reason = decide(values.look(survey.is_equal), stream.input_type, stream.kind, str(stream.path))
        if is_probability == (kind == "probabilities"):
            return survey, candidates, f"{stream.path.name} is taken as {kind}: {reason}"
        is_probability = not is_probability


_ABOVE, _NEGATIVE = 1, 2  # bits of a voxel with a value outside [0, 1]


class _StreamedValues:
    """The facts that tell logits from probabilities, collected while channels stream."""

    def __init__(self, grid: TileGrid) -> None:
        self._sums: Float32 = np.zeros(grid.shape, np.float32)
        self._marks = np.zeros(grid.shape, np.uint8)
        self._example: str | None = None  # the first value outside [0, 1], perhaps in padding
        self._are_logits = False  # whether there is a negative value that is no padding: nothing else need be known

    def add(self, brick: Brick, is_equal: Bool) -> None:
        """Take note of a brick; `is_equal`, (*grid), is True where all labels so far are equal."""
        if self._are_logits:
            return
        values, planes = brick.values, slice(brick.first_plane, brick.first_plane + len(brick.values))
        self._sums[planes] += values
        low, high = float(values.min()), float(values.max())
        if low >= -SUM_TOLERANCE and high <= 1 + SUM_TOLERANCE:
            return
        self._example = self._example or f"{low if low < -SUM_TOLERANCE else high:.4g} for label {brick.label}"
        marks = self._marks[planes]
        marks[values < -SUM_TOLERANCE] |= _NEGATIVE
        marks[values > 1 + SUM_TOLERANCE] |= _ABOVE
        self._are_logits = bool((marks[~is_equal[planes]] & _NEGATIVE).any())

    def look(self, is_equal: Bool) -> Look:
        """Return what was seen, once all channels were added."""
        marks = self._marks[~is_equal]
        return Look(self._sums, is_equal, self._example if marks.any() else None, is_negative=bool((marks & _NEGATIVE).any()))
