"""Are a network's outputs logits or probabilities, and from the second to the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

INPUT_TYPES = ("auto", "logits", "probabilities")

SMALLEST_PROBABILITY = 1e-7
"""Probabilities are raised to this before the logarithm: an exact zero would otherwise forbid a label forever."""

SUM_TOLERANCE = 1e-3
"""How far from 1 the sum over labels may be, and a value from [0, 1]: float16 and scaled 16-bit integers stay below it."""

TOLD_SUM_TOLERANCE = 0.05
"""The same where the user said that these are probabilities: 8-bit ones stay below it, channels of overlapping regions do not."""

BLOCK_VOXELS = 1 << 16


def to_logits(values: NDArray[np.float32], input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide what the values are as `identify` does, and turn probabilities into logits in place."""
    found, note = identify(values, input_type, kind, path)
    if found == "probabilities":
        take_logarithms(values)
    return found, note


def identify(values: NDArray[np.float32], input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide whether values are logits or probabilities, and check them. Voxels where all labels are equal (padding) say nothing.

    Args:
        values: (L, [z,] y, x) C-contiguous, finite.
        input_type: "auto", "logits" or "probabilities", the user's word.
        kind: "logits" or "probabilities" where the file says so, else None.
        path: where they came from, for errors.

    Returns:
        ("logits" or "probabilities", a sentence that says what was taken and why).

    Raises:
        InputError: probabilities that are negative, all zero at a voxel, or do not sum to 1; sigmoid channels.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    outside = _first_outside(values)
    if input_type == "logits" or (input_type == "auto" and kind == "logits"):
        if outside is None:
            _refuse_sigmoids(values, str(path))
        return "logits", f"{path.name} is taken as logits: {'asked for' if input_type == 'logits' else 'its array is named so'}"
    surely = input_type == "probabilities" or kind == "probabilities"
    if outside is not None and not surely:
        return "logits", f"{path.name} is taken as logits: it has values outside [0, 1], such as {outside}"
    if outside is not None:
        raise InputError(f"{path}: expected probabilities between 0 and 1, found {outside}; for logits, give --input-type logits")
    if input_type == "auto":
        _refuse_rounded(values, str(path))
    _require_sums(values, str(path), TOLD_SUM_TOLERANCE if input_type == "probabilities" else SUM_TOLERANCE)
    reason = "asked for" if input_type == "probabilities" else "all values lie in [0, 1] and sum to 1 at each voxel"
    return "probabilities", f"{path.name} is taken as probabilities: {reason}"


def identify_array(values: NDArray[np.floating[Any]], input_type: str) -> str:
    """Decide the same for an array that a caller gave; "auto" expects logits and refuses what looks like anything else.

    Args:
        values: (L, *grid), finite.
        input_type: "auto", "logits" or "probabilities", the caller's word.

    Returns:
        "logits" or "probabilities".

    Raises:
        InputError: probabilities or sigmoid channels where "auto" was to find logits; probabilities that are no distribution over labels.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    outside = _first_outside(values)
    if input_type == "probabilities":
        if outside is not None:
            raise InputError(f"expected probabilities between 0 and 1, found {outside}; for logits, leave input_type out")
        _require_sums(values, "probabilities", TOLD_SUM_TOLERANCE)
        return "probabilities"
    if input_type == "auto" and outside is None:
        found = _off_sums(values, TOLD_SUM_TOLERANCE)
        if found.num_off or found.num_zero:
            raise InputError(_sigmoid_message(values, found, "logits") + '\n  If these are logits all the same, give input_type="logits".')
        raise InputError(
            "expected logits, found values that all lie in [0, 1] and sum to 1 over the labels at each voxel, as probabilities do\n"
            '  For probabilities, give input_type="probabilities"; if these are logits all the same, input_type="logits".'
        )
    return "logits"


def check_input_type(input_type: str) -> None:
    """Raise ConfigError unless an input type is one of INPUT_TYPES."""
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input type {input_type!r}: expected one of {', '.join(INPUT_TYPES)}")


def take_logarithms(probabilities: NDArray[np.float32]) -> None:
    """Replace probabilities by log(clip(p, 1e-7, 1)), in place, block by block.

    Args:
        probabilities: C-contiguous, of any shape; written to.
    """
    flat = probabilities.reshape(-1)
    for start in range(0, flat.size, BLOCK_VOXELS):
        block = flat[start : start + BLOCK_VOXELS]
        np.clip(block, SMALLEST_PROBABILITY, 1.0, out=block)
        np.log(block, out=block)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return exp(logits) normalized to sum to 1 over the first axis, without overflow."""
    probabilities: NDArray[np.float32] = logits - logits.max(axis=0)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=0)
    return probabilities


