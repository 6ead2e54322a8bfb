"""Scores as probabilities: softmax and the logarithm of its divisor, and sigmoid, in numpy."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

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


def sigmoid(log_odds: Array) -> Float32:
    """Return 1 / (1 + exp(-x)) without overflow, float32 in the memory layout of the log-odds."""
    from scipy.special import expit

    return expit(log_odds).astype(np.float32, copy=False)
