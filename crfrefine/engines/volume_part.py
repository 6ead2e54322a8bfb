"""Where the volume term applies: in the main bodies of the labels (docs/reference/math.md, section 11.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import largest_component
from crfrefine.base.array_types import Array, Bool, Float64

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec

BODY_PROBABILITY = 0.3
"""A voxel belongs to a component if the network gives its label more than this: below 1/2, so that a body may also grow, and not so far
below that doubtful voxels connect it with islands."""


def volume_part(logits: Array, inside: Bool, spec: MeanFieldSpec) -> Bool | None:
    """Return the voxels inside the mask on which the volume term of a run acts, (N,) in C order; None without the term.

    These are the largest component of each foreground label, of the voxels with a probability above `BODY_PROBABILITY`.
    Components are connected over faces, edges and corners; of equally large ones the first in C order counts.
    """
    if spec.volume_weight == 0.0:
        return None

    voxels, logits = _may_be_body(logits, inside, spec)
    scores = _scores(logits, spec)
    largest = scores.max(axis=0)
    least = largest + np.log(np.exp(scores - largest).sum(axis=0)) + np.log(BODY_PROBABILITY)
    bodies = np.zeros(inside.shape, dtype=np.bool_)
    for of_label in scores[1:]:
        candidates = np.zeros(inside.shape, dtype=np.bool_)
        candidates.flat[voxels[of_label > least]] = True
        bodies |= largest_component(candidates)
    return bodies[inside]


def _scores(logits: Array, spec: MeanFieldSpec) -> Float64:
    """Return x of the first marginals, (L, N), in float64."""
    bias = 0.0 if spec.bias is None else np.asarray(spec.bias, np.float64)[:, None]
    return np.asarray((logits.astype(np.float64) + bias) / spec.temperature)


def _may_be_body(logits: Array, inside: Bool, spec: MeanFieldSpec) -> tuple[NDArray[np.intp], Array]:
    """Return the voxels in the mask where a foreground label may be above `BODY_PROBABILITY`: it is not far below background.

    Most of a volume is certain background, where the softmax need not be computed.

    Returns:
        (N,) places in C order, ascending, and (L, N) logits.
    """
    least = np.log(BODY_PROBABILITY) - 1e-6  # of the difference of two scores; their rounding is far smaller
    places, found = [], []
    for number, in_mask in enumerate(inside):  # A plane fits into the cache.
        plane = logits[:, number].reshape(len(logits), -1)
        scores, far = (plane, least * spec.temperature) if spec.bias is None else (_scores(plane, spec), least)
        with np.errstate(invalid="ignore"):  # The difference of two infinities is not a number, and not far.
            near = np.flatnonzero(in_mask.ravel() & ~np.logical_and.reduce([label - scores[0] < far for label in scores[1:]]))
        places.append(near + number * plane.shape[1])
        found.append(plane[:, near])
    return np.concatenate(places), np.concatenate(found, axis=1)
