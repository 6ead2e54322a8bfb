"""Scores as probabilities, and back: softmax, the logarithm of its divisor, sigmoid, logarithms.

Marginals are the softmax of logits (docs/reference/math.md, equation 5): what another update in
place of the softmax changes in numpy is here.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.padding import find_ties
from crfrefine.arrays.probabilities import BLOCK_VOXELS, SUM_TOLERANCE
from crfrefine.base.array_types import Array, Float32
from crfrefine.base.numerics import MIN_PROBABILITY

_Float = TypeVar("_Float", np.float32, np.float64)


def softmax(logits: NDArray[_Float]) -> NDArray[_Float]:
    """Return exp(logits) divided by its sum over the first axis, without overflow."""
    probabilities = logits - logits.max(axis=0)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=0)
    return probabilities


def log_sum_exp(logits: NDArray[_Float]) -> NDArray[_Float]:
    """Return the logarithm of the sum of exp(logits) over the first axis, without overflow."""
    largest = logits.max(axis=0)
    sums = np.exp(logits - largest).sum(axis=0)
    return largest + np.log(sums)


def log_sums_of_tiles(
    logits: Float32, first_entry: NDArray[np.integer[Any]], temperature: float
) -> Float32:
    """Return the logarithms of the sums of exp(logits / temperature), (tiles, voxels of a tile).

    The entries of a tile are those from its `first_entry` on, to that of the next one.
    """
    starts = first_entry[:-1]
    counts = np.diff(first_entry)
    largest = over_output_temperature(np.maximum.reduceat(logits, starts, axis=0), temperature)
    sums = np.zeros_like(largest)
    for number in range(int(counts.max())):
        tiles = np.flatnonzero(counts > number)
        of_label = over_output_temperature(logits[starts[tiles] + number], temperature)
        sums[tiles] += np.exp(of_label - largest[tiles])
    return largest + np.log(sums)


def marginal(logits: Float32, log_sum: Float32) -> Float32:
    """Return the softmax of a label's logits, with the `log_sum_exp` of all labels."""
    return np.exp(logits - log_sum)


def logit_of(probability: float, log_sum: NDArray[_Float]) -> NDArray[_Float]:
    """Return the logits whose softmax is a probability."""
    return log_sum + np.log(probability)


def least_difference(probability: float) -> float:
    """Return a difference of two labels' logits: below it, the first has a smaller probability."""
    return float(np.log(probability))


def sigmoid(log_odds: Array) -> Float32:
    """Return 1 / (1 + exp(-x)) without overflow, float32 in the memory layout of the log-odds."""
    from scipy.special import expit

    return expit(log_odds).astype(np.float32, copy=False)


def clip_overshoot(probabilities: Float32) -> None:
    """Clip (L, *grid) to [0, 1] and divide by the sums, in place, if values lie clearly outside.

    Logits need only the clipping, which `take_logarithms` does: the logarithm of a sum is the same
    for all labels of a voxel. Voxels where all labels are equal, such as padding, stay as they are.
    """
    if probabilities.min() >= -SUM_TOLERANCE and probabilities.max() <= 1 + SUM_TOLERANCE:
        return
    ties = find_ties(probabilities)
    others: Any = True if ties is None else ~ties
    np.clip(probabilities, 0.0, 1.0, out=probabilities, where=others)
    sums = probabilities.sum(axis=0)
    np.divide(probabilities, sums, out=probabilities, where=others & (sums > 0))


def take_logarithms(probabilities: Float32) -> None:
    """Replace C-contiguous probabilities with log(clip(p, 1e-7, 1)), in place, block by block."""
    flat = probabilities.reshape(-1)
    for block in np.split(flat, range(BLOCK_VOXELS, flat.size, BLOCK_VOXELS)):
        np.clip(block, MIN_PROBABILITY, 1.0, out=block)
        np.log(block, out=block)


def over_output_temperature(logits: Float32, temperature: float) -> Float32:
    """Return refined logits, or log-odds of regions, divided by a temperature; no copy with 1.

    Their softmax or sigmoid are calibrated probabilities.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, section 4.2;
        docs/reference/math.md, section 7.
    """
    if temperature == 1.0:
        return logits
    return logits * np.float32(1.0 / temperature)
