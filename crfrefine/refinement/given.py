"""A case as it is given, the network's output in any form and the rest, and as it is prepared.

`CaseToRefine` and the networks do not change. `Prepared` is filled step by step by `preparing` and
`tiles.planning`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import check_logits, given_label_map
from crfrefine.arrays.foreground import decide_channel, fill_background_of_channel
from crfrefine.arrays.label_maps import channels_of, occurring_channels, present_labels
from crfrefine.arrays.region_scheme import RegionScheme, identify_regions, take_log_odds
from crfrefine.base.axes import Axes
from crfrefine.engines.results import label_map
from crfrefine.errors import ConfigError, InputError
from crfrefine.refinement.tiles.grid import MAX_DIMS

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.arrays.region_scheme import GivenRegions
    from crfrefine.arrays.resampling import Interpolation
    from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
    from crfrefine.base.notes import Note
    from crfrefine.engines.base import Backend, GridImage, RunContext
    from crfrefine.io.reading import Piece
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.strokes import Strokes
    from crfrefine.refinement.tiles.problem import TileProblem

# ---- The network's output: an array, a label map, or files whose channels stream by

ReadPieces = Callable[[], "Iterable[Piece]"]


@dataclass(frozen=True, eq=False)
class ArrayNetwork:
    """A network's output in memory."""

    # (L, *grid) logits or probabilities, or (R, *grid) log-odds of regions
    values: NDArray[np.floating[Any]]
    input_type: str = "logits"  # of labels, "auto", "logits" or "probabilities"
    regions: RegionScheme | None = None  # of the channels; None means that they are labels
    # mm between voxels of the network, if interpolated; None means unknown
    network_spacing: tuple[float, ...] | None = None
    # (*grid), True where the network saw nothing, if interpolation tells it; None means that the
    # shapes of ties do (`arrays.padding`).
    unseen: NDArray[np.bool_] | None = None
    # the label of each channel, background first; None means their numbers
    channel_labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless each region has a channel."""
        regions = self.regions
        if regions is not None and len(self.values) != regions.num_regions:
            raise InputError(
                f"the log-odds have shape {self.shape}; expected ({regions.num_regions}, *grid), "
                f"one channel per region: {regions.describe()}"
            )

    @classmethod
    def of_array(
        cls,
        values: Array,
        image: Array,
        input_type: str,
        network_spacing: ArrayLike | str | None,
        regions: GivenRegions | None,
    ) -> tuple[ArrayNetwork, tuple[Note, ...]]:
        """Return the channels in a caller's array, also a background that they lack, and notes.

        Arguments and errors are those of `crfrefine.refine`.
        """
        if network_spacing is not None:
            raise ConfigError(
                f"network_spacing: it is that of a label map, and input_type is '{input_type}'; "
                "logits on a coarser grid are interpolated onto the image's before. For a label "
                "map, input_type='labels'"
            )
        if regions is not None:
            scheme = RegionScheme.of(regions)
            check_logits(values, image, input_type, min_channels=1)
            network = cls(values, "logits", scheme)
            if input_type != "logits":
                _require_finite(values)
                # "auto" expects log-odds, and refuses values that look like probabilities.
                kind, _ = identify_regions(values, input_type, kind="logits")
                if kind == "probabilities":
                    order = Axes.of_memory(values[0])
                    log_odds = np.array(order.apply(values), np.float32, order="C")
                    take_log_odds(log_odds)
                    network = replace(network, values=order.undo(log_odds))
            return network, ()
        check_logits(values, image, input_type, min_channels=2 if input_type == "auto" else 1)
        if len(values) > 1:
            return cls(values, input_type), ()

        # Log-odds or probabilities of label 1.
        _require_finite(values)
        kind, note = decide_channel(values[0], input_type, None, Path("logits"))
        # The axes keep their order in memory.
        order = Axes.of_memory(values[0])
        stored = order.apply(values[0])
        channels: Float32 = np.empty((2, *stored.shape), np.float32)
        with np.errstate(over="ignore"):
            channels[1] = stored
        fill_background_of_channel(channels, kind)
        return cls(order.undo(channels), kind), (note,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid), its axes in the user's order."""
        return self.values.shape

    @property
    def num_labels(self) -> int:
        """L, background included: one more than the largest label."""
        if self.regions is not None:
            return self.regions.num_labels
        if self.channel_labels is not None:
            return max(self.channel_labels) + 1
        return len(self.values)


