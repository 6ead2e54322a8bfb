"""The scale of a network's numbers, and a missing background, by the numbers themselves.

The rules, each a function with its name:

`scale_of_total`: numbers from 0 up whose sums over the labels are the same at each voxel are scaled
probabilities of all labels.

`scale_of_sums`: such numbers whose sums differ, but never exceed a round top, such as 100 or 255,
are scaled probabilities without a background.

`scale_of_foreground`: the same for probabilities whose background, as the user says, is
missing.

`are_zero_outside_a_body`: probabilities that are 0 for all labels around a body, and not around
boxes, as a crop or a sliding window leaves them, lack a background.

`are_rounded_probabilities`: one whole number per voxel that changes from voxel to voxel is no
label map, but rather a probability in percent or of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, dilated, grown
from crfrefine.base.array_types import Bool, Float32, Labels
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

# Usual values of the probability 1: 1, percent, 8 bits, per mille, and 16 bits.
TOPS = (1.0, 100.0, 255.0, 1000.0, 65535.0)
# Largest error of a sum of rounded probabilities, as a share of it, and of other probabilities.
ROUNDED = 0.05
EXACT = 1e-3
# Sums up to less than this may be those of logits, or of votes of a few networks.
MIN_SUM = 50.0
# The share of the top that sums reach without a background: of whole numbers, which logits hardly
# ever are, and of others.
MIN_OF_WHOLE = 0.25
MIN_OF_FRACTIONS = 0.85
# The share of the top that the sums of whole numbers have to reach where the user says that they
# are probabilities, but not their scale.
REACHED = 0.9


class Scale(NamedTuple):
    """The scale of probabilities."""

    top: float  # the number that is the probability 1
    sums: float  # over the labels: their largest one, or what all of them are about
    lacks_background: bool  # whether the sums are less than the top at some voxels

    @property
    def options(self) -> str:
        """The options that declare it."""
        option = f"--scale {self.top:.6g}"
        if self.lacks_background:
            return f"--add-background {option}"
        return option


def top_of(highest: float, tolerance: float = ROUNDED) -> float | None:
    """Return the smallest top that numbers or sums do not exceed; None if they exceed all."""
    for top in TOPS:
        if highest <= top * (1 + tolerance):
            return top
    return None


def usual_scale(highest: float) -> float:
    """Return the scale to propose for probabilities up to a number: a usual one, or the number."""
    return top_of(highest, EXACT) or highest


def scale_of_total(total: float) -> float:
    """Return the scale of probabilities whose sums over the labels are all about a total."""
    for top in TOPS[1:]:
        if abs(total - top) <= ROUNDED * top:
            return top
    return total


def scale_of_sums(sums: Float32, *, is_whole: bool) -> Scale | None:
    """Return the scale of probabilities without a background, by their sums, (N,).

    None for other numbers: small ones, and those with the same sum everywhere. None of them is
    negative, as logits are; `is_whole` says whether all are whole numbers.
    """
    highest = float(sums.max(initial=0.0))
    if highest < MIN_SUM or highest - float(sums.min()) <= ROUNDED * highest:
        return None
    tolerance = EXACT
    least = MIN_OF_FRACTIONS
    if is_whole:
        tolerance = ROUNDED
        least = MIN_OF_WHOLE
    top = top_of(highest, tolerance)
    if top is None or highest < least * top:
        return None
    return Scale(top, highest, lacks_background=True)


def scale_of_foreground(highest_sum: float, *, is_whole: bool) -> float | None:
    """Return the top of probabilities of all labels but the background, by their largest sum.

    None for numbers that do not tell: fractions, or sums that do not reach a round top.
    """
    top = top_of(highest_sum)
    if not is_whole or top is None or highest_sum < REACHED * top:
        return None
    return top


def divide_by_scale(values: Float32, scale: float, path: Path) -> Float32:
    """Divide probabilities by what 1 is, in place, and return them.

    Raises InputError for values outside [0, scale].
    """
    lowest = float(values.min(initial=0.0))
    highest = float(values.max(initial=0.0))
    if lowest < -EXACT * scale or highest > (1 + EXACT) * scale:
        advice = "leave --scale out for logits"
        if lowest >= 0 and scale != 1:
            advice = f"give --scale {usual_scale(highest):g} if that is the probability 1"
        raise InputError(
            f"{path}: --scale {scale:g}: expected probabilities from 0 to {scale:g}, found values "
            f"from {lowest:.6g} to {highest:.6g}; {advice}"
        )
    if scale != 1:
        values /= np.float32(scale)
    return values


# ---- A missing background

# Smallest share of zeros in the boxes around other values: crops and windows leave hardly any.
_SHARE_IN_BOX = 0.1
# Corners are voxels at a border along all axes. A box has eight, a body has a staircase of them.
_MIN_CORNERS = 48
_SHARE_OF_CORNERS = 0.04


def are_zero_outside_a_body(is_zero: Bool) -> bool:
    """Return whether the zeros of a grid, (*grid), lie around a body, and not around boxes.

    The network saw one box, or several: their faces are flat.
    """
    box = bounding_box(~is_zero)
    if box is None:
        return False
    zeros = is_zero[box]
    if np.count_nonzero(zeros) < _SHARE_IN_BOX * zeros.size:
        return False
    # The outside of the box is 0, too, unless the grid ends there.
    steps = np.eye(zeros.ndim, dtype=int)[np.greater(zeros.shape, 1)]
    zeros = is_zero[grown(box, (1,) * zeros.ndim, is_zero.shape)]
    num_sides = np.zeros(zeros.shape, np.uint8)
    for step in steps.tolist():
        num_sides += dilated(zeros, step) & ~zeros
    num_corners = int(np.count_nonzero(num_sides == len(steps)))
    num_at_border = int(np.count_nonzero(num_sides))
    return num_corners >= max(_MIN_CORNERS, _SHARE_OF_CORNERS * num_at_border)


# ---- One whole number per voxel

# A map with fewer different values is not looked at.
MIN_VALUES = 32
_MAX_PLANES = 64  # most planes that are looked at
# Values in the middle of the range, between these shares of the highest one. Of neighbors with one
# of these, and without 0, fewer have the same value in a probability map than this share; in label
# maps, whose structures are a few voxels wide, most have.
_MIDDLE = (0.1, 0.9)
_SHARE_ALIKE = 0.4
_MIN_PAIRS = 64
# Of such neighbors that differ, more differ by 1 in a smooth probability map than this share.
_SHARE_OF_STEPS = 0.9


def are_rounded_probabilities(labels: Labels, min_values: int = MIN_VALUES) -> bool:
    """Return whether a map of whole numbers, ([z,] y, x), has values that are no labels.

    They have more than `min_values` different values, which change from voxel to voxel between 0
    and the highest one, or hardly ever by more than 1.
    """
    highest = int(labels.max(initial=0))
    if highest <= min_values:
        return False
    low = _MIDDLE[0] * highest
    high = _MIDDLE[1] * highest
    occurs = np.zeros(highest + 1, np.bool_)
    num_pairs = 0
    num_alike = 0
    num_steps = 0  # pairs that differ by 1
    for lines in lines_of(labels):
        occurs[lines] = True
        lower = np.minimum(lines[:, :-1], lines[:, 1:])
        upper = np.maximum(lines[:, :-1], lines[:, 1:])
        counts = (lower > low) & (lower < high) | (upper > low) & (upper < high)
        counts &= lower > 0
        num_pairs += int(np.count_nonzero(counts))
        num_alike += int(np.count_nonzero(counts & (lower == upper)))
        num_steps += int(np.count_nonzero(counts & (upper == lower + 1)))
    if np.count_nonzero(occurs) <= min_values or num_pairs < _MIN_PAIRS:
        return False
    num_different = num_pairs - num_alike
    is_smooth = num_different >= _MIN_PAIRS and num_steps > _SHARE_OF_STEPS * num_different
    return num_alike < _SHARE_ALIKE * num_pairs or is_smooth


def lines_of(labels: Labels) -> Iterator[Labels]:
    """Yield the rows, then the columns, of some planes of a map, ([z,] y, x): (lines, voxels)."""
    planes = np.atleast_3d(labels.T).T
    for plane in planes[:: -(-len(planes) // _MAX_PLANES)]:
        yield plane
        yield plane.T
