"""The forms of a network's output: an array, a label map, or files whose channels stream by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.label_maps import occurring_channels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Labels

if TYPE_CHECKING:
    from crfrefine.arrays.resampling import Interpolation
    from crfrefine.io.reading import Piece

ReadPieces = Callable[[], "Iterable[Piece]"]


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
    # Whether blocks were looked for: the spacing is one number per axis, or None, and was noted.
    is_examined: bool = False
    # Of the channels, those of labels that do not occur: they take part only near strokes of them.
    absent: Collection[int] = ()
    # Voxels of each label that the files have and this label map lacks: other structures have them,
    # or the grid is coarser.
    lost: Mapping[int, int] = field(default_factory=dict)
    mapped: tuple[int, ...] = ()  # the values of the file that `--map` gave new labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) for users."""
        return (len(self.channels), *self.labels.shape)

    @property
    def absent_labels(self) -> tuple[int, ...]:
        """The labels from 1 to L - 1 that do not occur."""
        occurring = occurring_channels(self.labels, self.channels)
        return tuple(label for label in range(self.num_labels) if label not in occurring)


@dataclass(frozen=True, eq=False)
class StreamedNetwork:
    """A network's output in files, on the image's grid or on another one with parallel axes."""

    read: ReadPieces  # returns the pieces, from the beginning at each call
    num_labels: int  # L
    grid_shape: tuple[int, ...]  # of the image, in storage order
    input_type: str  # "auto", "logits" or "probabilities"
    kind: str | None  # the same if the file declares it
    path: Path  # the file, for messages
    # From the network's grid of three axes to the image's; None means that they are the same.
    interpolation: Interpolation | None = None
    # mm between voxels of the network's grid along each axis of the image, if interpolated
    network_spacing: tuple[float, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid) for users."""
        return (self.num_labels, *reversed(self.grid_shape))


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork
