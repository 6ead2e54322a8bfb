"""The slice that most figures show.

Of the demo's phantom, with the logits of its imitated network, refined as a 2-D image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import crfrefine
from crfrefine.demo.phantom import make_phantom
from crfrefine.metrics.overlap import MaskPair

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"

PARAMETERS = crfrefine.CrfParameters().replace(
    **{
        "bilateral.weight": 5.0,
        "bilateral.theta_alpha": 2.5,
        "bilateral.theta_beta": 0.1,
        "mean_field.tolerance": 0.0,
    }
)
"""Those of the demo."""


@dataclass(frozen=True)
class Scene:
    """A 2-D case.

    Attributes:
        image: (M, rows, columns), raw intensities.
        labels: (rows, columns), the truth.
        logits: (L, rows, columns).
        spacing: mm, of rows and columns.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    spacing: tuple[float, float]

    def refine(self, **values: object) -> crfrefine.RefinementResult:
        """Refine the slice.

        `values` are those of the demo but for the ones named, with `__` for the dot of a key.
        """
        parameters = PARAMETERS.replace(
            **{key.replace("__", "."): value for key, value in values.items()}
        )
        return crfrefine.refine(
            self.logits, self.image, spacing=self.spacing, parameters=parameters, threads=1
        )

    def dice(self, label_map: NDArray[np.integer]) -> float:
        """Mean Dice over the labels that the slice has."""
        found = [label for label in np.unique(self.labels) if label]
        return float(
            np.mean([MaskPair(label_map == label, self.labels == label).dice() for label in found])
        )


def phantom_slice() -> Scene:
    """Cut the slice."""
    phantom = make_phantom(seed=0, grid_shape=(112, 96, 40), spacing=(0.9, 0.9, 2.0))
    rows = slice(20, 92)
    columns = slice(16, 80)
    flat = (slice(None), rows, columns, 19)
    # The phantom's x runs along the rows of an array, and to the right in a picture.
    across = 0, 2, 1
    image, logits = (
        np.ascontiguousarray(volume[flat].transpose(across))
        for volume in (phantom.image, phantom.logits)
    )
    return Scene(
        image,
        np.ascontiguousarray(phantom.labels[rows, columns, 19].T),
        logits,
        phantom.spacing[:2],
    )
