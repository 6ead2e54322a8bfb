"""Voxels that a network has said nothing about: all labels have exactly the same logit there.

Undoing a crop pads logits with a constant. To the CRF such voxels look undecided, and their neighbors would flood them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_SHARE = 0.999
"""Of the voxels in the mask. With more padding than this, the logits are hardly what the network said about this image."""

ENOUGH_VOXELS = 1000
"""So many are an output all the same: the crop around a small organ is a small part of a large scan."""

BLOCK_VOXELS = 1 << 16


def find_padding(logits: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Find the voxels where all labels have exactly the same value.

    Args:
        logits: (L, *grid) logits or probabilities, fastest in C order; nothing but the first two labels is read where these differ.

    Returns:
        (*grid), True at those voxels; None: there are none.
    """
    found: NDArray[np.bool_] | None = None
    planes = max(1, BLOCK_VOXELS // max(1, math.prod(logits.shape[2:])))
    for start in range(0, logits.shape[1], planes):
        block = logits[:, start : start + planes]
        same = block[1] == block[0]
        for label in block[2:]:
            if not same.any():
                break
            same &= label == block[0]
        if same.any():
            if found is None:
                found = np.zeros(logits.shape[1:], np.bool_)
            found[start : start + planes] = same
    return found


def leave_out(padding: NDArray[np.bool_], mask: NDArray[np.bool_] | None, what: str) -> tuple[NDArray[np.bool_], int]:
    """Take padding out of a mask.

    Args:
        padding: (*grid), of `find_padding`.
        mask: (*grid), True where the model applies; None: everywhere.
        what: the name of the logits, for the error.

    Returns:
        (the mask without the padding, how many voxels were taken out of it).

    Raises:
        InputError: next to nothing would be left.
    """
    inside = ~padding if mask is None else mask & ~padding
    num_left = int(np.count_nonzero(inside))
    num_voxels = padding.size if mask is None else int(np.count_nonzero(mask))
    check_share(num_voxels - num_left, num_voxels, what)
    return inside, num_voxels - num_left


def check_share(num_padded: int, num_voxels: int, what: str) -> None:
    """Raise InputError where all or nearly all voxels are padding, and the others are only a few."""
    if num_padded and num_padded > LARGEST_SHARE * num_voxels and num_voxels - num_padded < ENOUGH_VOXELS:
        raise InputError(
            f"{what}: all labels have the same value at {num_padded} of {num_voxels} voxels, so nothing is known about the labels there\n"
            "  Expected the network's output on this image. Was a cropped output padded beyond recognition, or is the file a placeholder?"
        )


def describe_padding(num_padded: int, num_voxels: int) -> str:
    """Return a note about padding for the user; it begins with what it is about, and the numbers follow a colon."""
    return (
        "logits that are equal for all labels, as where a cropped output was padded, take no part and become background: "
        f"{num_padded} of {num_voxels} voxels ({num_padded / num_voxels:.1%})"
    )
