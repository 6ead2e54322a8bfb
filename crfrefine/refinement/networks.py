"""The forms of a network's output: an array, a label map, or files whose channels stream by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Labels
from crfrefine.refinement.tiles.coarse import CoarseNetwork
from crfrefine.refinement.tiles.streaming import StreamedNetwork


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    # (L, *grid) logits or probabilities, or (R, *grid) log-odds or probabilities of regions
    values: NDArray[np.floating[Any]]
    input_type: str = "logits"  # "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None means that they are labels
    # mm between voxels of the network, if interpolated; None means unknown
    network_spacing: tuple[float, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) for users."""
        return self.values.shape


@dataclass(frozen=True, eq=False)
class LabelMapNetwork:
    """A label map instead of a network's output.

    Only labels that occur take part, and if there are many, only near where they occur.
    """

    labels: Labels  # (*grid), in an unsigned type
    # The labels that occur, background, and at least two (`arrays.label_maps.channels_of`).
    channels: Sequence[int]
    num_labels: int  # L, background included, as values per label in the parameters have it
    # mm between voxels of the network, one number or one per axis, or "auto"; None means that each
    # label is taken as it is.
    network_spacing: ArrayLike | None = None
    # Of the channels, those of labels that do not occur: they take part only near strokes of them.
    absent: Collection[int] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) for users."""
        return (len(self.channels), *self.labels.shape)


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork | CoarseNetwork
