"""The model's parameters broadcast to a case: the input of backends.

`CrfParameters.resolve` makes them; nothing is checked here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ResolvedBilateral:
    """An appearance kernel for a given case: weight (labels,) float32, theta_alpha (axes,) and theta_beta (modalities,) float64."""

    weight: NDArray[np.float32]
    theta_alpha: NDArray[np.float64]
    theta_beta: NDArray[np.float64]


@dataclass(frozen=True)
class ResolvedSpatial:
    """The smoothness kernel for a given case: weight (labels,) float32, theta_gamma (axes,) float64."""

    weight: NDArray[np.float32]
    theta_gamma: NDArray[np.float64]


@dataclass(frozen=True)
class ResolvedParameters:
    """The model's parameters, broadcast to the labels, modalities and axes of a case.

    Attributes:
        bilateral: the appearance kernels whose weights are not all zero.
        spatial: the smoothness kernel; None when its weights are all zero.
        compatibility: (L, L) float32 penalty; row: label of the neighbor, column: own label; zero diagonal.
        is_potts: whether `compatibility` is 1 off the diagonal.
        num_iterations: largest number of iterations.
        tolerance: mean KL divergence in nats per voxel that counts as converged; 0: never stop early.
        temperature: divides the logits.
        normalization: "symmetric", "after" or "none".
        damping: share of the old log-marginals in an iteration.
        filter: "auto", "exact", "truncated", "lattice" or "grid".
        positions: "mm" or "voxels".
    """

    bilateral: tuple[ResolvedBilateral, ...]
    spatial: ResolvedSpatial | None
    compatibility: NDArray[np.float32]
    is_potts: bool
    num_iterations: int
    tolerance: float
    temperature: float
    normalization: str
    damping: float
    filter: str
    positions: str

    def permuted(self, order: Sequence[int]) -> ResolvedParameters:
        """Return the parameters for a grid whose axis k is this grid's axis order[k]."""
        axes = list(order)
        return dataclasses.replace(
            self,
            bilateral=tuple(dataclasses.replace(kernel, theta_alpha=kernel.theta_alpha[axes]) for kernel in self.bilateral),
            spatial=self.spatial and dataclasses.replace(self.spatial, theta_gamma=self.spatial.theta_gamma[axes]),
        )

    def position_spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Distance between neighboring voxels in the unit of the bandwidths: the spacing in mm, or 1 for "voxels"."""
        return tuple(float(step) for step in spacing) if self.positions == "mm" else (1.0,) * len(spacing)
