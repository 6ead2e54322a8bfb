"""One pass over a network's channels that do not fit into memory together, which tells logits from probabilities on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.probabilities import (
    SUM_TOLERANCE,
    TOLD_SUM_TOLERANCE,
    agree,
    check_input_type,
    describe_logits,
    describe_probabilities,
    no_probabilities,
    refuse_scaled,
    require_distribution,
)
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
    """Return what one pass over the channels finds, the tiles where labels may take part, and the kind of the channels."""
    left = None if context.num_bytes is None else context.num_bytes()
    most_bytes = None if left is None else left // SHARE_OF_CANDIDATES
    kind = stream.kind
    while True:
        finder = KindFinder(grid, stream.input_type, kind, stream.path)
        survey = Survey(grid, run, mask, context.threads)
        candidates = Candidates(stream.read, thresholds, most_bytes, context.threads)
        is_right = True
        bricks = read_bricks(stream.read, grid)
        for brick in bricks:
            is_right = finder.watch(brick)
            if not is_right:
                break
            if context.progress is not None:
                context.progress("channels", brick.label, stream.num_labels)
            survey.is_probability = bool(finder.is_probability)
            survey.add(brick.label, brick.values, brick.first_plane)
            candidates.add(survey, brick)
        if is_right:
            return survey, candidates, finder.finish(survey.is_equal)
        kind = "logits"


class KindFinder:
    """Tells logits from probabilities by the first channel, and checks all; the rules are those of `crfrefine.arrays.probabilities`.

    Attributes:
        is_probability: the kind of the channels; None before the first channel, if it was not declared.
    """

    def __init__(self, grid: TileGrid, input_type: str, kind: str | None, path: Path) -> None:
        """Start with the declarations of the user and the file."""
        check_input_type(input_type)
        self._input_type, self._path = input_type, path
        said = input_type if input_type != "auto" else kind
        self.is_probability: bool | None = None if said is None else said == "probabilities"
        self._is_said = said is not None
        self._sums: Float32 | None = np.zeros(grid.shape, np.float32)
        self._outside: str | None = None

    def watch(self, brick: Brick) -> bool:
        """Take note of a brick; False: the channels are logits after all, and must be read again from the beginning."""
        if self._sums is None:
            return True
        low, high = float(brick.values.min()), float(brick.values.max())
        is_outside = low < -SUM_TOLERANCE or high > 1 + SUM_TOLERANCE
        if low < -SUM_TOLERANCE:
            self._sums = None
        else:
            self._sums[brick.first_plane : brick.first_plane + len(brick.values)] += brick.values
        if self.is_probability is None:
            self.is_probability = not is_outside
        if not is_outside or self._outside is not None:
            return True
        # Padding, where all labels are equal, may have any value; here it only makes logits likelier.
        self._outside = f"{low if low < -SUM_TOLERANCE else high:.4g} for label {brick.label}"
        guessed, self.is_probability = self.is_probability, self.is_probability and self._is_said
        return not guessed or self._is_said

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
            require_distribution(self._sums, is_equal, str(self._path), tolerance)
        if not self.is_probability:
            return describe_logits(self._path, self._input_type, None if self._is_said else self._outside)
        if self._outside is not None:
            raise no_probabilities(self._path, self._outside)
        return describe_probabilities(self._path, self._input_type)
