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

    from crfrefine.cases.streamed import StreamedCase
    from crfrefine.engines.base import Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult


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


# Refine a case whose channels are streamed, with the same result as `crfrefine.refine` gives.


def refine_streamed(
    case: StreamedCase,
    parameters: CrfParameters,
    *,
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RefinementResult:
    """Refine a case on the CPU.

    Args:
        case: the case.
        parameters: the model.
        max_memory: bytes that the process may take; None, or more than the system allows: what the system allows.
        threads: None: the cores this process may use.
        progress: called between stages; may raise to stop.

    Raises:
        InputError: values that are not finite, or not the logits or probabilities that the user or the file says they are.
        ConfigError: a list in the parameters has the wrong length for this case, or the decision needs all marginals at once.
        CapacityError: not enough memory.
    """
    check_decision_on_tiles(parameters, case.network.num_labels)
    backend = get_backend("cpu")
    num_dims = case.image.ndim - 1
    order = StorageOrder.of_files(num_dims)
    model = parameters.resolve(case.network.num_labels, len(case.image), num_dims)
    stream = ChannelStream(
        case.network.pieces,
        case.network.num_labels,
        case.network.grid_shape[::-1],
        case.input_type,
        case.network.kind,
        case.network.path,
    )
    refined = refine_stream(
        stream,
        order.to_storage(case.image),
        None if case.mask is None else order.to_storage(case.mask),
        order.axes_to_storage(case.spacing),
        parameters,
        ModelSpec(model.kernels.in_storage(order), model.mean_field),
        backend,
        Settings(threads, progress, lambda: memory_left(memory_limit(max_memory))),
        axes=order.axes,
    )
    return streamed_result(refined, order, parameters, case.spacing, backend.name, threads)