@dataclass(frozen=True)
class _OffSums:
    """Voxels whose sum over labels is not 1: how many, the first one (flat index) and its sum; those of a sum of zero apart."""

    num_off: int
    first_off: int
    first_sum: float
    num_zero: int
    first_zero: int


def _blocks(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (flat index of the first voxel, (L, n) values) of some planes at a time."""
    plane = math.prod(values.shape[2:])
    planes = max(1, BLOCK_VOXELS // max(1, plane))
    for start in range(0, values.shape[1], planes):
        yield start * plane, values[:, start : start + planes].reshape(len(values), -1)


def _first_outside(values: NDArray[Any]) -> str | None:
    """Describe the first value outside [0, 1]; None: there is none but in padding."""
    for start, block in _blocks(values):
        if block.min() >= -SUM_TOLERANCE and block.max() <= 1 + SUM_TOLERANCE:
            continue
        outside = (block < -SUM_TOLERANCE) | (block > 1 + SUM_TOLERANCE)
        outside &= ~(block == block[0]).all(axis=0)
        if outside.any():
            label, voxel = np.unravel_index(int(outside.argmax()), block.shape)
            return f"{block[label, voxel]:.4g} for label {label} at {_voxel(values, start + int(voxel))}"
    return None


def _off_sums(values: NDArray[Any], tolerance: float) -> _OffSums:
    """Count the voxels whose sum over labels is not 1, but for padding."""
    num_zero = num_off = 0
    first_zero = first_off = -1
    first_sum = 0.0
    for start, block in _blocks(values):
        sums = block.sum(axis=0)
        off = np.abs(sums - 1) > tolerance
        if not off.any():
            continue
        off &= ~(block == block[0]).all(axis=0)
        zero = off & (sums <= SUM_TOLERANCE)
        off &= ~zero
        num_zero, num_off = num_zero + int(zero.sum()), num_off + int(off.sum())
        if first_zero < 0 and zero.any():
            first_zero = start + int(zero.argmax())
        if first_off < 0 and off.any():
            first_off = start + int(off.argmax())
            first_sum = float(sums[off.argmax()])
    return _OffSums(num_off, first_off, first_sum, num_zero, first_zero)


def _require_sums(values: NDArray[Any], name: str, tolerance: float) -> None:
    found = _off_sums(values, tolerance)
    if found.num_off:
        raise InputError(_sigmoid_message(values, found, name))
    if found.num_zero:
        raise InputError(
            f"{name}: the probabilities of all labels are next to zero at {found.num_zero} of {math.prod(values.shape[1:])} voxels; "
            f"the first one is {_voxel(values, found.first_zero)}\n"
            "  Outside of what the network saw, background should be 1, or all labels exactly equal."
        )


def _refuse_rounded(values: NDArray[Any], name: str) -> None:
    """Refuse sums that are next to 1 everywhere, but not as near as those of probabilities are; say what to do if they are some."""
    found = _off_sums(values, SUM_TOLERANCE)
    if not found.num_off or found.num_zero or _off_sums(values, TOLD_SUM_TOLERANCE).num_off:
        return
    raise InputError(
        f"{name}: all values lie in [0, 1] and sum to about 1, but not to 1 at {found.num_off} of {math.prod(values.shape[1:])} voxels; "
        f"the first one is {_voxel(values, found.first_off)} with a sum of {found.first_sum:.3f}\n"
        "  Probabilities that were rounded, as to 8 bits, are like that: give --input-type probabilities if these are some."
    )


def _refuse_sigmoids(values: NDArray[Any], name: str) -> None:
    """Refuse as logits what lies in [0, 1] everywhere without being a distribution over labels."""
    found = _off_sums(values, TOLD_SUM_TOLERANCE)
    if found.num_off or found.num_zero:
        raise InputError(_sigmoid_message(values, found, name))


def _sigmoid_message(values: NDArray[Any], found: _OffSums, name: str) -> str:
    # Where no sum is too large or small, all the voxels in question have next to zero in every channel.
    index, total = (found.first_off, found.first_sum) if found.num_off else (found.first_zero, 0.0)
    num_bad = found.num_off + found.num_zero
    return (
        f"{name}: all values lie in [0, 1] but do not sum to 1 at {num_bad} of {math.prod(values.shape[1:])} voxels; the first one is "
        f"{_voxel(values, index)} with a sum of {total:.3f}\n"
        "  These look like sigmoid channels, as of region-based training: each is a probability of its own, and together they are neither\n"
        "  logits nor a distribution over labels. Refine each region by itself, as two labels (1 - p, p), or export a softmax."
    )


def _voxel(values: NDArray[Any], flat_index: int) -> str:
    index = np.unravel_index(flat_index, values.shape[1:])
    return f"voxel ({', '.join(str(int(i)) for i in index[::-1])})"
