"""A network's outputs: padding; logits or probabilities, and how probabilities become logits.

Padding are voxels where all labels have exactly the same logit, or the log-odds of all regions are
0. Undoing a crop pads logits with a constant. To the CRF such voxels look undecided, and their
neighbors' labels would spread over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.text import see
from crfrefine.errors import InputError

# Largest share of padding in the mask. With more, the logits are probably not the network's output
# for this image.
MAX_SHARE = 0.999
# This many voxels without padding are enough, whatever their share: the crop around a small organ
# is a small part of a large scan.
ENOUGH_VOXELS = 1000
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


# ---- Logits or probabilities


InputType = Literal["auto", "logits", "probabilities", "labels"]
INPUT_TYPES: tuple[str, ...] = get_args(InputType)

# Smallest probability before the logarithm: an exact zero would otherwise forbid a label forever.
MIN_PROBABILITY = 1e-7
# Largest error of the sum over labels, and largest distance of a value from [0, 1]; float16 and
# scaled 16-bit integers stay below it.
SUM_TOLERANCE = 1e-3
# The same for values declared as probabilities: 8-bit ones stay below it, channels of overlapping
# regions do not.
TOLD_SUM_TOLERANCE = 0.05
# The advice for values that look like something else.
BY_HAND = "--input-type {} (in Python: input_type)"


@dataclass
class Look:
    """The facts that tell logits from probabilities. Voxels where all labels are equal, such as padding, do not count."""

    sums: Float32  # (*grid) sum over labels
    is_equal: Bool  # (*grid), True where all labels are equal
    outside: str | None = None  # the first value outside [0, 1], in words
    is_negative: bool = False  # whether a value is below 0: the sums may then be incomplete
    is_binary: bool = False  # whether all values are 0 or 1

    @property
    def scaled_sum(self) -> float | None:
        """The sum over labels of scaled probabilities, such as percent; None for other values, and if all labels are equal everywhere."""
        # No value is negative, and all sums agree: they differ by at most TOLD_SUM_TOLERANCE of
        # themselves, as those of rounded values do.
        sums = self.sums[~self.is_equal]
        if self.is_negative or not sums.size:
            return None
        low, high = float(sums.min()), float(sums.max())
        return (low + high) / 2 if high > 0 and high - low <= TOLD_SUM_TOLERANCE * high else None

    def bad_voxels(self, tolerance: float) -> NDArray[np.intp]:
        """Return the flat indices of the voxels whose sum is not 1."""
        return np.flatnonzero((np.abs(self.sums - 1) > tolerance) & ~self.is_equal)

    def require_distribution(self, name: str, tolerance: float) -> None:
        """Raise InputError if values within [0, 1] do not sum to 1 over labels."""
        bad = self.bad_voxels(tolerance)
        if not bad.size:
            return
        sums = self.sums.reshape(-1)[bad]
        is_zero = sums <= SUM_TOLERANCE
        first = int(is_zero.argmin())  # The first sum above zero, if there is one.
        voxel, where = self.voxel(bad[first]), f"at {bad.size} of {self.sums.size} voxels; the first one is "
        if is_zero.all():
            text = (
                f"the probabilities of all labels are almost zero {where}{voxel}\n"
                "  Outside the network's field of view, background should be 1, or all labels exactly equal."
            )
        elif not is_zero.any() and not self.bad_voxels(TOLD_SUM_TOLERANCE).size:
            text = (
                f"all values lie in [0, 1] and sum to about 1, but not to 1 {where}{voxel} with a sum of {sums[first]:.3f}\n"
                f"  Probabilities that were rounded, as to 8 bits, are like that: give {BY_HAND.format('probabilities')} if these are some."
            )
        else:
            text = (
                f"all values lie in [0, 1] but do not sum to 1 {where}{voxel} with a sum of {sums[first]:.3f}\n"
                "  These look like sigmoid channels, as of region-based training: each is a separate probability, and together they are\n"
                "  neither logits nor a distribution over labels. Name the regions: in dataset.json as nnU-Net does (labels,\n"
                "  regions_class_order), or with infer --regions whole=1+2 --regions core=2; in Python regions=RegionScheme.of({...}) "
                f"({see('docs/reference/formats.md#regions')})."
            )
        hint = "\n  All values are 0 or 1: for one binary file per structure, give --input-type labels." if self.is_binary else ""
        raise InputError(f"{name}: {text}{hint}")

    def voxel(self, flat_index: int | np.integer[Any]) -> str:
        """Return a voxel in words, (x, y, z)."""
        index = np.unravel_index(flat_index, self.sums.shape)
        return f"voxel ({', '.join(str(int(i)) for i in index[::-1])})"


def look_at(values: Array) -> Look:
    """Return what one pass over scores (L, *grid) shows; it ends where they can be nothing but logits."""
    grid = values.shape[1:]
    look = Look(np.ones(grid, np.float32), np.ones(grid, np.bool_), is_binary=True)
    for planes in plane_blocks(values):
        block = values[:, planes]
        look.is_equal[planes] = equal = all_equal(block)
        look.sums[planes] = block.sum(axis=0)
        if block.min() < -SUM_TOLERANCE or block.max() > 1 + SUM_TOLERANCE:
            outside = ((block < -SUM_TOLERANCE) | (block > 1 + SUM_TOLERANCE)) & ~equal
            if look.outside is None and outside.any():
                label, *place = np.unravel_index(int(outside.argmax()), block.shape)
                voxel = look.voxel(np.ravel_multi_index((place[0] + planes.start, *place[1:]), grid))
                look.outside = f"{block[(label, *place)]:.4g} for label {label} at {voxel}"
            look.is_negative |= bool((block[outside] < 0).any())
        look.is_binary = look.is_binary and not look.is_negative and bool(((block == 0) | (block == 1)).all())
        if look.is_negative:
            break
    return look


def decide(look: Look, input_type: str, kind: str | None, name: str) -> tuple[str, str]:
    """Return "logits" or "probabilities", and the reason; raise InputError if the values are neither, or contradict the user."""
    # `input_type` comes from the user, "auto" by default; `kind` is declared by the file; `name` is
    # for errors.
    said = kind if input_type == "auto" else input_type
    if look.outside is None:
        is_declared = said == "logits" or input_type == "probabilities"
        look.require_distribution(name, TOLD_SUM_TOLERANCE if is_declared else SUM_TOLERANCE)
        return said or "probabilities", who_says(input_type) if is_declared else "all values lie in [0, 1] and sum to 1 at each voxel"
    total = None if input_type == "logits" else look.scaled_sum
    if total is not None:
        raise InputError(
            f"{name}: no value is negative, and the labels sum to {total:.4g} at each voxel, as probabilities in percent or from 0 to 255 "
            f"do\n  Divide the values of each voxel by their sum. If these are logits nevertheless, give {BY_HAND.format('logits')}."
        )
    if said == "probabilities":
        raise InputError(
            f"{name}: expected probabilities between 0 and 1, found {look.outside}; for logits, give {BY_HAND.format('logits')}"
        )
    return "logits", who_says(input_type) if said else f"it has values outside [0, 1], such as {look.outside}"


def identify(values: Float32, input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide on the values of a file, (L, [z,] y, x) finite: ("logits" or "probabilities", a sentence that says which and why)."""
    # Arguments and errors are those of `decide`.
    decided, reason = decide(look_at(values), input_type, kind, str(path))
    return decided, f"{path.name} is taken as {decided}: {reason}"


