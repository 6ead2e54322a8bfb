"""Padding: voxels without network output, where all labels have exactly the same logit, or the log-odds of all regions are 0.

Undoing a crop pads logits with a constant. To the CRF such voxels look undecided, and their neighbors' labels would spread over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool

MAX_SHARE = 0.999
"""Largest share of padding in the mask. With more, the logits are probably not the network's output for this image."""

ENOUGH_VOXELS = 1000
"""This many voxels without padding are enough, whatever their share: the crop around a small organ is a small part of a large scan."""

BLOCK_VOXELS = 1 << 16


def plane_blocks(values: Array) -> Iterator[slice]:
    """Yield slices of the first grid axis of (L, *grid) values, a few planes each, about BLOCK_VOXELS voxels."""
    planes = max(1, BLOCK_VOXELS // max(1, math.prod(values.shape[2:])))
    for start in range(0, values.shape[1], planes):
        yield slice(start, start + planes)


def all_equal(values: Array, to: float | None = None) -> Bool:
    """Return where all channels of (channels, …) values are equal, or equal to a number; later ones are read if the first ones agree."""
    first, *others = values if to is None else (to, *values)
    same: Bool = others[0] == first
    for channel in others[1:]:
        if not same.any():
            break
        same &= channel == first
    return same


def find_padding(channels: Array, *, are_regions: bool = False) -> Bool | None:
    """Return (*grid), True where all labels of (L, *grid) have exactly the same value; None if they do nowhere. It is fastest in C order.

    For regions: where all log-odds are exactly 0, which says nothing about any region. Any other constant does, unlike in a softmax:
    probabilities that are 0 in all channels are certain background.
    """
    padding: Bool | None = None
    for planes in plane_blocks(channels):
        same = all_equal(channels[:, planes], 0.0 if are_regions else None)
        if same.any():
            if padding is None:
                padding = np.zeros(channels.shape[1:], np.bool_)
            padding[planes] = same
    return padding


def leave_out(padding: Bool, mask: Bool | None, what: str) -> tuple[Bool, int]:
    """Return a mask, (*grid), without the padding, and the number of voxels removed from it; errors of `check_share` begin with `what`."""
    inside = ~padding if mask is None else mask & ~padding
    num_left = int(np.count_nonzero(inside))
    num_voxels = padding.size if mask is None else int(np.count_nonzero(mask))
    check_share(num_voxels - num_left, num_voxels, what)
    return inside, num_voxels - num_left


def check_share(num_padded: int, num_voxels: int, what: str) -> None:
    """Raise InputError if almost all voxels are padding and fewer than ENOUGH_VOXELS are not."""
    if num_padded and num_padded > MAX_SHARE * num_voxels and num_voxels - num_padded < ENOUGH_VOXELS:
        raise InputError(
            f"{what}: all labels have the same value at {num_padded} of {num_voxels} voxels, so the labels there are unknown\n"
            "  Expected the network's output on this image. Is this a cropped output with mostly padding, or a placeholder file?"
        )


def describe_padding(num_padded: int, num_voxels: int, *, are_regions: bool = False) -> str:
    """Return a note about padding for the user: the subject first, the numbers after a colon."""
    said = "log-odds are 0 for all regions" if are_regions else "logits are equal for all labels"
    return (
        f"voxels whose {said}, such as padding around a cropped output, are excluded and become background: "
        f"{num_padded} of {num_voxels} voxels ({num_padded / num_voxels:.1%})"
    )
