"""The network's probabilities, from the logits or log-odds that training works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.region_channels import sigmoid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme


def probabilities_of(logits: NDArray[np.floating[Any]], regions: RegionScheme | None) -> NDArray[np.float32]:
    """Return the softmax of (L, *grid) logits, or the sigmoid of the log-odds (R, *grid) of regions, in float32."""
    if regions is not None:
        return sigmoid(logits)
    probabilities: NDArray[np.float32] = np.subtract(logits, logits.max(axis=0), dtype=np.float32)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=0)
    return probabilities
