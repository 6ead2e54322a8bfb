"""Padding: voxels without network output, where all labels have exactly the same logit.

Undoing a crop pads logits with a constant. To the CRF such voxels look undecided, and their neighbors' labels would spread over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_SHARE = 0.999
"""Largest share of padding in the mask. With more, the logits are probably not the network's output for this image."""

ENOUGH_VOXELS = 1000
"""This many voxels without padding are enough, whatever their share: the crop around a small organ is a small part of a large scan."""

BLOCK_VOXELS = 1 << 16


def plane_blocks(values: NDArray[Any]) -> Iterator[slice]:
    """Yield slices of the first grid axis of (L, *grid) values, a few planes each, about BLOCK_VOXELS voxels."""
    planes = max(1, BLOCK_VOXELS // max(1, math.prod(values.shape[2:])))
    for start in range(0, values.shape[1], planes):
        yield slice(start, start + planes)


def all_equal(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where all labels of (L, …) values are exactly equal; later labels are read only if the first two agree somewhere."""
    same: NDArray[np.bool_] = values[1] == values[0]
    for label in values[2:]:
        if not same.any():
            break
        same &= label == values[0]
    return same


def find_padding(logits: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return (*grid), True where all labels of (L, *grid) have exactly the same value; None if they do nowhere.

    It is fastest in C order; only the first two labels are read where these differ.
    """
    found: NDArray[np.bool_] | None = None
    for planes in plane_blocks(logits):
        same = all_equal(logits[:, planes])
        if same.any():
            if found is None:
                found = np.zeros(logits.shape[1:], np.bool_)
            found[planes] = same
    return found


def leave_out(padding: NDArray[np.bool_], mask: NDArray[np.bool_] | None, what: str) -> tuple[NDArray[np.bool_], int]:
    """Return a mask, (*grid), without the padding, and the number of voxels removed from it; `what` is for the error.

    Raises:
        InputError: almost nothing would be left.
    """
    inside = ~padding if mask is None else mask & ~padding
    num_left = int(np.count_nonzero(inside))
    num_voxels = padding.size if mask is None else int(np.count_nonzero(mask))
    check_share(num_voxels - num_left, num_voxels, what)
    return inside, num_voxels - num_left


def check_share(num_padded: int, num_voxels: int, what: str) -> None:
    """Raise InputError if almost all voxels are padding and fewer than ENOUGH_VOXELS are not."""
    if num_padded and num_padded > LARGEST_SHARE * num_voxels and num_voxels - num_padded < ENOUGH_VOXELS:
        raise InputError(
            f"{what}: all labels have the same value at {num_padded} of {num_voxels} voxels, so the labels there are unknown\n"
            "  Expected the network's output on this image. Is this a cropped output with mostly padding, or a placeholder file?"
        )


def describe_padding(num_padded: int, num_voxels: int) -> str:
    """Return a note about padding for the user: the subject first, the numbers after a colon."""
    return (
        "voxels whose logits are equal for all labels, such as padding around a cropped output, are excluded and become background: "
        f"{num_padded} of {num_voxels} voxels ({num_padded / num_voxels:.1%})"
    )
