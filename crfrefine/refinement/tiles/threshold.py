"""Below which probability a label takes no part in a tile: `mean_field.label_threshold`, and how far a marginal may rise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.parameters.specs import ModelSpec

SHARE_OF_UNIFORM = 0.5
"""Share of 1 / L that the threshold may reach: each voxel's most probable label must be above it."""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """When a label is present in a tile, and when it may matter there; logarithms of probabilities."""

    present: NDArray[np.float64]  # (L,), a label above it is present
    # (L,), the marginal of a label below it stays below the threshold, whatever the marginals around it are; minus infinity where that has
    # no bound.
    may_matter: NDArray[np.float64]


def find_thresholds(threshold: float, spec: ModelSpec) -> Thresholds | None:
    """Return the thresholds of a model; None if all labels must take part everywhere.

    A message raises a label's logarithm relative to the others by at most the sum of the weights times a row sum of the normalized kernel,
    1. A Potts model raises no label that is absent around a voxel: its penalty is the largest. A penalty matrix may raise such a label by
    the difference between the largest penalty of any label and the smallest of this one; the first threshold is lowered by as much. With
    negative penalties or weights a region of one label may flip by itself (docs/reference/math.md).

    Args:
        threshold: `mean_field.label_threshold`, 0: all labels everywhere.
        spec: the model.
    """
    run = spec.mean_field
    if threshold <= 0.0 or (run.weights < 0).any() or (run.compatibility < 0).any():
        return None
    lowest = np.full(run.num_labels, np.log(min(threshold, SHARE_OF_UNIFORM / run.num_labels)))
    is_bounded = spec.kernels.normalization != "none"
    weight = float(np.asarray(run.weights, np.float64).max(axis=1).sum())
    penalties = np.asarray(run.compatibility, np.float64)
    most = weight * float(penalties.max())
    if not run.is_potts:
        if not is_bounded:
            return None
        others = np.where(np.eye(run.num_labels, dtype=bool), np.inf, penalties)
        lowest = lowest - weight * np.maximum(0.0, penalties.max() - others.min(axis=0))
        # Its neighbors of that label penalize the labels of a voxel differently, also where it does not matter itself.
        is_bounded = False
    return Thresholds(lowest, lowest - most if is_bounded else np.full_like(lowest, -np.inf))
