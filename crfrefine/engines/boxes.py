"""A case cropped to the bounding box of its mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box

Cropped = tuple["NDArray[Any]", "NDArray[Any]", "NDArray[np.bool_]"]


def covers(array: NDArray[Any], box: Box) -> bool:
    """Return whether an array (channels, *extents) is as large as a box, not the whole grid."""
    return all(extent == axis.stop - axis.start for extent, axis in zip(array.shape[1:], box, strict=True))


def crop(logits: NDArray[Any], image: NDArray[Any], mask: NDArray[np.bool_], box: Box) -> Cropped:
    """Return views of a case in a box; logits and image may be there already.

    Args:
        logits: (L, *grid) or (L, *box).
        image: (M, *grid) or (M, *box).
        mask: (*grid).
        box: the mask's bounding box.
    """
    inner = (slice(None), *box)
    return logits if covers(logits, box) else logits[inner], image if covers(image, box) else image[inner], mask[box]
