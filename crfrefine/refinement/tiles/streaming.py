"""One pass over a network's channels that do not fit into memory together, which tells logits from probabilities on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.probabilities import (
    SUM_TOLERANCE,
    TOLD_SUM_TOLERANCE,
    Look,
    agree,
    check_input_type,
    describe_logits,
    describe_probabilities,
    no_probabilities,
    refuse_scaled,
)
from crfrefine.base.axes import StorageOrder
from crfrefine.refinement.tiles.stored import Candidates, ReadPieces, read_bricks
from crfrefine.refinement.tiles.survey import Survey

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """Return what one pass over the channels finds, the tiles where labels may take part, and the kind of the channels."""
    left = None if context.num_bytes is None else context.num_bytes()
    most_bytes = None if left is None else left // SHARE_OF_CANDIDATES
    guess: bool | None = None
    while True:
        finder = KindFinder(grid, stream.input_type, stream.kind, stream.path, guess)
        survey = Survey(grid, run, mask, context.threads)
        candidates = Candidates(stream.read, thresholds, most_bytes, context.threads)
        is_right = True
        for brick in read_bricks(stream.read, grid):
            is_right = finder.watch(brick, survey.is_equal)
            if not is_right:
                break
            if context.progress is not None:
                context.progress("channels", brick.label, stream.num_labels)
            survey.is_probability = bool(finder.is_probability)
            survey.add(brick.label, brick.values, brick.first_plane)
            candidates.add(survey, brick)
        if is_right:
            finder.leave_out(survey.is_equal)
            is_right = finder.is_right
        if is_right:
            return survey, candidates, finder.finish(survey.is_equal)
        guess = not finder.is_probability


_ABOVE, _NEGATIVE = 1, 2  # bits of a voxel with a value outside [0, 1]


class KindFinder:
    """Tells logits from probabilities while channels stream; the rules are those of `crfrefine.arrays.probabilities`.

    A value outside [0, 1] means logits, except in padding, where all labels are equal. Padding is known after the last channel, so the
    kind is guessed from the first one; a wrong guess is noticed, and the channels are read again.

    Attributes:
        is_probability: the kind of the channels; None before the first channel, if it was not declared.
    """

    def __init__(self, grid: TileGrid, input_type: str, kind: str | None, path: Path, guess: bool | None = None) -> None:
        """Start with the declarations of the user and the file, else with a guess, if there is one."""
        check_input_type(input_type)
        self._input_type, self._path = input_type, path
        said = input_type if input_type != "auto" else kind
        self.is_probability: bool | None = guess if said is None else said == "probabilities"
        self._is_said = said is not None
        self._sums: Float32 | None = np.zeros(grid.shape, np.float32)
        self._candidates = np.zeros(grid.shape, np.uint8)  # voxels with values outside [0, 1], which may be padding
        self._example: str | None = None
        self._outside: str | None = None  # a value outside [0, 1] that is not padding

    @property
    def is_right(self) -> bool:
        """Whether the channels are still what they were taken for."""
        return self._is_said or bool(self.is_probability) == (self._outside is None)

    def watch(self, brick: Brick, is_equal: Bool) -> bool:
        """Take note of a brick; False: the channels are logits after all, and must be read again from the beginning.

        `is_equal` tells where all labels before this one are equal.
        """
        if self._sums is None:
            return True
        values, planes = brick.values, slice(brick.first_plane, brick.first_plane + len(brick.values))
        self._sums[planes] += values
        low, high = float(values.min()), float(values.max())
        if low >= -SUM_TOLERANCE and high <= 1 + SUM_TOLERANCE:
            if self.is_probability is None:
                self.is_probability = True
            return True
        kinds = np.where(values < -SUM_TOLERANCE, np.uint8(_NEGATIVE), (values > 1 + SUM_TOLERANCE).astype(np.uint8))
        if self.is_probability is None:  # Padding usually has a single value.
            outside = values[kinds > 0]
            self.is_probability = bool((outside == outside[0]).all())
        if self._example is None:
            self._example = f"{low if low < -SUM_TOLERANCE else high:.4g} for label {brick.label}"
        self._candidates[planes] |= kinds
        if brick.label > 0:
            self._settle(kinds[~is_equal[planes]])
        return not self.is_probability or self.is_right

    def leave_out(self, is_equal: Bool) -> None:
        """Leave out padding, which is known once all channels were read."""
        self._settle(self._candidates[~is_equal])

    def _settle(self, kinds: NDArray[np.uint8]) -> None:
        if kinds.any():
            self._outside = self._example
        if (kinds == _NEGATIVE).any() or (kinds == _NEGATIVE | _ABOVE).any():
            self._sums = None  # Logits, and no scaled probabilities: nothing is left to find out.

    def finish(self, is_equal: Bool) -> str:
        """Return a sentence on the kind of the channels, with the reason; voxels where all labels are equal are not checked.

        Raises:
            InputError: the values contradict the user or the file, or are sigmoid channels or
                scaled probabilities such as percent.
        """
        if self._sums is not None and self._outside is not None and self._input_type != "logits":
            sums = self._sums[~is_equal]
            low, high = float(sums.min(initial=np.inf)), float(sums.max(initial=-np.inf))
            refuse_scaled((low + high) / 2 if high > 0 and agree(low, high) else None, str(self._path))
        if self._sums is not None and self._outside is None:
            tolerance = SUM_TOLERANCE
            if not self.is_probability or self._input_type == "probabilities":
                tolerance = TOLD_SUM_TOLERANCE
            look = Look(self._sums.shape)
            for each, found in look.sums.items():
                found.add(0, self._sums.reshape(-1), is_equal.reshape(-1), each)
            look.require_distribution(str(self._path), tolerance)
        if not self.is_probability:
            return describe_logits(self._path, self._input_type, None if self._is_said else self._outside)
        if self._outside is not None:
            raise no_probabilities(self._path, self._outside)
        return describe_probabilities(self._path, self._input_type)
