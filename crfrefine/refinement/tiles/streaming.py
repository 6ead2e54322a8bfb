"""One pass over a network's channels that do not fit into memory together, which tells logits from probabilities on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.probabilities import SUM_TOLERANCE, Look, decide
from crfrefine.base.axes import StorageOrder
from crfrefine.refinement.tiles.stored import Candidates, ReadPieces, read_bricks
from crfrefine.refinement.tiles.survey import Survey

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool, Float32
    from crfrefine.engines.base import RunContext
    from crfrefine.parameters.specs import MeanFieldSpec
    from crfrefine.refinement.tiles.grid import TileGrid
    from crfrefine.refinement.tiles.stored import Brick
    from crfrefine.refinement.tiles.survey import Thresholds


@dataclass(frozen=True, eq=False)
class StreamedNetwork:
    """A network's output in files."""

    read: ReadPieces  # returns the pieces, from the beginning at each call
    num_labels: int  # L
    grid_shape: tuple[int, ...]  # in storage order
    input_type: str  # "auto", "logits" or "probabilities"
    kind: str | None  # the same if the file declares it
    path: Path  # the file, for messages

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) in the user's order of axes."""
        return self.num_labels, *reversed(self.grid_shape)

    @property
    def order(self) -> StorageOrder:
        """Of the axes in files."""
        return StorageOrder.of_files(len(self.grid_shape))

    def check_shapes(self, image: Array, mask: Array | None) -> None:
        """Headers were compared before: do nothing."""


SHARE_OF_CANDIDATES = 4
"""One part in so many of the memory that is left may hold tiles that are kept in the first pass; else channels stream by twice."""


def survey_stream(
    stream: StreamedNetwork, grid: TileGrid, run: MeanFieldSpec, mask: Bool | None, thresholds: Thresholds, context: RunContext
) -> tuple[Survey, Candidates, str]:
    """Return what one pass over the channels finds, the tiles where labels may take part, and a sentence on the kind of the channels.

    Padding is known after the last channel, so a kind that is not declared is guessed from the first brick. After a wrong guess the
    channels are read again.
    """
    left = None if context.num_bytes is None else context.num_bytes()
    max_bytes = None if left is None else left // SHARE_OF_CANDIDATES
    said = stream.kind if stream.input_type == "auto" else stream.input_type
    is_probability = None if said is None else said == "probabilities"
    while True:
        survey, values = Survey(grid, run, mask, context.threads), _StreamedValues(grid)
        candidates = Candidates(stream.read, thresholds, max_bytes, context.threads)
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
