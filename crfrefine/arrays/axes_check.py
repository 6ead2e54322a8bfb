"""Whether a network's channels agree with a label map better in other voxel axes than their own."""

from __future__ import annotations

import numpy as np

from crfrefine.base.array_types import Array, Float64, Indices, Labels
from crfrefine.base.axes import Axes, all_axes

_MAX_VOXELS = 200_000  # of the label map that are looked at, before they are sorted by label
_PICKS = 4000  # voxels that are compared, shared by the labels
_MIN_PICKS_PER_LABEL = 32
_MIN_PICKS = 4  # fewer voxels are no evidence
# Other axes contradict if they agree at this share of the voxels or more, and leave at most this
# part of the disagreement, which is at least the last of these shares smaller. Post-processing
# changes voxels in either.
_MIN_SHARE = 0.5
_MAX_OF_DISAGREEMENT = 0.5
_MIN_GAIN = 0.05
_HALF = 0.5


class AxesCheck:
    """Compares the largest channel with a label map at some voxels, in all axes of its shape.

    Channels come piece by piece, once each. Voxels of the label map are picked evenly from each
    label, background aside: post-processing takes away more than it adds, so that labels of the
    map are in the channels, too.
    """

    def __init__(self, labels: Labels) -> None:
        """Pick the voxels of a label map, ([z,] y, x)."""
        inside = np.flatnonzero(labels)
        inside = inside[:: -(-len(inside) // _MAX_VOXELS) or 1]
        values = labels.reshape(-1)[inside]
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.diff(values[order], prepend=-1))
        groups = np.split(inside[order], starts[1:])
        most = max(_PICKS // max(len(groups), 1), _MIN_PICKS_PER_LABEL)
        picks = np.concatenate([group[:: -(-len(group) // most) or 1] for group in groups])

        self.labels = labels.reshape(-1)[picks]
        self.turns: list[Axes] = []  # the first one leaves the axes as they are
        shape = (1, 1, *labels.shape)[-3:]
        positions = np.array(np.unravel_index(picks, shape))[::-1]
        sizes = shape[::-1]
        places = []
        for axes in all_axes():
            if axes.along(sizes) != sizes or any(sizes[axis] == 1 for axis in axes.mirrored):
                continue
            self.turns.append(axes)
            stored = axes.find([*positions], sizes)
            places.append(np.ravel_multi_index(stored[::-1], shape))
        self._plane = int(np.prod(labels.shape[1:]))
        self._places: Indices = np.array(places)  # (turns, picks) in the grid's order
        self._largest = np.full(self._places.shape, -np.inf, np.float32)
        self._channels = np.zeros(self._places.shape, np.intp)  # those with the largest value
        self._num_channels = 0

    @property
    def is_possible(self) -> bool:
        """Whether the label map has enough voxels to tell."""
        return len(self.labels) >= _MIN_PICKS

    def add(self, values: Array, first_channel: int = 0, first_plane: int = 0) -> None:
        """Look at a piece: (channels, planes, ...), from a channel and a plane on."""
        start = first_plane * self._plane
        stop = start + values.shape[1] * self._plane
        inside = np.nonzero((self._places >= start) & (self._places < stop))
        places = self._places[inside] - start
        largest = self._largest[inside]
        channels = self._channels[inside]
        for channel, plane in enumerate(values, start=first_channel):
            found = plane.reshape(-1)[places]
            is_larger = found > largest
            largest[is_larger] = found[is_larger]
            channels[is_larger] = channel
        self._largest[inside] = largest
        self._channels[inside] = channels
        self._num_channels = max(self._num_channels, first_channel + len(values))

    def shares(self, *, are_regions: bool = False, kind: str | None = None) -> Float64:
        """Return the share of picked voxels that agree in each of `turns`, all labels alike.

        Of regions, and of labels beyond the channels, only the foreground is compared; `kind` says
        whether regions are "logits" or "probabilities".
        """
        agrees: Array = self._channels == self.labels
        if are_regions:
            is_probability = kind == "probabilities"
            if kind is None:
                is_probability = self._largest.min() >= 0 and self._largest.max() <= 1
            agrees = self._largest > (_HALF if is_probability else 0.0)
        elif self.labels.max() >= self._num_channels:
            agrees = self._channels > 0
        _, numbers, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        weights = 1.0 / (counts[numbers] * len(counts))
        return np.matmul(agrees, weights, dtype=np.float64)


def contradicts(assumed: float, other: float) -> bool:
    """Return whether the share that agrees in other axes contradicts that in the assumed ones."""
    is_halved = 1 - other <= _MAX_OF_DISAGREEMENT * (1 - assumed)
    return other >= _MIN_SHARE and is_halved and other - assumed >= _MIN_GAIN


def is_doubtful(assumed: float) -> bool:
    """Return whether the label map hardly seems to be that of the channels."""
    return assumed < _MIN_SHARE
