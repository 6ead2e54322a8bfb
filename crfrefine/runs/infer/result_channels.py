"""What is written and said of a result besides its label map: channels of all labels, and a line of numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from crfrefine.runs.infer.outputs import ChannelPlanes, Channels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.refinement.result import RefinementResult


def probability_channels(result: RefinementResult) -> Channels:
    """Return the marginals, as an array or plane by plane."""
    if result.channels.is_streamed:
        return _streamed(result, partial(result.channels.probabilities, output_temperature=result.output_temperature), 0.0)
    return _of_all_labels(result, result.marginals, 0.0)


def logit_channels(result: RefinementResult) -> Channels:
    """Return the refined logits, as an array or plane by plane."""
    from crfrefine.arrays.one_hot import ABSENT_LOGIT

    if result.channels.is_streamed:
        return _streamed(result, result.channels.channel, ABSENT_LOGIT)
    return _of_all_labels(result, result.logits, ABSENT_LOGIT)


def _streamed(result: RefinementResult, piece: Callable[[int, slice], NDArray[np.float32]], absent: float) -> ChannelPlanes:
    """Return values of all labels, plane by plane; those of labels without a channel are `absent`."""
    import numpy as np

    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return piece(numbers[label], planes)
        return np.full_like(piece(0, planes), absent)

    return ChannelPlanes(result.num_labels, planes_of)


def _of_all_labels(result: RefinementResult, values: NDArray[np.float32], absent: float) -> NDArray[np.float32]:
    """Return (L, *grid) values; those of labels without a channel are `absent`. Channels of regions stay as they are."""
    if result.regions is not None or len(values) == result.num_labels:
        return values
    from crfrefine.arrays.one_hot import expand_channels

    return expand_channels(values, result.channel_labels, result.num_labels, absent)


def describe_numbers(result: RefinementResult, spacing: Sequence[float], names: Mapping[int, str]) -> str:
    """Return the second line of the preview."""
    voxels, changes = result.label_map.size, result.changes
    share = changes.voxels_changed / voxels
    parts = [f"{result.num_iterations} steps", f"{changes.voxels_changed:,} of {voxels:,} voxels changed ({share:.2%})"]
    voxel_ml = math.prod(spacing) / 1000
    pairs = list(enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True)))[1:]
    volumes = [
        f"{names.get(label, f'label {label}')}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}"
        for label, (before, after) in pairs
        if before or after
    ]
    if volumes and len(volumes) <= 6:
        parts.append("ml of " + ", ".join(volume.replace(" ", "\u00a0") for volume in volumes))  # a line is not broken inside
    return "   ·   ".join(parts)
