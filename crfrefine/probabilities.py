"""Are a network's outputs logits or probabilities, and from the second to the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    """Decide whether values are logits or probabilities, and check them if they are probabilities.

    Args:
        values: (L, [z,] y, x) C-contiguous, finite.
        input_type: "auto", "logits" or "probabilities", the user's word.
        kind: "logits" or "probabilities" where the file says so, else None.
        path: where they came from, for errors.

    Returns:
        ("logits" or "probabilities", a sentence that says what was taken and why).

    Raises:
        InputError: probabilities that are negative, all zero at a voxel, or do not sum to 1.
        ConfigError: an unknown input type.
    """
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input type {input_type!r}: expected one of {', '.join(INPUT_TYPES)}")
    if input_type == "logits" or (input_type == "auto" and kind == "logits"):
        return "logits", f"{path.name} is taken as logits: {'asked for' if input_type == 'logits' else 'its array is named so'}"
    flat = values.reshape(values.shape[0], -1)
    surely = input_type == "probabilities" or kind == "probabilities"
    outside = _first_outside(values, flat)
    if outside is not None and not surely:
        return "logits", f"{path.name} is taken as logits: it has values outside [0, 1], such as {outside}"
    if outside is not None:
        raise InputError(f"{path}: expected probabilities between 0 and 1, found {outside}; for logits, give --input-type logits")
    _require_sums(values, flat, path, TOLD_SUM_TOLERANCE if input_type == "probabilities" else SUM_TOLERANCE)
    reason = "asked for" if input_type == "probabilities" else "all values lie in [0, 1] and sum to 1 at each voxel"
    return "probabilities", f"{path.name} is taken as probabilities: {reason}"


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


def _first_outside(values: NDArray[np.float32], flat: NDArray[np.float32]) -> str | None:
    for start in range(0, flat.shape[1], BLOCK_VOXELS):
        block = flat[:, start : start + BLOCK_VOXELS]
        if block.min() >= -SUM_TOLERANCE and block.max() <= 1 + SUM_TOLERANCE:
            continue
        label, voxel = np.unravel_index(int(((block < -SUM_TOLERANCE) | (block > 1 + SUM_TOLERANCE)).argmax()), block.shape)
        return f"{block[label, voxel]:.4g} for label {label} at {_voxel(values, start + int(voxel))}"
    return None


def _require_sums(values: NDArray[np.float32], flat: NDArray[np.float32], path: Path, tolerance: float) -> None:
    num_zero = num_off = 0
    first_zero = first_off = -1
    first_sum = 0.0
    for start in range(0, flat.shape[1], BLOCK_VOXELS):
        sums = flat[:, start : start + BLOCK_VOXELS].sum(axis=0)
        off = np.abs(sums - 1) > tolerance
        if not off.any():
            continue
        zero = sums <= SUM_TOLERANCE
        off &= ~zero
        num_zero, num_off = num_zero + int(zero.sum()), num_off + int(off.sum())
        if first_zero < 0 and zero.any():
            first_zero = start + int(zero.argmax())
        if first_off < 0 and off.any():
            first_off = start + int(off.argmax())
            first_sum = float(sums[off.argmax()])
    if num_off:
        raise InputError(
            f"{path}: all values lie in [0, 1] but do not sum to 1 at {num_off} of {flat.shape[1]} voxels; "
            f"the first one is {_voxel(values, first_off)} with a sum of {first_sum:.3f}\n"
            "  Sigmoid channels, as of region-based training, are not one distribution over labels: refine each region by itself against\n"
            "  its complement, or export a softmax. If these are logits, give --input-type logits."
        )
    if num_zero:
        raise InputError(
            f"{path}: the probabilities of all labels are zero at {num_zero} of {flat.shape[1]} voxels; the first one is "
            f"{_voxel(values, first_zero)}\n"
            "  Outside of what the network saw, background should be 1. If these are logits, give --input-type logits."
        )


def _voxel(values: NDArray[np.float32], flat_index: int) -> str:
    index = np.unravel_index(flat_index, values.shape[1:])
    return f"voxel ({', '.join(str(int(i)) for i in index[::-1])})"
