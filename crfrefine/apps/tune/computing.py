"""Refine a case while its parameters change: a box of it at once, and all of it as `infer` does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.base.axes import StorageOrder
from crfrefine.cases.label_input import LabelMap
from crfrefine.engines.base import RunContext
from crfrefine.parameters.sections import NORMALIZED, PostprocessParameters
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.refining_again import RefiningAgain

if TYPE_CHECKING:
    from crfrefine.apps.tune.case import TuneCase
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.engines.base import Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult

MAX_VALUES = 700_000
"""Logits of a box, voxels times labels: refined in about 0.2 s of processor time (docs/guide/tuning.md)."""

_MIN_LABELS = 3  # With two labels, kernels take most of the time.


def box_around(case: TuneCase, place: Sequence[int]) -> Box | None:
    """Return a box around a voxel of the grid, as nearly a cube in mm as the grid allows; None: the whole grid is small enough."""
    num_channels = len(case.channel_labels) if isinstance(case.network, LabelMap) else len(case.logits)
    most = MAX_VALUES / max(num_channels, _MIN_LABELS)
    if np.prod(case.grid) <= most:
        return None
    # Axes that the cube does not fit into are taken whole, the shortest first, and the others get what is left.
    order = sorted(range(len(case.grid)), key=lambda axis: case.grid[axis] * case.spacing[axis])
    extents = [0] * len(order)
    for done, axis in enumerate(order):
        rest = order[done:]
        edge_mm = (most * float(np.prod([case.spacing[other] for other in rest]))) ** (1 / len(rest))
        extents[axis] = min(case.grid[axis], max(1, round(edge_mm / case.spacing[axis])))
        most /= extents[axis]
    starts = [min(max(0, at - extent // 2), size - extent) for at, extent, size in zip(place, extents, case.grid, strict=True)]
    return tuple(slice(start, start + extent) for start, extent in zip(starts, extents, strict=True))


class CaseRefiner:
    """Refines one case with ever new parameters. A box and the whole case may be refined at the same time."""

    def __init__(self, case: TuneCase, threads: int | None, device: str = "cpu") -> None:
        self.case = case
        self._threads, self._device = threads, device
        self._again = RefiningAgain()
        self._lock = threading.Lock()
        self._normalized: tuple[object, Float32] | None = None

    def refine_whole(self, parameters: CrfParameters, progress: Progress | None = None) -> RefinementResult:
        """Return the refined case: the result of `infer` with these parameters. One call at a time.

        `progress` is called between stages and may raise to stop.
        """
        case, mask = self.case, self.case.mask_for(parameters)
        image = self._normalized_image(parameters, mask)
        network: Network
        if isinstance(case.network, LabelMap):
            network = LabelMapNetwork(case.network.labels, case.channel_labels, case.num_labels)
        else:
            network = ArrayNetwork(case.logits, "logits", case.regions)
        shared: dict[str, Any] = {"spacing": case.spacing, "parameters": replace(parameters, intensity=NORMALIZED), "mask": mask}
        context = RunContext(self._threads, progress)
        return refine_network(network, image, device=self._device, context=context, again=self._again, allow_vanishing=True, **shared)

    def refine_box(self, parameters: CrfParameters, box: Box) -> RefinementResult | None:
        """Return a box of the case, refined by itself; None if nothing in it can be refined.

        It differs from the whole case near the faces of the box, in what the volume term keeps, and has no rules for small objects: they
        need whole objects.
        """
        case = self.case
        mask = case.mask_for(parameters)
        inside = None if mask is None else mask[box]
        if inside is not None and not inside.any():
            return None
        # Statistics of intensities are those of the whole case.
        image = self._normalized_image(parameters, mask)[(slice(None), *box)]
        postprocess = PostprocessParameters(decision=parameters.postprocess.decision)
        plain = replace(parameters, intensity=NORMALIZED, postprocess=postprocess)
        network: Network
        if isinstance(case.network, LabelMap):
            labels = case.network.labels[box]
            channels = tuple(sorted({0, *case.channel_labels[:2], *(int(label) for label in np.unique(labels))}))
            network = LabelMapNetwork(labels, channels, case.num_labels)
        else:
            logits = case.logits[(slice(None), *box)]
            if (logits == logits[:1]).all():
                return None
            network = ArrayNetwork(logits, "logits", case.regions)
        context = RunContext(self._threads)
        return refine_network(network, image, spacing=case.spacing, parameters=plain, mask=inside, device=self._device, context=context)

    def _normalized_image(self, parameters: CrfParameters, mask: Bool | None) -> Float32:
        """Return the normalized image of the whole case, (M, *grid); it is kept until other parameters need another one."""
        with self._lock:
            if self._normalized is None or self._normalized[0] != parameters.intensity:
                self._normalized = None  # Two need not fit into memory.
                order = StorageOrder.of_memory(self.case.network_labels)
                stored = None if mask is None else order.to_storage(mask)
                image, threads = order.to_storage(self.case.image), self._threads
                values = normalize_intensity(image, parameters.intensity, stored, threads=threads)
                self._normalized = (parameters.intensity, order.to_user(values))
            return self._normalized[1]
