"""Labels that share channels, as every engine checks and reads them (`crfrefine.parameters.specs.ChannelLabels`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.parameters.specs import ChannelLabels, MeanFieldSpec


def check_channel_labels(spec: MeanFieldSpec, num_channels: int, grid_shape: Sequence[int]) -> None:
    """Raise InputError unless the run's `channel_labels`, if there are any, are labels of the model for channels on this grid.

    ConfigError: there are, and volumes are to be kept.
    """
    shared = spec.channel_labels
    if shared is None:
        return
    check_tiles(spec)
    if len(shared.tile) != len(grid_shape) or min(shared.tile) < 1:
        raise InputError(f"channel_labels.tile must be {len(grid_shape)} numbers above 0, one per axis of the grid; got {shared.tile}")
    expected = (num_channels, *(-(-extent // tile) for extent, tile in zip(grid_shape, shared.tile, strict=True)))
    if shared.labels.shape != expected:
        raise InputError(f"channel_labels.labels has shape {shared.labels.shape}; these channels in tiles of {shared.tile} need {expected}")
    lowest, highest = int(shared.labels.min()), int(shared.labels.max())
    if lowest < -1 or highest >= spec.num_labels:
        raise InputError(
            f"channel_labels.labels must be from -1 to {spec.num_labels - 1}, the labels of the model; got {lowest} to {highest}"
        )


def labels_of_voxels(shared: ChannelLabels, grid_shape: Sequence[int]) -> NDArray[np.int32]:
    """Return the label of each channel at each voxel, (C, *grid); 0 where a channel holds none."""
    labels = np.maximum(shared.labels, 0)
    for axis, (extent, tile) in enumerate(zip(grid_shape, shared.tile, strict=True), start=1):
        labels = np.take(labels, np.arange(extent) // tile, axis=axis)
    return labels


def check_tiles(spec: MeanFieldSpec) -> None:
    """Raise ConfigError if a run on tiles has a volume term: volumes are sums over all voxels, also where a label would be left out."""
    if spec.volume_weight > 0.0:
        raise ConfigError("volume.weight: volumes are not kept where labels are left out; set it to 0, or mean_field.label_threshold to 0")
