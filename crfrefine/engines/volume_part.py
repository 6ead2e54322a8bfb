"""Where the volume term applies: everywhere, or in the main bodies of the labels (docs/reference/math.md, section 11.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import bounding_box

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec

BODY_PROBABILITY = 0.3
"""A voxel belongs to a component if the network gives its label more than this: below 1/2, so that a body may also grow, and not so far
below that doubtful voxels connect it with islands."""


def volume_part(logits: NDArray[Any], inside: NDArray[np.bool_], spec: MeanFieldSpec) -> NDArray[np.bool_] | None:
    """Return at which voxels inside the mask the volume term of a run applies, (N,) in C order; None: at all, or there is no term.

    With "largest" these are the largest component of each foreground label, of the voxels with a probability above `BODY_PROBABILITY`.
    Components are connected over faces, edges and corners; of equally large ones the first in C order counts.

    Args:
        logits: (L, *grid), higher is better; label 0 is background.
        inside: (*grid), the mask.
        spec: the run.
    """
    if spec.volume_weight == 0.0 or spec.volume_keep != "largest":
        return None

    def score(label: int) -> NDArray[np.float64]:
        bias = 0.0 if spec.bias is None else float(spec.bias[label])
        return np.asarray((logits[label].astype(np.float64) + bias) / spec.temperature)

    largest = score(0)
    for label in range(1, len(logits)):
        np.maximum(largest, score(label), out=largest)
    least = np.zeros_like(largest)
    for label in range(len(logits)):
        least += np.exp(score(label) - largest)
    least = largest + np.log(least) + np.log(BODY_PROBABILITY)
    bodies = np.zeros(inside.shape, dtype=np.bool_)
    for label in range(1, len(logits)):
        candidates = (score(label) > least) & inside
        box = bounding_box(candidates)
        if box is not None:
            components, _ = label_components(candidates[box])
            bodies[box] |= components == 1 + int(np.bincount(components.ravel())[1:].argmax())
    return bodies[inside]
