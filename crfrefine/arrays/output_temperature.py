"""The last step from refined logits to probabilities: they are divided by `mean_field.output_temperature`, which changes no argmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def over_output_temperature(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return refined logits, or log-odds of regions, whose softmax or sigmoid are calibrated probabilities.

    Args:
        logits: of any shape.
        temperature: `mean_field.output_temperature`; with 1, the logits themselves are returned, not a copy.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, section 4.2; docs/reference/math.md, section 7.
    """
    return logits if temperature == 1.0 else logits * np.float32(1.0 / temperature)
