"""Decide whether a network's outputs are logits or probabilities, and convert probabilities to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from crfrefine.arrays.padding import BLOCK_VOXELS, all_equal, plane_blocks
from crfrefine.base.text import see
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32

InputType = Literal["auto", "logits", "probabilities", "labels"]
INPUT_TYPES: tuple[str, ...] = get_args(InputType)

MIN_PROBABILITY = 1e-7
"""Smallest probability before the logarithm: an exact zero would otherwise forbid a label forever."""

SUM_TOLERANCE = 1e-3
"""Largest error of the sum over labels, and largest distance of a value from [0, 1]; float16 and scaled 16-bit integers stay below it."""

TOLD_SUM_TOLERANCE = 0.05
"""The same for values declared as probabilities: 8-bit ones stay below it, channels of overlapping regions do not."""


def to_logits(values: Float32, input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide the type of the values as `identify` does, and turn probabilities into logits in place."""
    found, note = identify(values, input_type, kind, path)
    if found == "probabilities":
        take_logarithms(values)
    return found, note


def identify(values: Float32, input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide whether values are logits or probabilities, and check them. Voxels where all labels are equal (padding) are ignored.

    Args:
        values: (L, [z,] y, x) C-contiguous, finite.
        input_type: "auto", "logits" or "probabilities", as the user says; "labels" is for label maps, which have no channels.
        kind: "logits" or "probabilities" if the file declares it, else None.
        path: the file they came from, for errors.

    Returns:
        ("logits" or "probabilities", a sentence that says which and why).

    Raises:
        InputError: probabilities that are negative, that do not sum to 1, or that are almost zero at a
            voxel without being equal; sigmoid channels; values with another sum than 1 at all voxels,
            such as percent, unless the user calls them logits.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    look = look_at(values)
    if look.outside is not None and input_type != "logits":
        refuse_scaled(look.scaled_sum, str(path))
    if input_type == "logits" or (input_type == "auto" and kind == "logits"):
        if look.outside is None and look.sums[TOLD_SUM_TOLERANCE].num_bad:
            raise InputError(look.describe_sigmoids(str(path)) + look.binary_hint)
        return "logits", describe_logits(path, input_type, None)
    if look.outside is not None:
        if "probabilities" not in (input_type, kind):
            return "logits", describe_logits(path, input_type, look.outside)
        raise no_probabilities(path, look.outside)
    look.require_distribution(str(path), TOLD_SUM_TOLERANCE if input_type == "probabilities" else SUM_TOLERANCE)
    return "probabilities", describe_probabilities(path, input_type)


def describe_logits(path: Path, input_type: str, outside: str | None) -> str:
    """Return the sentence that says why values are taken as logits.

    `outside` is the value outside [0, 1] that decided; None: the user or the file says it.
    """
    reason = who_says(input_type) if outside is None else f"it has values outside [0, 1], such as {outside}"
    return f"{path.name} is taken as logits: {reason}"


def who_says(input_type: str) -> str:
    """Return the reason for a declared kind of values: the user's word, else the file's."""
    return "its array is named so" if input_type == "auto" else "requested"


def describe_probabilities(path: Path, input_type: str) -> str:
    """Return the sentence that says why values are taken as probabilities; arguments as of `describe_logits`."""
    reason = "requested" if input_type == "probabilities" else "all values lie in [0, 1] and sum to 1 at each voxel"
    return f"{path.name} is taken as probabilities: {reason}"


def no_probabilities(path: Path, outside: str) -> InputError:
    """Return the error for values that the user or the file calls probabilities, if one of them is outside [0, 1]."""
    return InputError(f"{path}: expected probabilities between 0 and 1, found {outside}; for logits, give --input-type logits")


def identify_array(values: NDArray[np.floating[Any]], input_type: str) -> str:
    """Decide the same for (L, *grid) of a caller; "auto" expects logits and refuses anything that looks different.

    Raises:
        InputError: probabilities or sigmoid channels although "auto" expects logits; probabilities that are not a distribution over labels;
            values with another sum than 1 at all voxels.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    if input_type == "logits":
        return "logits"
    look = look_at(values)
    if look.outside is not None:
        refuse_scaled(look.scaled_sum, input_type if input_type == "probabilities" else "logits")
    if input_type == "probabilities":
        if look.outside is not None:
            raise InputError(f"expected probabilities between 0 and 1, found {look.outside}; for logits, leave input_type out")
        look.require_distribution("probabilities", TOLD_SUM_TOLERANCE)
        return "probabilities"
    if look.outside is None:
        if look.sums[TOLD_SUM_TOLERANCE].num_bad:
            raise InputError(look.describe_sigmoids("logits") + '\n  If these are logits nevertheless, give input_type="logits".')
        raise InputError(
            "expected logits, found values that all lie in [0, 1] and sum to 1 over the labels at each voxel, as probabilities do\n"
            '  For probabilities, give input_type="probabilities"; if these are logits nevertheless, input_type="logits".'
            + ('\n  For one-hot labels, give logits.argmax(axis=0) and input_type="labels".' if look.is_binary else "")
        )
    return "logits"


def agree(low: float, high: float) -> bool:
    """Return whether the smallest and the largest sum over labels may be one sum with roundings."""
    return high - low <= TOLD_SUM_TOLERANCE * high


def refuse_scaled(total: float | None, name: str) -> None:
    """Raise InputError if there is a sum of scaled probabilities."""
    if total is not None:
        raise InputError(
            f"{name}: no value is negative, and the labels sum to {total:.4g} at each voxel, as probabilities in percent or from 0 to 255 "
            "do\n  Divide the values of each voxel by their sum. If these are logits nevertheless, give --input-type logits (in Python: "
            "input_type)."
        )


def check_input_type(input_type: str) -> None:
    """Raise ConfigError unless an input type is one of INPUT_TYPES."""
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input type {input_type!r}: expected one of {', '.join(INPUT_TYPES)}")


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


@dataclass
class OffSums:
    """Voxels whose sum over labels is not 1: their number, the first one (flat index) and its sum; zero sums are counted separately."""

    num_off: int = 0
    first_off: int = -1
    first_sum: float = 0.0
    num_zero: int = 0
    first_zero: int = -1

    @property
    def num_bad(self) -> int:
        """All of these voxels."""
        return self.num_off + self.num_zero

    def add(self, start: int, sums: Array, equal: Bool, tolerance: float) -> None:
        """Count the voxels of a block, the first of which has a flat index; those where all labels are equal do not count."""
        off = np.abs(sums - 1) > tolerance
        if not off.any():
            return
        off &= ~equal
        zero = off & (sums <= SUM_TOLERANCE)
        off &= ~zero
        self.num_zero, self.num_off = self.num_zero + int(zero.sum()), self.num_off + int(off.sum())
        if self.first_zero < 0 and zero.any():
            self.first_zero = start + int(zero.argmax())
        if self.first_off < 0 and off.any():
            self.first_off, self.first_sum = start + int(off.argmax()), float(sums[off.argmax()])


@dataclass
class Look:
    """What tells logits from probabilities; voxels where all labels are equal, such as padding, do not count."""

    grid: tuple[int, ...]
    outside: str | None = None  # the first value outside [0, 1], in words
    is_binary: bool = False  # whether all values are 0 or 1
    low: float = math.inf  # smallest sum over labels
    high: float = -math.inf  # largest sum
    is_negative: bool = False  # whether a value is below 0
    sums: dict[float, OffSums] = field(default_factory=lambda: {SUM_TOLERANCE: OffSums(), TOLD_SUM_TOLERANCE: OffSums()})

    @property
    def scaled_sum(self) -> float | None:
        """The sum over labels of scaled probabilities, such as percent.

        No value is negative, and all sums agree: they differ by at most TOLD_SUM_TOLERANCE of themselves, as
        those of rounded values do. None for other values, and if no voxel has a label above another.
        """
        is_scaled = not self.is_negative and self.high > 0 and agree(self.low, self.high)
        return (self.low + self.high) / 2 if is_scaled else None

    @property
    def binary_hint(self) -> str:
        """A line of advice if all values are 0 or 1."""
        return "\n  All values are 0 or 1: for one binary file per structure, give --input-type labels." if self.is_binary else ""

    def require_distribution(self, name: str, tolerance: float) -> None:
        """Raise InputError if values within [0, 1] do not sum to 1 over labels."""
        found = self.sums[tolerance]
        if found.num_off:
            is_rounded = not found.num_zero and self.sums[TOLD_SUM_TOLERANCE].num_off == 0
            if not is_rounded:
                raise InputError(self.describe_sigmoids(name, tolerance) + self.binary_hint)
            raise InputError(
                f"{name}: all values lie in [0, 1] and sum to about 1, but not to 1 at {found.num_off} of {math.prod(self.grid)} voxels; "
                f"the first one is {self.voxel(found.first_off)} with a sum of {found.first_sum:.3f}\n"
                "  Probabilities that were rounded, as to 8 bits, are like that: give --input-type probabilities if these are some."
                + self.binary_hint
            )
        if found.num_zero:
            raise InputError(
                f"{name}: the probabilities of all labels are almost zero at {found.num_zero} of {math.prod(self.grid)} voxels; "
                f"the first one is {self.voxel(found.first_zero)}\n"
                "  Outside the network's field of view, background should be 1, or all labels exactly equal." + self.binary_hint
            )

    def describe_sigmoids(self, name: str, tolerance: float = TOLD_SUM_TOLERANCE) -> str:
        """Return what to do about values within [0, 1] that do not sum to 1."""
        found = self.sums[tolerance]
        # If no sum is too large or small, every channel is almost zero at all these voxels.
        index, total = (found.first_off, found.first_sum) if found.num_off else (found.first_zero, 0.0)
        return (
            f"{name}: all values lie in [0, 1] but do not sum to 1 at {found.num_bad} of {math.prod(self.grid)} voxels; the first one is "
            f"{self.voxel(index)} with a sum of {total:.3f}\n"
            "  These look like sigmoid channels, as of region-based training: each is a separate probability, and together they are\n"
            "  neither logits nor a distribution over labels. Name the regions: in dataset.json as nnU-Net does (labels,\n"
            "  regions_class_order), or with infer --regions whole=1+2 --regions core=2; in Python regions=RegionScheme.of({...}) "
            f"({see('docs/reference/formats.md#regions')})."
        )

    def voxel(self, flat_index: int) -> str:
        """Return a voxel in words, (x, y, z)."""
        index = np.unravel_index(flat_index, self.grid)
        return f"voxel ({', '.join(str(int(i)) for i in index[::-1])})"


def look_at(values: Array) -> Look:
    """Return what one pass over scores (L, *grid) shows; it ends where they can be nothing but logits."""
    look, per_plane = Look(values.shape[1:], is_binary=True), math.prod(values.shape[2:])
    for planes in plane_blocks(values):
        start, block = planes.start * per_plane, values[:, planes].reshape(len(values), -1)
        equal, sums = all_equal(block), block.sum(axis=0)
        inside = sums[~equal]
        if inside.size:
            look.low, look.high = min(look.low, float(inside.min())), max(look.high, float(inside.max()))
        if block.min() < -SUM_TOLERANCE or block.max() > 1 + SUM_TOLERANCE:
            outside = ((block < -SUM_TOLERANCE) | (block > 1 + SUM_TOLERANCE)) & ~equal
            if look.outside is None and outside.any():
                label, voxel = np.unravel_index(int(outside.argmax()), block.shape)
                look.outside = f"{block[label, voxel]:.4g} for label {label} at {look.voxel(start + int(voxel))}"
            look.is_negative |= bool((block[outside] < 0).any())
        if look.outside is not None:
            if look.is_negative or not agree(look.low, look.high):
                break
            continue
        look.is_binary = look.is_binary and bool(((block == 0) | (block == 1)).all())
        for tolerance, found in look.sums.items():
            found.add(start, sums, equal, tolerance)
    return look
