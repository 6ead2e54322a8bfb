"""What an engine without functions of its own does with logits on the host, by numpy."""

from __future__ import annotations

import math

import numpy as np

from crfrefine.base.array_types import Float32, Labels
from crfrefine.engines.base import Range


def label_map(logits: Float32, *, threads: int | None = None) -> Labels:
    """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
    labels: Labels = np.argmax(logits, axis=0).astype(np.min_scalar_type(len(logits) - 1))
    return labels


def softmax(logits: Float32, *, threads: int | None = None, out: Float32 | None = None) -> Float32:
    """Return the softmax over labels; see `Backend.softmax`."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=0))
    marginals = np.empty_like(logits) if out is None else out
    np.divide(exponentials, exponentials.sum(axis=0), out=marginals, casting="same_kind")
    return marginals


def channel_ranges(channels: Float32, *, threads: int | None = None) -> list[Range]:
    """Return each channel's extremes; see `Backend.channel_ranges`."""
    ends = [(float(channel.min()), float(channel.max())) for channel in channels]
    return [pair if all(map(math.isfinite, pair)) else (math.nan, math.nan) for pair in ends]
