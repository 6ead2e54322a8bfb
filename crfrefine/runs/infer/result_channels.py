"""What is written and said of a result besides its label map: channels of all labels, and a line of numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.axes import StorageOrder
from crfrefine.base.memory import memory_left, memory_limit
from crfrefine.engines import get_backend
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.label_map import check_decision_on_tiles, streamed_result
from crfrefine.refinement.tiles.running import Settings
from crfrefine.refinement.tiles.streaming import ChannelStream, refine_stream
from crfrefine.runs.infer.outputs import ChannelPlanes, Channels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case
    from crfrefine.engines.base import Progress
    from crfrefine.io.logits import LogitsHeader
    from crfrefine.refinement.result import RefinementResult
    from crfrefine.runs.infer.options import InferenceOptions


def probability_channels(result: RefinementResult) -> Channels:
    """Return the marginals, as an array or plane by plane."""
    from crfrefine.refinement.tiles.streamed_logits import StreamedLogits

    if isinstance(result.channels, StreamedLogits):
        return _streamed(result, partial(result.channels.probabilities, output_temperature=result.output_temperature), 0.0)
    return _of_all_labels(result, result.marginals, 0.0)


def logit_channels(result: RefinementResult) -> Channels:
    """Return the refined logits, as an array or plane by plane."""
    from crfrefine.arrays.one_hot import ABSENT_LOGIT
    from crfrefine.refinement.tiles.streamed_logits import StreamedLogits

    if isinstance(result.channels, StreamedLogits):
        return _streamed(result, result.channels.logits, ABSENT_LOGIT)
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


def refine_streamed(
    case: Case, network: LogitsHeader, input_type: str, options: InferenceOptions, progress: Progress | None
) -> RefinementResult:
    """Refine a case on the CPU whose channels are streamed, with the same result as `crfrefine.refine` gives; raises like that."""
    parameters, threads = options.parameters, options.threads
    check_decision_on_tiles(parameters, network.num_labels)
    backend = get_backend("cpu")
    num_dims = case.image.ndim - 1
    order = StorageOrder.of_files(num_dims)
    model = parameters.resolve(network.num_labels, len(case.image), num_dims)
    refined = refine_stream(
        ChannelStream(network.pieces, network.num_labels, network.grid_shape[::-1], input_type, network.kind, network.path),
        order.to_storage(case.image),
        None if case.mask is None else order.to_storage(case.mask),
        order.axes_to_storage(case.spacing),
        parameters,
        ModelSpec(model.kernels.in_storage(order), model.mean_field),
        backend,
        Settings(threads, progress, lambda: memory_left(memory_limit(options.max_memory))),
        axes=order.axes,
    )
    return streamed_result(refined, order, parameters, case.spacing, backend.name, threads)
