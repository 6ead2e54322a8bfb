"""A network's channels, streamed from a file in one pass.

Only tiles where a label may take part are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import dilated
from crfrefine.arrays.network import ReadPieces, StreamedNetwork
from crfrefine.arrays.probabilities import SUM_TOLERANCE, Look, identify
from crfrefine.base.array_types import Array, Bool, Float32, Shape
from crfrefine.base.limits import format_size
from crfrefine.base.notes import Note
from crfrefine.engines.base import RunContext
from crfrefine.errors import CapacityError
from crfrefine.refinement.given import CaseToRefine
from crfrefine.refinement.tiles.channels import ChannelSource
from crfrefine.refinement.tiles.grid import (
    MAX_DIMS,
    TILE,
    TILE_VOXELS,
    EntryNumbers,
    TileGrid,
    TileNumbers,
    num_rings,
    tile_layers,
)
from crfrefine.refinement.tiles.survey import Survey, Thresholds


def read_bricks(read: ReadPieces, grid: TileGrid) -> Iterator[tuple[int, slice, Array]]:
    """Yield a label, planes that begin and end with a tile, or with the grid, and their values.

    The values are (planes, y, x), C-contiguous. Pieces come with ascending planes for each channel,
    and planes of incomplete tiles wait for the next piece. Types other than float32 and float16 are
    converted, exactly.
    """
    waiting: dict[int, list[Array]] = {}
    for piece in read():
        # On a grid of two axes a piece has rows of the only plane.
        axis = MAX_DIMS + 1 - piece.values.ndim
        extent = grid.shape[axis]
        together = TILE[0] if axis == 0 else extent
        for label, values in enumerate(piece.values, piece.channels.start):
            held = waiting.pop(label, [])
            first = piece.planes.start - sum(map(len, held))
            num_planes = piece.planes.stop - first
            num_full = num_planes
            if piece.planes.stop < extent:
                num_full -= num_full % together
            if not num_full:
                waiting[label] = [*held, values.copy()]
                continue
            planes = np.concatenate([*held, values]) if held else values
            if num_full < num_planes:
                waiting[label] = [planes[num_full:].copy()]
            full = planes[:num_full].reshape(-1, *grid.shape[1:])
            if full.dtype not in (np.float32, np.float16):
                full = full.astype(np.float32)
            yield label, slice(first, first + len(full)), np.ascontiguousarray(full)


# Bytes of kept tiles at which it is first looked whether they all still matter.
FIRST_LOOK = 1 << 26
# Part of the memory of a run that may hold tiles in the first pass; else channels stream by twice.
SHARE_OF_CANDIDATES = 4


class StoredChannels(ChannelSource):
    """Some tiles of each label's channel, kept while the channels stream by and are surveyed.

    These are the tiles where a label may take part beside the labels so far. If there is no room
    for them, those where it does beside all labels are read once more.
    """

    def __init__(
        self, stream: StreamedNetwork, survey: Survey, context: RunContext, reach: Shape
    ) -> None:
        """Begin without tiles.

        Labels take part within `reach` of where the survey marks them as present.
        """
        self.grid = survey.grid
        self.is_probability = False
        self._stream = stream
        self._survey = survey
        self._context = context
        self._rings = num_rings(reach)
        self.num_bytes = 0  # of the tiles
        self._parts: list[list[tuple[TileNumbers, Array]]] = [[] for _ in survey.margins]
        # (2, L, *tiles), the smallest and the largest value of a channel in a tile; L is 0 where
        # channels are not interpolated.
        num_ranges = 0 if stream.interpolation is None else survey.num_labels
        self.ranges = np.empty((2, num_ranges, *self.grid.counts), np.float32)
        self._limit = math.inf if context.num_bytes is None else context.num_bytes
        self._next_look = FIRST_LOOK
        self._has_room = True

    def add(self, label: int, planes: slice, values: Array) -> None:
        """Keep the tiles of planes, just surveyed, where their label may matter so far."""
        if self._has_room:
            self._keep(label, *self._tiles_of(label, planes, values))
            self._context.take(self.num_bytes)
        if self._stream.interpolation is not None:
            part = self.grid.with_planes(planes)
            of_label = self.ranges[:, label, tile_layers(planes)]
            of_label[0] = part.reduced(np.minimum, values, np.float32)
            of_label[1] = part.reduced(np.maximum, values, np.float32)
        max_bytes = max(0.0, self._limit / SHARE_OF_CANDIDATES)
        if self.num_bytes <= min(self._next_look, max_bytes):
            return
        for earlier in range(label + 1):  # Beside later labels most tiles no longer matter.
            # Tiles that stay are marked once more beside all labels.
            matters = self._survey.mark(earlier, *self.joined(earlier), exact_above=math.inf)
            self._retain(earlier, matters)
        self._next_look = max(2 * self.num_bytes, FIRST_LOOK)
        if 2 * self.num_bytes > max_bytes:
            self._has_room = False
            self.num_bytes = 0
            for parts in self._parts:
                parts.clear()

    def choose(self) -> None:
        """Keep the tiles that a survey of all labels chooses, and mark in it where labels are.

        Raises CapacityError if tiles that are read once more take too much memory.
        """
        survey = self._survey
        survey.release()
        self.is_probability = survey.is_probability
        if self._has_room:
            for label in range(survey.num_labels):
                survey.mark(label, *self.joined(label))
                self._forget_tiles(label)
            del self._survey
            return

        max_bytes = max(0, self._limit - FIRST_LOOK)  # Pieces on their way need the rest.
        for label, planes, of_planes in read_bricks(self._stream.read, self.grid):
            tiles, values = self._tiles_of(label, planes, of_planes)
            chosen = survey.mark(label, tiles, values)
            self._keep(label, tiles[chosen], values[chosen])
            if planes.stop == self.grid.shape[0]:
                self._forget_tiles(label)
            self._context.take(self.num_bytes)
            if self.num_bytes > max_bytes:
                raise CapacityError(
                    "the logits of labels that may take part need more than the "
                    f"{format_size(max_bytes)} that are left, up to label {label} of "
                    f"{survey.num_labels - 1}; allow more memory (--max-memory), or use a mask or "
                    "a smaller region"
                )
        del self._survey

    def _tiles_of(self, label: int, planes: slice, values: Array) -> tuple[TileNumbers, Array]:
        """Return the tiles of planes where their label mattered when it was surveyed."""
        survey = self._survey
        margins = survey.margins[label, tile_layers(planes)]
        matters = margins > survey.thresholds.may_matter
        if self._stream.interpolation is not None:
            # Where a label takes part is then known before the survey ends.
            near = dilated(margins > survey.thresholds.present[label], self._rings)
            num_layers = self._rings[0]
            if planes.start > 0:  # Tiles of the planes before and behind them may be near.
                near[:num_layers] = True
            if planes.stop < self.grid.shape[0]:
                near[-num_layers:] = True
            matters &= near
        return self._gathered(matters, planes, values)

    def _gathered(self, chosen: Bool, planes: slice, values: Array) -> tuple[TileNumbers, Array]:
        """Return the chosen tiles of planes, (*tiles) True or False, and their values."""
        inner = np.flatnonzero(chosen)
        gathered = TileGrid(values.shape).gather(values, inner, self._context.threads)
        return inner + self.grid.tiles_in(planes).start, gathered

    def _forget_tiles(self, label: int) -> None:
        """Forget tiles where a label does not matter, or far from those where it is present."""
        survey = self._survey
        near = dilated(survey.present[label], self._rings) & survey.may_matter[label]
        tiles, _ = self.joined(label)
        self._retain(label, near.reshape(-1)[tiles])

    def _keep(self, label: int, tiles: TileNumbers, values: Array) -> None:
        """Keep some tiles of a label, all of them new.

        The values are (n, voxels of a tile) float32 or float16.
        """
        if len(tiles):
            self._parts[label].append((tiles, values))
            self.num_bytes += values.nbytes

    def _retain(self, label: int, chosen: Bool) -> None:
        """Forget a label's tiles except the chosen ones, (n,), in the order of `joined`."""
        if not chosen.all():
            tiles, values = self.joined(label)
            self._parts[label].clear()
            self.num_bytes -= values.nbytes
            self._keep(label, tiles[chosen], values[chosen])

    def ensure(self, domains: Bool) -> None:
        """Read tiles that are not kept yet."""
        missing = domains.copy()
        for label, tiles in enumerate(missing):
            tiles.reshape(-1)[self.joined(label)[0]] = False
        if not missing.any():
            return
        for label, planes, values in read_bricks(self._stream.read, self.grid):
            is_missing = missing[label, tile_layers(planes)]
            self._keep(label, *self._gathered(is_missing, planes, values))

    def fill_entries(
        self, engine: Any, label: int, tiles: TileNumbers, entries: EntryNumbers, out: Float32
    ) -> None:
        """See `ChannelSource`."""
        kept, values = self.joined(label)
        if len(tiles) != len(kept):
            values = values[np.searchsorted(kept, tiles)]
        engine.fill_entries(values, False, tiles, self.is_probability, entries, out)

    def joined(self, label: int) -> tuple[TileNumbers, Array]:
        """Return a label's tiles, ascending, and their values, (n, voxels of a tile)."""
        parts = self._parts[label]
        if not parts:
            values: Array = np.zeros((0, TILE_VOXELS), np.float32)
            return np.zeros(0, np.int64), values
        if len(parts) > 1:
            tiles = np.concatenate([part[0] for part in parts])
            values = np.concatenate([part[1] for part in parts])
            if (np.diff(tiles) < 0).any():
                order = np.argsort(tiles)
                tiles = tiles[order]
                values = values[order]
            parts[:] = [(tiles, values)]
        return parts[0]


