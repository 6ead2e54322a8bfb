"""Refine a volume whose channels do not fit into memory together: they stream by twice, and only tiles of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.padding import describe_padding, leave_out
from crfrefine.arrays.probabilities import (
    SUM_TOLERANCE,
    TOLD_SUM_TOLERANCE,
    SumsOverLabels,
    check_input_type,
    describe_logits,
    describe_probabilities,
    no_probabilities,
)
from crfrefine.refinement.tiles.grid import TileGrid, kernel_reach
from crfrefine.refinement.tiles.image import TileImage
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.refining import settled_energy
from crfrefine.refinement.tiles.settled import find_settled_labels
from crfrefine.refinement.tiles.solving import solve
from crfrefine.refinement.tiles.stored import ReadPieces, read_bricks, store_channels
from crfrefine.refinement.tiles.streamed_logits import StreamedLogits
from crfrefine.refinement.tiles.survey import Survey
from crfrefine.refinement.tiles.threshold import Thresholds, find_thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.base import Backend
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
    from crfrefine.refinement.tiles.bricks import Brick
    from crfrefine.refinement.tiles.running import Settings


@dataclass(frozen=True, eq=False)
class ChannelStream:
    """A network's output in files.

    Attributes:
        read: returns the pieces, from the beginning at each call.
        num_labels: L.
        grid_shape: in storage order.
        input_type: "auto", "logits" or "probabilities".
        kind: the same if the file says so.
        path: the file, for messages.
    """

    read: ReadPieces
    num_labels: int
    grid_shape: tuple[int, ...]
    input_type: str
    kind: str | None
    path: Path


def refine_stream(
    stream: ChannelStream,
    image: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    spacing: Sequence[float],
    parameters: CrfParameters,
    spec: ModelSpec,
    backend: Backend,
    settings: Settings,
    *,
    axes: Sequence[int] | None = None,
) -> StreamedLogits:
    """Run the mean field on a network's output in files.

    Args:
        stream: the network's output.
        image: (M, *grid) as stored, in any type.
        mask: (*grid), True where the model applies; None: everywhere.
        spacing: mm, one per grid axis.
        parameters: of the intensities and the labels' threshold.
        spec: the model.
        backend: the CPU engine.
        settings: how.
        axes: as in `Backend.kernels`.

    Raises:
        InputError: values that are not finite, that are not the logits or probabilities that the user or the file says they are, or that
            are equal for all labels nearly everywhere.
    """
    grid = TileGrid.of(stream.grid_shape)
    threads = settings.threads
    inside = None if mask is None else np.ascontiguousarray(mask).reshape(grid.shape)
    thresholds = find_thresholds(parameters.mean_field.label_threshold, spec)
    if thresholds is None:
        lowest = np.full(stream.num_labels, -np.inf)
        thresholds = Thresholds(lowest, lowest)
    survey, note = _survey(stream, grid, spec.mean_field, inside, settings)
    notes, num_padding = [note], 0
    if survey.is_equal.any():
        inside, num_padding = leave_out(survey.is_equal, inside, "logits")
        if num_padding:
            notes.append(describe_padding(num_padding, inside.size))
    survey.mask = inside
    best_by_tile = survey.best_by_tile()
    labels = survey.labels.astype(np.min_scalar_type(stream.num_labels - 1), copy=False)
    survey.release()
    reach = kernel_reach(spec.kernels, spacing, grid)
    store, present, may_matter = store_channels(stream.read, survey, thresholds, reach, threads)
    maps = fit_intensity(image, parameters.intensity, mask)
    problem = TileProblem(
        grid=grid,
        source=store,
        present=present,
        may_matter=may_matter,
        mask=inside,
        image=TileImage(image.reshape(-1, *grid.shape), maps),
        spacing=spacing,
        spec=spec,
        precision=parameters.mean_field.label_threshold,
        threshold=parameters.mean_field.label_threshold if np.isfinite(thresholds.present).all() else None,
        settled=float(thresholds.may_matter.min()),
        axes=axes,
    )
    del survey
    found = solve(problem, backend, settings)
    settled = settled_energy(best_by_tile, found)
    own = find_settled_labels(problem, found)
    return StreamedLogits(
        stream.grid_shape, stream.num_labels, labels, inside, found, settled, tuple(notes), num_padding, settled_labels=own
    )


def _survey(
    stream: ChannelStream, grid: TileGrid, run: MeanFieldSpec, mask: NDArray[np.bool_] | None, settings: Settings
) -> tuple[Survey, str]:
    """Return what one pass over the channels finds, and what they were taken for."""
    kind = stream.kind
    while True:
        finder = KindFinder(grid, stream.input_type, kind, stream.path)
        survey = Survey(grid, stream.num_labels, run.temperature, bias=run.bias, mask=mask, threads=settings.threads)
        is_right = True
        bricks = read_bricks(stream.read, grid)
        for brick in bricks:
            is_right = finder.watch(brick)
            if not is_right:
                break
            if settings.progress is not None:
                settings.progress("channels", brick.label, stream.num_labels)
            survey.is_probability = bool(finder.is_probability)
            survey.add(brick.label, brick.values, brick.first_plane)
        if is_right:
            return survey, finder.finish(survey.is_equal)
        kind = "logits"


# Tell logits from probabilities while channels stream by; the rules are those of `crfrefine.arrays.probabilities`.


class KindFinder:
    """Decides from the first channel, and checks all of them.

    Attributes:
        is_probability: what the channels are taken for; None: no channel was seen, and nobody has said it.
    """

    def __init__(self, grid: TileGrid, input_type: str, kind: str | None, path: Path) -> None:
        """Start with what is known.

        Args:
            grid: the tiles.
            input_type: "auto", "logits" or "probabilities", as the user says.
            kind: "logits" or "probabilities" if the file says so.
            path: the file, for messages.
        """
        check_input_type(input_type)
        self._input_type, self._kind, self._path = input_type, kind, path
        said = input_type if input_type != "auto" else kind
        self.is_probability: bool | None = None if said is None else said == "probabilities"
        self._is_said = said is not None
        self._sums: NDArray[np.float32] | None = np.zeros(grid.shape, np.float32)
        self._outside: str | None = None

    def watch(self, brick: Brick) -> bool:
        """Take note of a brick; False: the channels are logits after all, and must be read again from the beginning."""
        if self._sums is None:
            return True
        low, high = float(brick.values.min()), float(brick.values.max())
        if low < -SUM_TOLERANCE or high > 1 + SUM_TOLERANCE:
            # Padding, where all labels are equal, may have any value; here it only makes logits likelier.
            self._outside = f"{low if low < -SUM_TOLERANCE else high:.4g} for label {brick.label}"
            self._sums = None
            guessed, self.is_probability = self.is_probability, bool(self.is_probability) and self._is_said
            return not guessed or self._is_said
        if self.is_probability is None:
            self.is_probability = True
        self._sums[brick.first_plane : brick.first_plane + len(brick.values)] += brick.values
        return True

    def finish(self, is_equal: NDArray[np.bool_]) -> str:
        """Return a sentence that says what the channels were taken for, and why.

        Args:
            is_equal: (*grid), where all labels are exactly equal; such voxels are not checked.

        Raises:
            InputError: the values are not what the user or the file calls them, or sigmoid channels.
        """
        if self._sums is not None:
            tolerance = SUM_TOLERANCE
            if not self.is_probability or self._input_type == "probabilities":
                tolerance = TOLD_SUM_TOLERANCE
            SumsOverLabels(self._sums, is_equal).require_distribution(str(self._path), tolerance)
        if not self.is_probability:
            return describe_logits(self._path, self._input_type, None if self._is_said else self._outside)
        if self._outside is not None:
            raise no_probabilities(self._path, self._outside)
        return describe_probabilities(self._path, self._input_type)
