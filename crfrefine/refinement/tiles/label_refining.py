"""Refine a label map on label sets per tile, where only nearby labels take part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import fit_intensity
from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.refinement.tiles.choosing import LARGEST_DIRECT_REACH, window_voxels
from crfrefine.refinement.tiles.grid import TILE, TileGrid, kernel_reach
from crfrefine.refinement.tiles.image import TileImage
from crfrefine.refinement.tiles.label_source import LabelMapChannels, find_tiles_near_labels
from crfrefine.refinement.tiles.outside import OutsideLogits
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.refining import settled_energy
from crfrefine.refinement.tiles.solving import label_sets, solve
from crfrefine.refinement.tiles.streamed_logits import StreamedLogits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.base import Backend
    from crfrefine.parameters.sections import IntensityParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.tiles.grid import Extents
    from crfrefine.refinement.tiles.label_sets import LabelSets
    from crfrefine.refinement.tiles.running import Settings


MOST_PAIRS = 1000
"""Voxels in the windows up to which "auto" sums directly: on a whole body, windows of 600 voxels take half as long as the lattice, and less
than half its memory."""


def refine_label_tiles(
    backend: Backend,
    numbers: NDArray[np.unsignedinteger[Any]],
    image: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    spacing: Sequence[float],
    intensity: IntensityParameters,
    spec: ModelSpec,
    settings: Settings,
    *,
    threshold: float = 0.0,
    axes: Sequence[int] | None = None,
) -> StreamedLogits:
    """Run the mean field on a label map: a label takes part within the kernels' reach of where it occurs, with the logit 0.

    Args:
        backend: the CPU engine.
        numbers: (*grid) channel of each voxel's label, uint8 or uint16, in storage order; at most three axes.
        image: (M, *grid) as stored, in any type.
        mask: (*grid), True where the model applies, at one voxel at least; None: everywhere.
        spacing: mm, one per grid axis.
        intensity: how intensities are normalized.
        spec: the model of the labels that have a channel.
        settings: how.
        threshold: `mean_field.label_threshold`: marginals that change by far less are not sent again.
        axes: as in `Backend.kernels`.

    Raises:
        CapacityError: not enough memory.
    """
    grid = TileGrid.of(numbers.shape)
    labels = np.ascontiguousarray(numbers).reshape(grid.shape)
    inside = None if mask is None else np.ascontiguousarray(mask).reshape(grid.shape)
    reach = kernel_reach(spec.kernels, spacing, grid)
    near = find_tiles_near_labels(grid, labels, spec.mean_field.num_labels, reach_of_messages(spec, reach), settings.threads)
    voxels = count_inside(grid, inside)
    near &= voxels > 0
    source = LabelMapChannels(labels, reach)
    problem = TileProblem(
        grid=grid,
        source=source,
        present=near,
        may_matter=near,
        mask=inside,
        image=TileImage(np.ascontiguousarray(image).reshape(-1, *grid.shape), fit_intensity(image, intensity, mask)),
        spacing=spacing,
        spec=spec,
        precision=threshold,
        threshold=None,  # No label was left out because its probability was low.
        settled=settled_probability(spec),
        axes=axes,
    )
    is_fine = spec.kernels.filter == "auto" and max(reach) <= LARGEST_DIRECT_REACH and window_voxels(problem) <= MOST_PAIRS
    # Without a kernel, each voxel has only its own label within reach.
    found = solve(problem, backend, settings, is_direct=True if is_fine else None) if spec.kernels.kernels else None
    settled = settled_energy(voxels * _own_logits(label_sets(problem) if found is None else found.sets, spec), found)
    num_labels = spec.mean_field.num_labels
    outside = None if inside is None else OutsideLogits(source, inside, num_labels, spec.mean_field.temperature, settings.threads)
    return StreamedLogits(numbers.shape, num_labels, labels.view(), inside, found, settled, (), 0, outside=outside)


def _own_logits(sets: LabelSets, spec: ModelSpec) -> NDArray[np.float64]:
    """Return the logit over the temperature of the only label of a settled tile, bias included; (*tiles)."""
    logits = np.full(sets.grid.counts, CONFIDENCE / spec.mean_field.temperature)
    if spec.mean_field.bias is not None:
        logits += np.where(sets.settled < 0, 0.0, np.asarray(spec.mean_field.bias, np.float64)[sets.settled]) / spec.mean_field.temperature
    return logits


def reach_of_messages(spec: ModelSpec, reach: Extents) -> Extents:
    """Return how far from a label's voxels its messages matter, in voxels along each axis.

    They arrive twice as far away as the label takes part. There they penalize all labels that do take part: by the same amount, which
    changes no marginal, if the model is a Potts model with one weight for all labels. The energy then lacks these pairs.

    Args:
        spec: the model.
        reach: of the kernels.
    """
    run = spec.mean_field
    if run.is_potts and run.has_one_weight:
        return reach
    first, second, third = reach
    return 2 * first, 2 * second, 2 * third


def settled_probability(spec: ModelSpec) -> float:
    """Return the logarithm of a probability that all labels have where they take part, and no others: those stay where they are.

    Minus infinity where that cannot be said: with weights or temperatures that bring ABSENT_LOGIT near the other logits, and where the
    energy of all pairs of voxels counts (see `reach_of_messages`).

    Args:
        spec: the model.
    """
    run = spec.mean_field
    strength = float(np.abs(run.weights).max(axis=1, initial=0.0).sum())
    if run.bias is not None:
        strength += float(run.bias.max() - run.bias.min()) / run.temperature
    half = 0.5 * ABSENT_LOGIT / run.temperature
    is_plain = run.is_potts and run.has_one_weight and spec.kernels.normalization != "none"
    return half if is_plain and strength + math.log(run.num_labels) + CONFIDENCE / run.temperature < -0.5 * half else -math.inf


def count_inside(grid: TileGrid, mask: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Return the number of voxels of each tile inside a mask, (*tiles).

    Args:
        grid: the tiles.
        mask: (*grid); None: all voxels are.
    """
    if mask is None:
        extents = [np.diff([*range(0, extent, tile), extent]) for extent, tile in zip(grid.shape, TILE, strict=True)]
        first, second, third = np.ix_(*extents)
        counts: NDArray[np.int64] = first * second * third
        return counts
    return grid.sums(mask, np.int64)