def survey_stream(
    stream: StreamedNetwork,
    case: CaseToRefine,
    grid: TileGrid,
    mask: Bool | None,
    thresholds: Thresholds,
    reach: Shape,
) -> tuple[Survey, StoredChannels, Note]:
    """Return the survey of channels, those of their tiles that are kept so far, and a note.

    The note is on the kind of the channels. A kind that is not declared is guessed from the
    first planes, and after a wrong guess all is read again.

    The grid is that of the channels, as is `reach`, the voxels within which a label takes part.
    """
    input_type = stream.input_type
    context = case.context
    kind = stream.kind if input_type == "auto" else input_type
    is_probability = None if kind is None else kind == "probabilities"
    while True:
        survey = Survey(
            grid,
            case.model.mean_field,
            mask,
            thresholds,
            context.threads,
        )
        look = Look(survey.is_equal)
        store = StoredChannels(stream, survey, context, reach)
        for label, planes, values in read_bricks(stream.read, grid):
            if is_probability is None:
                is_low = values < -SUM_TOLERANCE
                is_high = values > 1 + SUM_TOLERANCE
                outside = values[is_low | is_high]
                # Padding usually has a single value.
                is_probability = bool((outside == outside[:1]).all())
            if context.progress is not None:
                context.progress("channels", label, stream.num_channels)
            survey.is_probability = is_probability
            survey.add(label, values, planes.start)
            store.add(label, planes, values)
            look.add(label, values, planes)
        kind, note = identify(look, input_type, stream.kind, stream.path)
        if is_probability == (kind == "probabilities"):
            return survey, store, note
        is_probability = not is_probability
