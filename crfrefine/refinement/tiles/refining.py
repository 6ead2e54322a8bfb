"""Refine logits in memory on label sets per tile, where that is less work than all labels everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.refinement.tiles.choosing import choose_tiles
from crfrefine.refinement.tiles.grid import MOST_DIMS, TILE, TileGrid
from crfrefine.refinement.tiles.image import TileImage
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.running import RefinedTiles, Settings
from crfrefine.refinement.tiles.settled import find_settled_labels
from crfrefine.refinement.tiles.solving import label_sets, solve
from crfrefine.refinement.tiles.sources import DenseChannels
from crfrefine.refinement.tiles.survey import find_present, survey_channels
from crfrefine.refinement.tiles.threshold import find_thresholds
from crfrefine.refinement.tiles.tiled_logits import TiledLogits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.case_image import CaseImage
    from crfrefine.engines.base import Backend
    from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
    from crfrefine.refinement.tiles.threshold import Thresholds


def refine_tiles(
    backend: Backend,
    values: NDArray[np.float32],
    image: CaseImage,
    mask: NDArray[np.bool_] | None,
    spacing: Sequence[float],
    spec: ModelSpec,
    threshold: float,
    settings: Settings,
    *,
    axes: Sequence[int] | None = None,
    is_probability: bool = False,
) -> TiledLogits | None:
    """Run the mean field on the labels that are present in each tile, inside the mask's box.

    Args:
        backend: the engine.
        values: (L, *grid) logits, or probabilities, C-contiguous.
        image: normalized, in the mask's box at least.
        mask: (*grid), True where the model applies, at one voxel at least; None: everywhere.
        spacing: mm, one per grid axis.
        spec: the model.
        threshold: `mean_field.label_threshold`.
        settings: how.
        axes: as in `Backend.kernels`.
        is_probability: whether `values` are probabilities, of which the logarithm is taken.

    Returns:
        The refined logits; None if tiles would not save anything.
    """
    num_dims = values.ndim - 1
    # Volumes are sums over all voxels, also where a label would take no part.
    if spec.mean_field.volume_weight > 0.0 or not spec.kernels.kernels or num_dims > MOST_DIMS or backend.name != "cpu":
        return None
    thresholds = find_thresholds(threshold, spec)
    if thresholds is None:
        return None
    box = (None if mask is None else bounding_box(mask)) or tuple(slice(0, extent) for extent in values.shape[1:])
    lead = (1,) * (MOST_DIMS - num_dims)
    whole = values.reshape(len(values), *lead, *values.shape[1:])
    source = DenseChannels(whole, (*(slice(0, 1),) * len(lead), *box), is_probability=is_probability)
    grid = TileGrid(source.shape)
    inside = None if mask is None else np.ascontiguousarray(mask[box]).reshape(grid.shape)
    if is_crowded(grid, source, spec.mean_field, inside, thresholds, settings.threads):
        return None
    survey = survey_channels(grid, source, spec.mean_field, inside, settings.threads)
    present, may_matter = find_present(survey, source, thresholds)
    problem = TileProblem(
        grid=grid,
        source=source,
        present=present,
        may_matter=may_matter,
        mask=inside,
        image=TileImage(image.part(box).reshape(-1, *grid.shape)),
        spacing=spacing,
        spec=spec,
        threshold=threshold,
        precision=threshold,
        settled=float(thresholds.may_matter.min()),
        axes=axes,
    )
    sets = label_sets(problem)
    is_direct: bool | None = True
    if sets.active.any():
        is_direct = choose_tiles(problem, sets, settings.threads)
        if is_direct is None:
            return None
    found = solve(problem, backend, dataclasses.replace(settings, has_room=True), is_direct=is_direct, sets=sets)
    settled = settled_energy(survey.best_by_tile(), found)
    own = find_settled_labels(problem, found)
    return TiledLogits(source, spec.mean_field, inside, found, settled, values.shape[1:], settings.threads, settled_labels=own)


def settled_energy(best_by_tile: NDArray[np.float64], found: RefinedTiles | None) -> float:
    """Return the energy of the voxels inside the mask that take no part: minus their largest logits, bias included, over the temperature.

    Args:
        best_by_tile: result of `Survey.best_by_tile`.
        found: what took part; None: nothing.
    """
    return -float(best_by_tile.sum() if found is None else best_by_tile[~found.sets.active].sum())


# Whether a few tiles already show that label sets would hold nearly all labels, so that the others need not be looked at.

EVERY, FEWEST_LAYERS = 5, 13
"""One of so many layers of tiles is looked at; grids with few layers are not sampled: one or two would say little about the others."""

MOST_LABELS = 8
"""With more labels no tile has nearly all of them."""

CROWDED = 1.1
"""Share of the work with all labels everywhere from which on tiles are given up; without a sample they are at `choosing.WORTH_IT`."""


def is_crowded(
    grid: TileGrid, source: DenseChannels, run: MeanFieldSpec, mask: NDArray[np.bool_] | None, thresholds: Thresholds, threads: int | None
) -> bool:
    """Return whether so many labels are present in a sample of the tiles that tiles save nothing.

    Only time depends on the answer: with all labels everywhere the result is right in any case.

    Args:
        grid: the tiles.
        source: the channels.
        run: of all labels.
        mask: (*grid) C-contiguous, True where the model applies; None: everywhere.
        thresholds: of the model.
        threads: None: the cores this process may use.
    """
    if run.num_labels > MOST_LABELS or grid.counts[0] < FEWEST_LAYERS:
        return False
    num_entries = num_voxels = 0
    for layer in range(EVERY // 2, grid.counts[0], EVERY):
        start, stop = layer * TILE[0], min((layer + 1) * TILE[0], grid.shape[0])
        inside = None if mask is None else mask[start:stop]
        channels = source.planes(start, stop)
        survey = survey_channels(TileGrid(channels.shape), channels, run, inside, threads)
        present, _ = find_present(survey, channels, thresholds)
        num_labels_of = present.sum(axis=0)
        num_entries += int(num_labels_of[num_labels_of > 1].sum())
        num_voxels += math.prod(channels.shape) if inside is None else int(np.count_nonzero(inside))
    return num_voxels > 0 and num_entries * math.prod(TILE) >= CROWDED * run.num_channels * num_voxels
