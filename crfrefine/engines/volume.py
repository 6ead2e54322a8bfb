"""The volume term (docs/reference/math.md, section 11): where it acts, the biases that keep the labels' masses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crfrefine.arrays.components import largest_component
from crfrefine.base.array_types import Array, Bool, Float64
from crfrefine.parameters.specs import MeanFieldSpec

BODY_PROBABILITY = 0.3  # below 1/2, so that a body may grow, and not so far below that doubtful voxels connect it with islands
PSEUDO_VOXELS = 1.0  # added to all masses, so that a label whose mass vanishes has a finite energy
MAX_PASSES = 100  # more than any problem needs whose labels do not have to vanish
RIDGE = 1e-9  # relative; labels that no voxel is uncertain of would make the equations singular


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

    def search(
        self,
        masses_of: Callable[[Float64], tuple[Float64, Float64]],
        start: Float64,
        last_change: float,
    ) -> Float64:
        """Return the bias per label that balances the masses, (L,), with mean 0; a Newton step of `last_change` nats is the last."""
        bias, target = start, self.target + PSEUDO_VOXELS
        for _ in range(MAX_PASSES):
            masses, covariance = masses_of(bias)
            # Masses for which the bias would be right: proportional to (V + 1) e^(-slack bias).
            scaled = target * np.exp(-self.slack * bias)
            balanced = scaled * (target.sum() / scaled.sum())
            change = -np.linalg.solve(
                self.curvature(covariance, balanced), masses + PSEUDO_VOXELS - balanced
            )
            # Sun and Tran-Dinh 2019: with this length a Newton step never overshoots, from wherever it starts.
            size = max(1.0, self.slack) * float(np.ptp(change))
            bias = bias + change * (np.log1p(size) / size if size > 0.0 else 1.0)
            bias = bias - bias.mean()
            if size < last_change:
                break
        return bias

    def pull(
        self, gradient: Float64, masses: Float64, covariance: Float64, bias: Float64
    ) -> tuple[Float64, float]:
        """Return v of docs/reference/math.md, section 11.5, (L,), and the gradient with respect to the slack."""
        masses = masses + PSEUDO_VOXELS
        pull = np.linalg.solve(self.curvature(covariance, masses), gradient - gradient.mean())
        return pull, -float((pull * masses * bias).sum())

    def curvature(self, covariance: Float64, balanced: Float64) -> Float64:
        """(L, L) second derivative of the dual problem with respect to the bias, made regular for a number that is added to all of it."""
        total = np.outer(balanced, balanced) / balanced.sum()
        return np.asarray(
            covariance
            + self.slack * (np.diag(balanced) - total)
            + total
            + RIDGE * np.diag(balanced)
        )


def volume_part(logits: Array, mask: Bool | None, spec: MeanFieldSpec) -> Bool | None:
    """Return the voxels inside the mask on which the volume term of a run acts, (N,) in C order; None without the term.

    These are the largest component of each foreground label, of the voxels with a probability above `BODY_PROBABILITY`.
    """
    if spec.volume_weight == 0.0:
        return None
    inside = (
        np.ones(logits.shape[1:], dtype=np.bool_)
        if mask is None
        else np.asarray(mask, dtype=np.bool_)
    )

    def scores_of(channels: Array) -> Float64:
        """Return x of the first marginals, (L, N), in float64."""
        bias = 0.0 if spec.bias is None else np.asarray(spec.bias, np.float64)[:, None]
        return np.asarray((channels.astype(np.float64) + bias) / spec.temperature)

    # Most of a volume is certain background, where the softmax need not be computed. The margin is for rounding.
    least = np.log(BODY_PROBABILITY) - 1e-6
    places, columns = [], []
    for number, in_mask in enumerate(inside):  # A plane fits into the cache.
        plane = logits[:, number].reshape(len(logits), -1)
        scores, far = (
            (plane, least * spec.temperature) if spec.bias is None else (scores_of(plane), least)
        )
        with np.errstate(
            invalid="ignore"
        ):  # The difference of two infinities is not a number, and not far.
            near = np.flatnonzero(
                in_mask.ravel()
                & ~np.logical_and.reduce([label - scores[0] < far for label in scores[1:]])
            )
        places.append(near + number * plane.shape[1])
        columns.append(plane[:, near])
    voxels, scores = np.concatenate(places), scores_of(np.concatenate(columns, axis=1))
    largest = scores.max(axis=0)
    threshold = largest + np.log(np.exp(scores - largest).sum(axis=0)) + np.log(BODY_PROBABILITY)
    bodies = np.zeros(inside.shape, dtype=np.bool_)
    for of_label in scores[1:]:
        candidates = np.zeros(inside.shape, dtype=np.bool_)
        candidates.flat[voxels[of_label > threshold]] = True
        bodies |= largest_component(candidates)
    return bodies[inside]
