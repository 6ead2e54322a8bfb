"""What the engines of the host have in common: arrays stay where they are, and image and padding are numpy's work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.case_image import CaseImage
from crfrefine.arrays.padding import find_padding

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box


class HostArrays:
    """The part of a `Backend` that is about where arrays are."""

    def hold(self, channels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the array itself; see `Backend.hold`."""
        return channels

    def hold_image(self, image: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself; see `Backend.hold_image`."""
        return image

    normalize = staticmethod(CaseImage.normalized)
    """See `Backend.normalize`."""

    def changes(self, before: Any, after: Any, box: Box | None) -> None:
        """Nothing is counted; see `Backend.changes`."""

    def find_padding(self, logits: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Return where all labels are equal; see `Backend.find_padding`."""
        return find_padding(logits)