def identify_array(values: NDArray[np.floating[Any]], input_type: str) -> str:
    """Decide on (L, *grid) of a caller, who does not say "logits", as `decide` does."""
    # Under "auto" probabilities are an InputError, too.
    look = look_at(values)
    decided, _ = decide(look, input_type, None, "logits" if input_type == "auto" else input_type)
    if decided == "probabilities" and input_type == "auto":
        raise InputError(
            "expected logits, found values that all lie in [0, 1] and sum to 1 over the labels at each voxel, as probabilities do\n"
            '  For probabilities, give input_type="probabilities"; if these are logits nevertheless, input_type="logits".'
            + ('\n  For one-hot labels, give logits.argmax(axis=0) and input_type="labels".' if look.is_binary else "")
        )
    return decided


def who_says(input_type: str) -> str:
    """Return the reason for a declared kind of values: the user's word, else the file's."""
    return "its array is named so" if input_type == "auto" else "requested"


def take_logarithms(probabilities: Float32) -> None:
    """Replace C-contiguous probabilities with log(clip(p, 1e-7, 1)), in place, block by block."""
    flat = probabilities.reshape(-1)
    for start in range(0, flat.size, BLOCK_VOXELS):
        block = flat[start : start + BLOCK_VOXELS]
        np.clip(block, MIN_PROBABILITY, 1.0, out=block)
        np.log(block, out=block)


def over_output_temperature(logits: Float32, temperature: float) -> Float32:
    """Return refined logits, or log-odds of regions, whose softmax or sigmoid are calibrated probabilities; no copy with 1.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, section 4.2; docs/reference/math.md, section 7.
    """
    return logits if temperature == 1.0 else logits * np.float32(1.0 / temperature)


def softmax(logits: Float32) -> Float32:
    """Return exp(logits) normalized to sum to 1 over the first axis, without overflow."""
    probabilities: Float32 = logits - logits.max(axis=0)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=0)
    return probabilities
