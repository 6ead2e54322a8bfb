"""Scores as probabilities: softmax and the logarithm of its divisor, and sigmoid, in numpy.

Marginals are the softmax of logits (docs/reference/math.md, equation 5): what another update in
place of the softmax changes in numpy is here.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.probabilities import over_output_temperature
from crfrefine.base.array_types import Array, Float32

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
