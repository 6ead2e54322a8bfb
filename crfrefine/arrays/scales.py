"""The scale of a network's numbers, by the numbers themselves.

The rules, each a function with its name:

`scale_of_total`: numbers from 0 up whose sums over the labels are the same at each voxel are scaled
probabilities of all labels.

`scale_of_foreground`: whole numbers whose sums never exceed a round top, such as 100 or 255, are
scaled probabilities, whose background, as the user says, is missing.

`are_rounded_probabilities`: one whole number per voxel that changes from voxel to voxel is no
label map, but rather a probability in percent or of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.base.array_types import Float32, Labels
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

# Usual values of the probability 1: 1, percent, 8 bits, per mille, and 16 bits.
TOPS = (1.0, 100.0, 255.0, 1000.0, 65535.0)
# Largest error of a sum of rounded probabilities, as a share of it, and of other probabilities.
ROUNDED = 0.05
EXACT = 1e-3
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
