"""What keeps volumes: a term of the mean field, and a bias after it.

The term keeps the mass of each label in every step (docs/reference/math.md, section 11): here are
the voxels where it acts, the biases that keep the masses, and its gradients. The bias after a label
map's mean field gives each label a number of voxels
(docs/reference/math.md#label-maps-of-a-coarser-network).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import largest_component
from crfrefine.arrays.softmax import least_difference, log_sum_exp, logit_of
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Integers, Labels
from crfrefine.base.axes import Axes
from crfrefine.base.numerics import LEAST_DOUBT, MAX_PASSES, PSEUDO_VOXELS, RIDGE
from crfrefine.parameters.specs import MeanFieldSpec

# ---- The term

# A label's voxels above this probability form its body. It is below 1/2, so that a body may grow,
# and not so far below that doubtful voxels connect a body with islands.
BODY_PROBABILITY = 0.3


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
        stays = self.stays(masses)
        masses = masses + PSEUDO_VOXELS
        centered = np.where(stays, gradient - gradient[stays].mean(), 0.0)
        curvature = self.curvature(covariance, masses, LEAST_DOUBT)
        pull = np.linalg.solve(curvature, centered)
        by_slack = -float((pull * masses * bias).sum())
        return np.asarray(pull), by_slack

    def stays(self, masses: Float64) -> Bool:
        """Return the labels whose bias has a gradient, (L,).

        Where masses are kept exactly, the bias of a label that has nothing to keep has no limit.
        Divided by its mass, rounding errors would be its gradient.
        """
        return (masses >= 0.5) | (self.slack > 0.0)

    def curvature(self, covariance: Float64, balanced: Float64, doubt: float = 0.0) -> Float64:
        """Return the (L, L) second derivative of the dual problem with respect to the bias.

        A number added to all biases changes no mass; a term keeps the matrix regular for that. So
        many voxels of doubt about each label are added.
        """
        total = np.outer(balanced, balanced) / balanced.sum()
        diagonal = np.diag(balanced)
        slack_part = self.slack * (diagonal - total)
        doubts = doubt * np.eye(len(balanced))
        return covariance + slack_part + total + RIDGE * diagonal + doubts


def volume_part(
    logits: Array, mask: Bool | None, spec: MeanFieldSpec, axes: Sequence[int] | None
) -> Bool | None:
    """Return the voxels inside the mask on which a run's volume term acts, (N,) in C order.

    None means that the run has no volume term.

    For each foreground label, these are the largest component of the voxels with a probability
    above `BODY_PROBABILITY`. `axes` are those of `GridImage`: of equally large components the first
    one in the user's order counts.
    """
    if spec.volume_weight == 0.0:
        return None
    inside = np.ones(logits.shape[1:], np.bool_) if mask is None else mask

    # The voxels that are not certain background, which most of a volume is: no probability need be
    # computed there.
    least = least_difference(BODY_PROBABILITY) - 1e-6  # The margin is for rounding.
    # Logits are compared before bias and temperature change them.
    limits = np.full(len(logits), least * spec.temperature)
    if spec.bias is not None:
        limits += spec.bias[0] - spec.bias
    limits -= 1e-6 * np.abs(limits)  # They are compared in float32.
    is_doubtful = inside.copy()
    for number in range(len(inside)):  # plane by plane, as a plane fits into the cache
        plane = logits[:, number]
        channels = zip(plane[1:], limits[1:].tolist(), strict=True)
        # The difference of two infinities is not a number, and not below the limit.
        with np.errstate(invalid="ignore"):
            are_below = [of_label - plane[0] < limit for of_label, limit in channels]
        is_doubtful[number] &= ~np.logical_and.reduce(are_below)
    # x before the first step, whose softmax are the first marginals.
    first_scores = np.array(logits[:, is_doubtful], np.float64, order="C")
    if spec.bias is not None:
        first_scores += spec.bias[:, None]
    first_scores /= spec.temperature

    lowest = logit_of(BODY_PROBABILITY, log_sum_exp(first_scores))
    order = Axes(tuple(range(inside.ndim) if axes is None else axes))
    bodies = np.zeros(inside.shape, dtype=np.bool_)
    for of_label in first_scores[1:]:
        candidates = np.zeros(inside.shape, dtype=np.bool_)
        candidates[is_doubtful] = of_label > lowest
        bodies |= order.apply(largest_component(order.undo(candidates)))
    return bodies[inside]


# ---- The bias

# Largest change of a bias, and rounds over all labels, of each stage: fewer voxels matter the
# nearer the balance is.
STAGES = ((6.0, 2), (2.0, 8))


# Where a label takes part, and its logits there: rows of an array of voxels, as a slice or (m,)
# numbers, and (m, voxels of a row), or (m,) if a row is a voxel.
_Member = tuple[Any, Float32]


def matching_bias(
    entries: Sequence[_Member], inside: Bool, wanted: Integers
) -> tuple[Float64, Bool]:
    """Return (L,) biases after which each label is the best of about as many voxels as are wanted.

    There is an entry for each label; `inside`, (rows, voxels of a row), has the voxels that count.
    Where no bias can close a margin, voxels keep their label. The second result, (L,), is True for
    labels whose bias would have to be larger than it may be.
    """
    bias = np.zeros(len(entries))
    for limit, num_rounds in STAGES:
        members, counts, wanted = _open(entries, inside, wanted, 2 * limit)
        # Each layer has the voxels with more labels than there are layers before.
        lengths = [np.count_nonzero(counts > number) for number in range(counts.max(initial=0))]
        begins = np.cumsum([0, *lengths])
        biased = np.empty(begins[-1], np.float32)  # logits, bias included, layer after layer
        num_before = np.zeros(len(counts), np.int16)
        layers_of_members = []
        for places, logits in members:
            layer = num_before[places]
            biased[begins[layer] + places] = logits
            num_before[places] += 1
            layers_of_members.append(layer)
        layers = [biased[begin:end] for begin, end in pairwise(begins.tolist())]

        change = np.zeros(len(members), np.float32)
        for _ in range(num_rounds):
            for label, (places, logits) in enumerate(members):
                if label == 0 or not len(places):  # The background gets the rest.
                    continue
                slots = begins[layers_of_members[label]] + places
                biased[slots] = -np.inf
                distances = _best(places, layers) - logits
                change[label] = _threshold(distances, int(wanted[label]), limit)
                biased[slots] = logits + change[label]

        entries = []
        for (places, logits), rise in zip(members, change, strict=True):
            entries.append((places, logits + rise))
        inside = np.ones(len(counts), np.bool_)
        bias += change
        has_no_place = np.array([not len(places) for places, _ in members])
        is_limited = (np.abs(change) >= limit) | (has_no_place & (wanted != 0))
    return bias, is_limited


def volume_bias(logits: Float32, label_map: Labels) -> Float64:
    """Return (L,) biases after which labels have about as many voxels as in a label map, (…).

    The logits are (L, …).
    """
    channels = logits.reshape(len(logits), 1, -1)
    entries = [(slice(None), channel) for channel in channels]
    inside = np.ones((1, label_map.size), np.bool_)
    wanted = np.bincount(label_map.ravel(), minlength=len(logits))
    bias, _ = matching_bias(entries, inside, wanted)
    return bias


def _open(
    entries: Sequence[_Member], inside: Bool, wanted: Integers, window: float
) -> tuple[list[_Member], NDArray[np.int32], Integers]:
    """Return the voxels whose two best logits differ by less than a window.

    The results are where labels take part among these *open* voxels, ascending, the number of
    labels of each open voxel, and the numbers of voxels that are wanted among them.
    """
    num_labels = len(entries)
    best = np.full(inside.shape, -np.inf, np.float32)
    second = best.copy()
    best_label = np.zeros(inside.shape, np.min_scalar_type(num_labels))
    for label, (rows, logits) in enumerate(entries):
        before = best[rows]
        best_label[rows] = np.where(logits > before, label, best_label[rows])
        second[rows] = np.maximum(second[rows], np.minimum(before, logits))
        best[rows] = np.maximum(before, logits)

    is_open = inside & (best - second < window)
    fixed = best_label[inside & ~is_open]
    wanted = wanted - np.bincount(fixed, minlength=num_labels)
    number = np.empty(inside.shape, np.int32)  # among the open voxels
    counts = np.zeros(np.count_nonzero(is_open), np.int32)
    number[is_open] = np.arange(len(counts))
    taking_part = []
    for rows, logits in entries:
        takes_part = is_open[rows] & (logits > best[rows] - window)
        voxels = number[rows][takes_part]
        counts[voxels] += 1
        taking_part.append((voxels, logits[takes_part]))

    # Voxels where many labels meet come first, so that each further layer of labels is shorter.
    order = np.argsort(-counts, kind="stable")
    place = np.empty_like(counts)
    place[order] = np.arange(len(counts))
    members = []
    for voxels, logits in taking_part:
        places = place[voxels]
        ascending = np.argsort(places)
        members.append((places[ascending], logits[ascending]))
    return members, counts[order], wanted


def _best(places: NDArray[np.int32], layers: Sequence[Float32]) -> Float32:
    """Return the largest number of any layer at each of some ascending places."""
    largest = np.full(len(places), -np.inf, np.float32)
    for layer in layers:
        in_layer = places[: np.searchsorted(places, len(layer))]
        best = largest[: len(in_layer)]
        np.maximum(best, layer[in_layer], out=best)
    return largest


def _threshold(distances: Float32, wanted: int, limit: float) -> float:
    """Return the bias with which a label wins about the wanted voxels; at most twice the limit."""
    if wanted <= 0:
        return -limit
    if wanted >= len(distances):
        return limit
    ascending = np.sort(distances)
    last = ascending[wanted - 1]
    num_below = np.searchsorted(ascending, last)
    num_with = np.searchsorted(ascending, last, side="right")
    if num_below and wanted - num_below < num_with - wanted:
        bias = 0.5 * (last + ascending[num_below - 1])
    elif num_with < len(ascending):
        bias = 0.5 * (last + ascending[num_with])
    else:
        bias = last + limit
    highest = limit if ascending[0] < limit else 2 * limit
    return float(np.clip(bias, -limit, highest))
