"""A case in memory, and how it is refined again: a box of it at once, and all of it as `infer` does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.base.axes import StorageOrder
from crfrefine.cases.case import Case, nonzero_mask, read_case, read_case_headers
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.label_input import LabelMap
from crfrefine.engines import get_backend, keeping_backend
from crfrefine.engines.base import RunContext
from crfrefine.errors import InputError
from crfrefine.pages.pictures.planes import Upright, choose_places
from crfrefine.pages.pictures.windows import Window, choose_window
from crfrefine.parameters.sections import NORMALIZED, PostprocessParameters
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import refine_network

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Bool, Float32, Labels
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.engines.base import Progress
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult

MAX_VALUES = 700_000
"""Logits of a box, voxels times labels: refined in about 0.2 s of processor time (docs/guide/tuning.md)."""

_MIN_LABELS = 3  # With two labels, kernels take most of the time.


class TuneCase(Case):
    """A case, read once, with what the page shows of it."""

    @cached_property
    def network_labels(self) -> Labels:
        """(*grid), the network's own labels."""
        return self.network.labels if isinstance(self.network, LabelMap) else self.decode(self.logits)

    @cached_property
    def pose(self) -> Upright:
        """How to show the arrays upright."""
        return Upright.of(self.like.affine, len(self.grid))

    @property
    def grid(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.like.grid_shape

    @property
    def upright_grid(self) -> tuple[int, ...]:
        """Voxels along each axis of what is shown."""
        return self.pose.turn(self.network_labels).shape

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """Mm, one per axis of what is shown."""
        return tuple(float(self.spacing[axis]) for axis in self.pose.axis_order)

    @cached_property
    def nonzero(self) -> Bool:
        """(*grid), True where any modality is not 0."""
        return nonzero_mask(self.image, self.like.path)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The gray values of each modality."""
        structure = self.network_labels > 0
        return tuple(choose_window(modality, structure) for modality in self.image)

    def mask_for(self, parameters: CrfParameters) -> Bool | None:
        """Return where the model applies, (*grid), as `infer` has it for these parameters; None: everywhere."""
        return self.mask if self.mask is not None or parameters.intensity.mask != "nonzero" else self.nonzero

    def upright_box(self, box: Box) -> Box:
        """Return where a box of the grid is in the upright grid."""
        turned = []
        for axis, is_flipped in zip(self.pose.axis_order, self.pose.flips, strict=True):
            part, size = box[axis], self.grid[axis]
            turned.append(slice(size - part.stop, size - part.start) if is_flipped else slice(part.start, part.stop))
        return tuple(turned)

    def stored_place(self, place: Sequence[int]) -> tuple[int, ...]:
        """Return the voxel of the grid that a voxel of the upright grid is."""
        stored = [0] * len(place)
        for at, axis, is_flipped in zip(place, self.pose.axis_order, self.pose.flips, strict=True):
            stored[axis] = self.grid[axis] - 1 - at if is_flipped else at
        return tuple(stored)

    def first_place(self) -> tuple[int, ...]:
        """Return the voxel of the upright grid to show first: in the structure."""
        maps = [self.pose.turn(labels) for labels in (self.network_labels, self.labels) if labels is not None]
        changed = maps[0] != maps[-1] if len(maps) > 1 else np.zeros(maps[0].shape, bool)
        return choose_places(maps, changed, self.upright_spacing).structure


def open_case(files: CaseFiles, reading: ReadingOptions, threads: int | None) -> TuneCase:
    """Read a case; raises as `infer` does, and for grids with other than two or three axes."""
    reading = replace(reading, mask_mode="none")  # A mask made from the image depends on parameters that the page changes.
    headers = read_case_headers(files, reading)
    num_axes = len(headers.images[0].grid_shape)
    if num_axes not in (2, 3):
        raise InputError(f"{headers.images[0].path}: has {num_axes} axes; the page shows grids of two or three")
    return TuneCase(**vars(read_case(headers, reading, as_logits=False, threads=threads, with_labels=True)))


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
        self._threads = threads
        # Boxes keep no kernels: they run beside the whole case.
        self._backend, self._keeping_backend = get_backend(device), keeping_backend(device)
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
        return refine_network(network, image, backend=self._keeping_backend, context=context, allow_vanishing=True, **shared)

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
        plain = replace(parameters, intensity=NORMALIZED, postprocess=PostprocessParameters())
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
        return refine_network(network, image, spacing=case.spacing, parameters=plain, mask=inside, backend=self._backend, context=context)

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
