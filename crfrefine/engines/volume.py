"""The volume term (docs/reference/math.md, section 11), which keeps the mass of each label.

Here are the voxels where it acts, the biases that keep the masses, and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import largest_component
from crfrefine.arrays.softmax import log_sum_exp
from crfrefine.base.array_types import Array, Bool, Float64
from crfrefine.base.geometry import StorageOrder
from crfrefine.parameters.specs import MeanFieldSpec

# A label's voxels above this probability form its body. It is below 1/2, so that a body may grow,
# and not so far below that doubtful voxels connect a body with islands.
BODY_PROBABILITY = 0.3
PSEUDO_VOXELS = 1.0  # added to all masses, so that a label whose mass vanishes has a finite energy
MAX_PASSES = 100  # Newton steps; more than any problem needs in which no label must vanish
RIDGE = 1e-9  # relative; keeps the equations regular if no voxel is uncertain of a label


@dataclass(frozen=True)
class VolumeTerm:
    """The masses to keep, and how closely."""

    target: Float64  # (L,), V in math.md; sums to the number of voxels
    slack: float  # inverse of the term's strength; 0: masses are kept exactly

    def energy(self, masses: Float64) -> float:
        """Return the divergence of the masses, (L,), from those to keep, divided by the slack.

        It is 0 if masses are kept exactly.
        """
        if self.slack == 0.0:
            return 0.0
        masses = masses + PSEUDO_VOXELS
        target = self.target + PSEUDO_VOXELS
        divergence = (masses * np.log(masses / target)).sum()
        return float(divergence) / self.slack

    def search(
        self,
        masses_of: Callable[[Float64], tuple[Float64, Float64]],
        start: Float64,
        last_change: float,
    ) -> Float64:
        """Return the bias per label that balances the masses, (L,), with mean 0.

        Args:
            masses_of: masses (L,) and their covariance (L, L) for a bias.
            start: the bias to begin with, (L,).
            last_change: nats; a Newton step below this size is the last one.
        """
        bias = start
        target = self.target + PSEUDO_VOXELS
        for _ in range(MAX_PASSES):
            masses, covariance = masses_of(bias)
            # Masses for which the bias would be right: proportional to (V + 1) e^(-slack bias).
            scaled = target * np.exp(-self.slack * bias)
            balanced = scaled * (target.sum() / scaled.sum())
            curvature = self.curvature(covariance, balanced)
            change = -np.linalg.solve(curvature, masses + PSEUDO_VOXELS - balanced)

            # Sun and Tran-Dinh 2019: with this length a Newton step never overshoots, from
            # wherever it starts.
            size = max(1.0, self.slack) * float(np.ptp(change))
            length = np.log1p(size) / size if size > 0.0 else 1.0
            bias = bias + change * length
            bias = bias - bias.mean()
            if size < last_change:
                break
        return bias

    def pull(
        self, gradient: Float64, masses: Float64, covariance: Float64, bias: Float64
    ) -> tuple[Float64, float]:
        """Return v of docs/reference/math.md, section 11.5, (L,), and the gradient of the slack."""
        masses = masses + PSEUDO_VOXELS
        centered = gradient - gradient.mean()
        pull = np.linalg.solve(self.curvature(covariance, masses), centered)
        by_slack = -float((pull * masses * bias).sum())
        return pull, by_slack

    def curvature(self, covariance: Float64, balanced: Float64) -> Float64:
        """Return the (L, L) second derivative of the dual problem with respect to the bias.

        A number added to all biases changes no mass; a term keeps the matrix regular for that.
        """
        total = np.outer(balanced, balanced) / balanced.sum()
        diagonal = np.diag(balanced)
        slack_part = self.slack * (diagonal - total)
        return np.asarray(covariance + slack_part + total + RIDGE * diagonal)


def volume_part(
    logits: Array, mask: Bool | None, spec: MeanFieldSpec, axes: Sequence[int] | None
) -> Bool | None:
    """Return the voxels inside the mask on which a run's volume term acts, (N,) in C order.

    For each foreground label, these are the largest component of the voxels with a probability
    above `BODY_PROBABILITY`. `axes` are those of `GridImage`: of equally large components the first
    one in the user's order counts. None means that the run has no such term.
    """
    if spec.volume_weight == 0.0:
        return None
    if mask is None:
        inside = np.ones(logits.shape[1:], dtype=np.bool_)
    else:
        inside = np.asarray(mask, dtype=np.bool_)

    voxels, scores = _doubtful_scores(logits, inside, spec)
    threshold = log_sum_exp(scores) + np.log(BODY_PROBABILITY)

    order = StorageOrder(tuple(range(inside.ndim) if axes is None else axes))
    bodies = np.zeros(inside.shape, dtype=np.bool_)
    for label_scores in scores[1:]:
        candidates = np.zeros(inside.shape, dtype=np.bool_)
        candidates.flat[voxels[label_scores > threshold]] = True
        bodies |= order.to_storage(largest_component(order.to_user(candidates)))
    return bodies[inside]


def _doubtful_scores(
    logits: Array, inside: Bool, spec: MeanFieldSpec
) -> tuple[NDArray[np.intp], Float64]:
    """Return the voxels that are not certain background, and their first x, (L, N).

    Most of a volume is certain background, where the softmax need not be computed.
    """
    log_probability = np.log(BODY_PROBABILITY) - 1e-6  # The margin is for rounding.
    places = []
    columns = []
    for number, in_mask in enumerate(inside):  # plane by plane, as a plane fits into the cache
        plane = logits[:, number].reshape(len(logits), -1)
        # Without a bias, the logits are compared before the temperature divides them.
        if spec.bias is None:
            scores = plane
            threshold = log_probability * spec.temperature
        else:
            scores = _first_scores(plane, spec)
            threshold = log_probability
        # The difference of two infinities is not a number, and not below the threshold.
        with np.errstate(invalid="ignore"):
            are_below = [of_label - scores[0] < threshold for of_label in scores[1:]]
        is_certain = np.logical_and.reduce(are_below)
        doubtful = np.flatnonzero(in_mask.ravel() & ~is_certain)
        places.append(doubtful + number * plane.shape[1])
        columns.append(plane[:, doubtful])
    return np.concatenate(places), _first_scores(np.concatenate(columns, axis=1), spec)


def _first_scores(logits: Array, spec: MeanFieldSpec) -> Float64:
    """Return x before the first step, whose softmax are the first marginals: (L, N) float64."""
    scores = logits.astype(np.float64)
    if spec.bias is not None:
        bias = np.asarray(spec.bias, np.float64)
        scores = scores + bias[:, None]
    return np.asarray(scores / spec.temperature)
