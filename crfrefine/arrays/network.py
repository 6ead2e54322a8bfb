"""A network's output in any form: an array, a label map, or files whose channels stream by.

The three forms do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import occurring_channels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.axes import Axes
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.arrays.resampling import Interpolation
    from crfrefine.base.array_types import Bool, Labels, Shape, Spacing
    from crfrefine.io.reading import Piece

AUTO = "auto"  # network spacing that is found in the label map

ReadPieces = Callable[[], "Iterable[Piece]"]


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    # (L, *grid) logits or probabilities, of label 1 alone or of all labels, or the same of regions,
    # (R, *grid)
    values: NDArray[np.floating[Any]]
    input_type: str = "logits"  # "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None means that they are labels
    # mm between voxels of the network, if interpolated; None means unknown
    network_spacing: Spacing | None = None
    # (*grid), True where the network saw nothing, if interpolation tells it; None means that the
    # shapes of ties do (`arrays.padding`).
    unseen: Bool | None = None
    # the label of each channel, background first; None means their numbers
    channel_labels: tuple[int, ...] | None = None
    largest: float = 0.0  # the largest magnitude of the values, once a case is opened

    def __post_init__(self) -> None:
        """Raise InputError unless each region has a channel."""
        regions = self.regions
        if regions is not None and len(self.values) != regions.num_regions:
            raise InputError(
                f"the log-odds have shape {self.values.shape}; expected "
                f"({regions.num_regions}, *grid), one channel per region: {regions.describe()}"
            )

    @property
    def order(self) -> Axes:
        """The order in memory of the grid's axes."""
        return Axes.of_memory(self.values[0])

    def in_order(self, order: Axes) -> ArrayNetwork:
        """Return the network with the axes of its arrays in an order."""
        unseen = self.unseen
        if unseen is not None:
            unseen = order.apply(unseen)
        return replace(self, values=order.apply(self.values), unseen=unseen)

    @property
    def num_channels(self) -> int:
        """Channels that are refined: two of label 1 alone, whose background is computed."""
        if self.regions is None:
            return max(2, len(self.values))
        return len(self.values)

    @property
    def labels_of_channels(self) -> Sequence[int]:
        """The label of each channel; none of regions."""
        if self.regions is not None:
            return ()
        return self.channel_labels or range(self.num_channels)

    @property
    def num_labels(self) -> int:
        """L, background included: one more than the largest label."""
        if self.regions is not None:
            return self.regions.num_labels
        return max(self.labels_of_channels) + 1


@dataclass(frozen=True, eq=False)
class LabelMapNetwork:
    """A label map instead of a network's output.

    Only labels that occur take part, and if there are many, only near where they occur.
    """

    regions = None  # A label map has no regions.
    channel_labels = None  # Its values are labels.
    labels: Labels  # (*grid), in an unsigned type
    # The labels that occur, background, and at least two (`arrays.label_maps.channels_of`).
    channels: Sequence[int]
    num_labels: int  # L, background included, as values per label in the parameters have it
    # mm between voxels of the network along each axis, or AUTO; None means that each label is taken
    # as it is.
    network_spacing: Spacing | str | None = None
    # Whether blocks were looked for: the spacing is one number per axis, or None, and was noted.
    is_examined: bool = False
    # Of the channels, those of labels that do not occur: they take part only near strokes of them.
    absent: Collection[int] = ()
    # Voxels of each label that the files have and this label map lacks: other structures have them,
    # or the grid is coarser.
    lost: Mapping[int, int] = field(default_factory=dict)
    mapped: tuple[int, ...] = ()  # the values of the file that `--map` gave new labels

    @property
    def order(self) -> Axes:
        """The order in memory of the grid's axes."""
        return Axes.of_memory(self.labels)

    def in_order(self, order: Axes) -> LabelMapNetwork:
        """Return the label map with its axes in an order, C-contiguous."""
        return replace(self, labels=np.ascontiguousarray(order.apply(self.labels)))

    @property
    def num_channels(self) -> int:
        """Labels that take part."""
        return len(self.channels)

    @property
    def absent_labels(self) -> tuple[int, ...]:
        """The labels from 1 to L - 1 that do not occur."""
        occurring = occurring_channels(self.labels, self.channels)
        return tuple(label for label in range(self.num_labels) if label not in occurring)


@dataclass(frozen=True, eq=False)
class StreamedNetwork:
    """A network's output in files, on the image's grid or on another one with parallel axes."""

    regions = None  # Its channels are labels.
    read: ReadPieces  # returns the pieces, from the beginning at each call
    num_channels: int
    grid_shape: Shape  # of the image, in storage order
    input_type: str  # "auto", "logits" or "probabilities"
    kind: str | None  # the same if the file declares it
    path: Path  # the file, for messages
    # From the network's grid of three axes to the image's; None means that they are the same.
    interpolation: Interpolation | None = None
    # mm between voxels of the network's grid along each axis of the image, if interpolated
    network_spacing: Spacing | None = None
    # the label of each channel, background first; None means their numbers
    channel_labels: tuple[int, ...] | None = None

    @property
    def order(self) -> Axes:
        """The order of the grid's axes in files."""
        return Axes(tuple(reversed(range(len(self.grid_shape)))))

    @property
    def labels_of_channels(self) -> Sequence[int]:
        """The label of each channel."""
        return self.channel_labels or range(self.num_channels)

    @property
    def num_labels(self) -> int:
        """L, background included: one more than the largest label."""
        return max(self.labels_of_channels) + 1


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork


def with_numbers_of_channels(network: Network) -> Network:
    """Return a network whose labels are the numbers of its channels; a label map stays as it is."""
    if isinstance(network, LabelMapNetwork):
        return network
    return replace(network, channel_labels=None)
