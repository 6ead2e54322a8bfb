"""The C++ engine for programs that refine one case again and again, with ever new parameters."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import NO_CONTEXT
from crfrefine.engines.cpu import CpuBackend, CpuKernels, Look
from crfrefine.errors import CapacityError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32
    from crfrefine.engines.base import MeanFieldResult, RunContext
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, ModelSpec


class KeepingBackend(CpuBackend):
    """Keeps the newest kernels of whole volumes for the next run, where image, mask, spacing and bandwidths are equal.

    One run at a time. Results have the bits of `CpuBackend`.

    Attributes:
        look: shown the steps of the next mean fields; None means no viewer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.look: Look | None = None
        self._kept: CpuKernels | None = None
        self._built_for: tuple[GridImage, KernelSetSpec, int | None] | None = None

    def forget(self) -> None:
        """Give the memory of the kernels back."""
        self._kept = self._built_for = None

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> CpuKernels:
        """Return the kept kernels if they fit, or build them; see `Backend.kernels`. Those of parts of a volume are not kept."""
        if image.origin is not None:
            return super().kernels(image, spec, context)
        if self._kept is None or not self._fits(image, spec, context.threads):
            self.forget()  # Two need not fit into memory.
            self._kept = super().kernels(image, spec, context)
            self._kept.is_kept = True
            self._built_for = image, spec, context.threads
        return self._kept

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on kept kernels; see `Backend.mean_field`. Where they do not fit into memory beside it, none are kept."""
        try:
            return self.kernels(image, spec.kernels, context).run(logits, spec.mean_field, progress=context.progress, look=self.look)
        except CapacityError:
            self.forget()
        return CpuBackend().mean_field(logits, image, spec, context)

    def _fits(self, image: GridImage, spec: KernelSetSpec, threads: int | None) -> bool:
        assert self._built_for is not None
        built, built_spec, built_threads = self._built_for
        pairs = ((image.values, built.values), (image.mask, built.mask))
        if not all(_is_same(one, other) for one, other in pairs) or threads != built_threads:
            return False
        if tuple(image.spacing) != tuple(built.spacing) or tuple(image.axes or ()) != tuple(built.axes or ()):
            return False
        if dataclasses.replace(built_spec, num_iterations=spec.num_iterations) != spec:
            return False
        if spec.num_iterations == built_spec.num_iterations or spec.filter != "auto":
            return True
        # For more steps, another filter may be the fastest one.
        before, after = (self.plan_filters(image, each, threads) for each in (built_spec, spec))
        return before == after


def _is_same(one: Array | None, other: Array | None) -> bool:
    """Return whether two arrays are equal, or neither is there."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and np.array_equal(one, other)
