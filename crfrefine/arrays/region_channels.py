"""Sigmoid channels of regions as log-odds: their type, and their logarithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.padding import BLOCK_VOXELS
from crfrefine.arrays.probabilities import MIN_PROBABILITY, SUM_TOLERANCE, check_input_type, who_says
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32


MAX_LOG_ODDS = 1e4
"""Far beyond the log-odds of any probability; larger values, such as the lowest float32 in padding, mean the same."""


def identify_regions(values: Array, input_type: str, *, kind: str | None = None, name: str = "regions") -> tuple[str, str]:
    """Decide whether the channels of regions are log-odds ("logits") or sigmoid probabilities.

    Args:
        values: (R, *grid), finite.
        input_type: "auto", "logits" or "probabilities", as the user says.
        kind: "logits" or "probabilities" if the file declares it, else None.
        name: where they came from, for errors.

    Returns:
        ("logits" or "probabilities", the reason).

    Raises:
        InputError: the values contradict the user or the file.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    lowest, highest = float(values.min()), float(values.max())
    is_inside = lowest >= -SUM_TOLERANCE and highest <= 1 + SUM_TOLERANCE
    told = kind if input_type == "auto" else input_type
    reason = "all values lie in [0, 1]" if is_inside else f"it has values outside [0, 1], from {lowest:.4g} to {highest:.4g}"
    if told != "probabilities" and not is_inside and lowest >= 0 and not np.mod(values, 1).any():
        raise InputError(
            f"{name}: whole numbers from 0 to {highest:.0f}, as in a label map; expected log-odds or sigmoid probabilities of regions; "
            "for a label map, give --input-type labels"
        )
    if told != "probabilities" and input_type != "logits" and not is_inside and lowest >= 0:
        raise InputError(
            f"{name}: no value is negative, and the largest is {highest:.4g}, as in percent or from 0 to 255; log-odds "
            "without negative values\n  would put every voxel into every region. Divide probabilities by their largest possible value; if "
            "these are\n  log-odds nevertheless, give --input-type logits (in Python: input_type)."
        )
    if told == "logits" and is_inside:
        raise InputError(
            f"{name}: expected log-odds of regions, found values that all lie in [0, 1], as sigmoid probabilities do\n"
            "  For probabilities, give --input-type probabilities (in Python: input_type)."
        )
    if told == "probabilities" and not is_inside:
        raise InputError(
            f"{name}: expected probabilities between 0 and 1, found values from {lowest:.4g} to {highest:.4g}\n"
            "  For log-odds, the network's output before the sigmoid, give --input-type logits (in Python: input_type)."
        )
    if told is not None:
        reason = who_says(input_type)
    return told or ("probabilities" if is_inside else "logits"), reason


def take_log_odds(probabilities: Float32) -> None:
    """Replace C-contiguous probabilities with log(p / (1 - p)), in place, block by block; p and 1 - p are at least 1e-7."""
    flat = probabilities.reshape(-1)
    for start in range(0, flat.size, BLOCK_VOXELS):
        block = flat[start : start + BLOCK_VOXELS]
        others = np.log(np.maximum(1.0 - block, MIN_PROBABILITY))
        np.log(np.maximum(block, MIN_PROBABILITY), out=block)
        np.subtract(block, others, out=block)


def sigmoid(log_odds: Array) -> Float32:
    """Return 1 / (1 + exp(-x)) without overflow, float32 in the memory layout of the log-odds."""
    from scipy.special import expit

    probabilities: Float32 = expit(log_odds).astype(np.float32, copy=False)
    return probabilities
