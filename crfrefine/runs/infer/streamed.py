"""Refine a case whose channels are streamed, with the same result as `crfrefine.refine` gives."""

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
    from crfrefine.cases.streamed import StreamedCase
    from crfrefine.engines.base import Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult


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
