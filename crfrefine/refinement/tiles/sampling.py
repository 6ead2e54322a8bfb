"""Whether a few tiles already show that label sets would hold nearly all labels, so that the others need not be looked at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.refinement.tiles.grid import TILE, TileGrid
from crfrefine.refinement.tiles.survey import find_present, survey_channels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.parameters.specs import MeanFieldSpec
    from crfrefine.refinement.tiles.sources import DenseChannels
    from crfrefine.refinement.tiles.threshold import Thresholds

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