def _require_finite(values: Array) -> None:
    if not np.isfinite(values).all():
        raise InputError("logits hold values that are not finite (NaN or infinity)")


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

    @classmethod
    def of_array(
        cls,
        values: Array,
        image: Array,
        parameters: CrfParameters,
        network_spacing: ArrayLike | str | None,
        regions: GivenRegions | None,
    ) -> LabelMapNetwork:
        """Return the label map in a caller's array, with as many labels as the parameters have.

        Arguments and errors are those of `crfrefine.refine`.
        """
        if regions is not None:
            raise ConfigError(
                "regions: they are those of the channels of logits, and a label map has none; "
                "leave regions out"
            )
        labels = given_label_map(values, image)
        present = channels_of(present_labels(labels))
        num_labels = parameters.num_labels or present[-1] + 1
        if present[-1] >= num_labels:
            raise InputError(
                f"the label map holds labels up to {present[-1]}, but the parameters have values "
                f"for {num_labels} labels; give parameters for all labels, or merge labels"
            )
        return cls(labels, present, num_labels, network_spacing)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid), its axes in the user's order."""
        return (len(self.channels), *self.labels.shape)

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
    grid_shape: tuple[int, ...]  # of the image, in storage order
    input_type: str  # "auto", "logits" or "probabilities"
    kind: str | None  # the same if the file declares it
    path: Path  # the file, for messages
    # From the network's grid of three axes to the image's; None means that they are the same.
    interpolation: Interpolation | None = None
    # mm between voxels of the network's grid along each axis of the image, if interpolated
    network_spacing: tuple[float, ...] | None = None
    # the label of each channel, background first; None means their numbers
    channel_labels: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid), its axes in the user's order."""
        return (self.num_channels, *reversed(self.grid_shape))

    @property
    def num_labels(self) -> int:
        """L, background included: one more than the largest label."""
        if self.channel_labels is not None:
            return max(self.channel_labels) + 1
        return self.num_channels


Network = ArrayNetwork | LabelMapNetwork | StreamedNetwork


def with_numbers_of_channels(network: Network) -> Network:
    """Return a network whose labels are the numbers of its channels; a label map stays as it is."""
    if isinstance(network, LabelMapNetwork):
        return network
    return replace(network, channel_labels=None)


# ---- The case

# The model of a case that is not in storage order yet.
UNKNOWN = cast("ModelSpec", None)


@dataclass(frozen=True, eq=False)
class CaseToRefine:
    """A case without the network's output, unlike a `Case` of `crfrefine.cases`.

    Its axes are in the user's order at first; `refining` brings them into storage order, and then
    the model is known.
    """

    # raw intensities, and the user's mask; in storage order without the voxels that are NaN
    image: GridImage
    parameters: CrfParameters
    backend: Backend
    context: RunContext
    strokes: Strokes | None
    order: Axes  # that the axes of the network's output are stored in
    # The regions of the channels; None means that they are labels.
    regions: RegionScheme | None = None
    # mm between voxels of the network in the user's order; None means that they are the image's
    network_spacing: tuple[float, ...] | None = None
    is_label_map: bool = False  # whether the network's output is a label map
    model: ModelSpec = UNKNOWN  # of the labels, or of the regions
    notes: tuple[Note, ...] = ()  # on the inputs, for the user

    @property
    def can_have_tiles(self) -> bool:
        """Whether labels can be left out on tiles, as only the C++ engine does."""
        has_labels = self.regions is None
        return has_labels and self.backend.name == "cpu" and len(self.image.spacing) <= MAX_DIMS

    def decode(self, channels: Float32) -> Labels:
        """Return the label map, (*grid), of channels, (channels, *grid)."""
        if self.regions is not None:
            return self.regions.decode(channels)
        return label_map(channels, self.context.threads)


@dataclass(eq=False)
class Prepared:
    """The inputs of a mean field, in storage order; a user's array is copied before it changes."""

    # (L, *grid), or probabilities, or (R, *grid) log-odds; no channel if they are not in memory
    logits: Float32
    image: GridImage  # raw, then normalized, of the box; with tiles that of their problem counts
    # (*grid), True inside the mask and outside the padding; None means everywhere
    mask: Bool | None
    largest: float = 0.0  # the largest magnitude of a logit, for checks while it is prepared
    # Whether `logits` are probabilities of labels, whose logarithm is still to be taken.
    is_probability: bool = False
    # (*grid) the network's label map; None means that it is still to be made from the logits
    labels: Labels | None = None
    # The part of the grid that is refined, or that tiles cover; None means all of it.
    box: Box | None = None
    problem: TileProblem | None = None  # that on tiles; None means all labels everywhere
    # (*tiles), sum over the voxels inside the mask of the largest logit, bias included, over the
    # temperature; None without tiles
    largest_sums: Float64 | None = None
    # (L,), voxels that each label gains by strokes before the mean field; None means none, or that
    # no volumes are kept
    gained: NDArray[np.int64] | None = None
    # (*grid), True where the network saw nothing, inside the mask or outside; None means nowhere
    unseen: Bool | None = None
    num_padding: int = 0  # voxels in the mask that are padding
    notes: tuple[Note, ...] = ()  # for the user
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage

    def image_in(self, box: Box) -> Float32:
        """Return the normalized image in a box of the grid, (M, *box)."""
        values = self.image.values
        if self.box is None:
            return values[(slice(None), *box)]
        # Values outside the image's box are those at its faces: they do not matter outside the
        # mask.
        inner = [np.arange(len(values))]
        for along, of_image in zip(box, self.box, strict=True):
            first = of_image.start
            places = np.arange(along.start, along.stop)
            inner.append(places.clip(first, of_image.stop - 1) - first)
        return values[np.ix_(*inner)]
