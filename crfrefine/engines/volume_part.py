"""Where the volume term applies: everywhere, or in the main bodies of the labels (docs/reference/math.md, section 11.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import bounding_box

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec

BODY_PROBABILITY = 0.3
"""A voxel belongs to a component if the network gives its label more than this: below 1/2, so that a body may also grow, and not so far
below that doubtful voxels connect it with islands."""


def volume_part(logits: NDArray[Any], inside: NDArray[np.bool_], spec: MeanFieldSpec) -> NDArray[np.bool_] | None:
    """Return at which voxels inside the mask the volume term of a run applies, (N,) in C order; None: at all, or there is no term.

    With "largest" these are the largest component of each foreground label, of the voxels with a probability above `BODY_PROBABILITY`.
    Components are connected over faces, edges and corners; of equally large ones the first in C order counts.
    """
    if spec.volume_weight == 0.0 or spec.volume_keep != "largest":
        return None

    near = inside & _may_be_body(logits, spec)
    scores = np.stack([_scores(logits[label][near], label, spec) for label in range(len(logits))])
    largest = scores.max(axis=0)
    least = largest + np.log(np.exp(scores - largest).sum(axis=0)) + np.log(BODY_PROBABILITY)
    bodies, candidates = np.zeros(inside.shape, dtype=np.bool_), np.zeros(inside.shape, dtype=np.bool_)
    for label in range(1, len(logits)):
        candidates[near] = scores[label] > least
        box = bounding_box(candidates)
        if box is not None:
            components, _ = label_components(candidates[box])
            bodies[box] |= components == 1 + int(np.bincount(components.ravel())[1:].argmax())
    return bodies[inside]


def _scores(logits: NDArray[Any], label: int, spec: MeanFieldSpec) -> NDArray[np.float64]:
    """Return x of the first marginals for a label, in float64."""
    bias = 0.0 if spec.bias is None else float(spec.bias[label])
    return np.asarray((logits.astype(np.float64) + bias) / spec.temperature)


def _may_be_body(logits: NDArray[Any], spec: MeanFieldSpec) -> NDArray[np.bool_]:
    """Return (*grid), True wherever a foreground label may be above `BODY_PROBABILITY`: where it is not far below background.

    Most of a volume is certain background, where the softmax need not be computed.
    """
    least = np.log(BODY_PROBABILITY) - 1e-6  # of the difference of two scores; their rounding is far smaller
    found = np.empty(logits.shape[1:], dtype=np.bool_)
    for plane in range(len(found)):  # One fits into the cache.
        if spec.bias is None:
            with np.errstate(invalid="ignore"):  # The difference of two infinities is not a number, and not far.
                far = [label - logits[0, plane] < least * spec.temperature for label in logits[1:, plane]]
        else:
            background = _scores(logits[0, plane], 0, spec)
            far = [_scores(logits[label, plane], label, spec) - background < least for label in range(1, len(logits))]
        found[plane] = ~np.logical_and.reduce(far)
    return found
