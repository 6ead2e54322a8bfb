"""Whether labels share channels for runs forward and backward, and how: decided by what is present in the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.refinement.tiles.grid import MOST_DIMS, TileGrid
from crfrefine.refinement.tiles.image import TileImage
from crfrefine.refinement.tiles.packing import Packing
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.solving import label_sets
from crfrefine.refinement.tiles.sources import DenseChannels
from crfrefine.refinement.tiles.survey import find_present, survey_channels
from crfrefine.refinement.tiles.threshold import find_thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.label_sets import LabelSets

WORTH_IT = 0.75
"""Share of the filtered numbers of all labels below which labels share channels; values are copied to and from these."""

_NO_IMAGE = TileImage(np.zeros((0, 0, 0, 0), np.float32))
_NO_LOGITS = DenseChannels(np.zeros((0, 0, 0, 0), np.float32), ())


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """How labels share channels; the packing is None if every tile is settled."""

    problem: TileProblem
    sets: LabelSets
    packing: Packing | None


@dataclass(frozen=True)
class PackSettings:
    """How labels are packed.

    Attributes:
        threshold: `mean_field.label_threshold`.
        tells_labels: whether gradients with respect to weights or penalties of single labels may be asked for.
        threads: None: the cores this process may use.
    """

    threshold: float
    tells_labels: bool
    threads: int | None = None


def plan_packing(
    logits: NDArray[np.float32], mask: NDArray[np.bool_] | None, spacing: Sequence[float], spec: ModelSpec, settings: PackSettings
) -> PackingPlan | None:
    """Return how labels share channels; None if that is not possible, or saves nothing."""
    thresholds = find_thresholds(settings.threshold, spec)
    if thresholds is None or not spec.kernels.kernels or logits.ndim - 1 > MOST_DIMS or logits.dtype != np.float32:
        return None
    if not math.isfinite(float(logits.sum(dtype=np.float64))):
        return None
    grid = TileGrid.of(logits.shape[1:])
    values = np.ascontiguousarray(logits).reshape(len(logits), *grid.shape)
    source = DenseChannels(values, tuple(slice(0, extent) for extent in grid.shape))
    inside = None if mask is None else np.ascontiguousarray(mask).reshape(grid.shape)
    survey = survey_channels(grid, source, spec.mean_field, inside, settings.threads)
    present, may_matter = find_present(survey, source, thresholds)
    problem = TileProblem(
        grid=grid,
        source=_NO_LOGITS,  # The logits are an argument of each run.
        present=present,
        may_matter=may_matter,
        mask=inside,
        image=_NO_IMAGE,
        spacing=spacing,
        spec=spec,
        threshold=settings.threshold,
    )
    plan = plan_sets(problem, settings)
    if plan.packing is None:
        return plan
    num_channels = plan.packing.num_channels - spec.mean_field.has_one_weight
    num_numbers = num_channels * int(np.count_nonzero(plan.packing.mask))
    return plan if num_numbers <= WORTH_IT * spec.mean_field.num_channels * problem.num_voxels else None


def plan_sets(problem: TileProblem, settings: PackSettings) -> PackingPlan:
    """Return how the labels that are present share channels."""
    sets, run = label_sets(problem), problem.spec.mean_field
    tells_labels = settings.tells_labels or not (run.is_potts and run.has_one_weight)
    return PackingPlan(problem, sets, Packing(problem, sets, tells_labels=tells_labels) if sets.active.any() else None)


def saves_work(
    logits: NDArray[np.float32], mask: NDArray[np.bool_] | None, spacing: Sequence[float], spec: ModelSpec, settings: PackSettings
) -> bool:
    """Return whether `pack_kernels` would build kernels; arguments as there."""
    return plan_packing(logits, mask, spacing, spec, settings) is not None
