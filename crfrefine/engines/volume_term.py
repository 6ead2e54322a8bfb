"""The volume term: the bias per label with which a step of the mean field keeps the masses of the labels, and its gradients.

The mass of a label is the sum of its marginals over the masked voxels (docs/reference/math.md, section 11).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crfrefine.base.array_types import Float64

PSEUDO_VOXELS = 1.0
"""Added to all masses, so that a label whose mass vanishes has a finite energy."""

MAX_PASSES = 100
"""More than any problem needs whose labels do not have to vanish."""

LAST_CHANGE = 1e-7
"""Nats; the error after a Newton step of this size is its square."""

RIDGE = 1e-9
"""Relative; labels that no voxel is uncertain of would make the equations singular."""


@dataclass(frozen=True)
class VolumeTerm:
    """The masses to keep, and how closely."""

    target: Float64  # (L,), V, sums to the number of voxels
    slack: float  # inverse of the term's strength; 0: masses are kept exactly

    def energy(self, masses: Float64) -> float:
        """Return the term's energy, the divergence of the masses (L,) from those to keep; 0 if they are kept exactly."""
        if self.slack == 0.0:
            return 0.0
        masses, target = masses + PSEUDO_VOXELS, self.target + PSEUDO_VOXELS
        return float((masses * np.log(masses / target)).sum()) / self.slack

    def search(self, masses_of: Callable[[Float64], tuple[Float64, Float64]], start: Float64, last_change: float) -> Float64:
        """Return the bias per label that balances the masses, (L,), with mean 0, for marginals that are elsewhere.

        Args:
            masses_of: masses (L,) and their covariance (L, L), for a bias; called once per Newton step.
            start: (L,), where the search starts.
            last_change: size in nats of a Newton step that is the last one.
        """
        bias = start
        for _ in range(MAX_PASSES):
            masses, covariance = masses_of(bias)
            balanced = self._balanced(bias)
            change = -np.linalg.solve(self.curvature(covariance, balanced), masses + PSEUDO_VOXELS - balanced)
            # Sun and Tran-Dinh 2019: with this length a Newton step never overshoots, from wherever it starts.
            size = max(1.0, self.slack) * float(np.ptp(change))
            bias = bias + change * (np.log1p(size) / size if size > 0.0 else 1.0)
            bias = bias - bias.mean()
            if size < last_change:
                break
        return bias

    def pull(self, gradient: Float64, masses: Float64, covariance: Float64, bias: Float64) -> tuple[Float64, float]:
        """Return v of docs/reference/math.md, section 11.5, (L,), and the gradient with respect to the slack.

        Args:
            gradient: (L,), sum over the voxels of that with respect to the log-marginals.
            masses: (L,), of the marginals with the bias.
            covariance: (L, L), of the masses.
            bias: (L,), returned by `search`.
        """
        masses = masses + PSEUDO_VOXELS
        pull = np.linalg.solve(self.curvature(covariance, masses), gradient - gradient.mean())
        return pull, -float((pull * masses * bias).sum())

    def _balanced(self, bias: Float64) -> Float64:
        """Masses, with pseudo-voxels, for which the bias would be right: proportional to (V + 1) e^(-slack bias)."""
        target = self.target + PSEUDO_VOXELS
        scaled = target * np.exp(-self.slack * bias)
        return np.asarray(scaled * (target.sum() / scaled.sum()))

    def curvature(self, covariance: Float64, balanced: Float64) -> Float64:
        """(L, L) second derivative of the dual problem with respect to the bias, made regular for a number that is added to all of it."""
        total = np.outer(balanced, balanced) / balanced.sum()
        return np.asarray(covariance + self.slack * (np.diag(balanced) - total) + total + RIDGE * np.diag(balanced))
