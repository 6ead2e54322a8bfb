"""Refine a case on the CPU whose channels are streamed from their files, with the same result as `crfrefine.refine` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crfrefine.base.axes import StorageOrder
from crfrefine.base.memory import memory_left, memory_limit
from crfrefine.engines import get_backend
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.label_map import check_decision_on_tiles, streamed_result
from crfrefine.refinement.tiles.running import Settings
from crfrefine.refinement.tiles.streaming import ChannelStream, refine_stream

if TYPE_CHECKING:
    from crfrefine.cases.case import Case
    from crfrefine.engines.base import Progress
    from crfrefine.io.logits import LogitsHeader
    from crfrefine.refinement.result import RefinementResult
    from crfrefine.runs.infer.options import InferenceOptions


def refine_streamed(
    case: Case, network: LogitsHeader, input_type: str, options: InferenceOptions, progress: Progress | None
) -> RefinementResult:
    """Return the refined case; `network` are the headers of its files."""
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
