"""The C++ engine for programs that refine one case again and again, with ever new parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.boxes import crop
from crfrefine.engines.cpu import CpuBackend, CpuKernels, Look
from crfrefine.errors import CapacityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.base import FeatureOrigin, MeanFieldResult, Progress
    from crfrefine.parameters.specs import KernelSetSpec, ModelSpec


class KeepingBackend(CpuBackend):
    """Keeps the newest kernels of whole volumes for the next run, where image, mask, spacing and bandwidths are equal.

    One run at a time. Results have the bits of `CpuBackend`.

    Attributes:
        look: shown the steps of the next mean fields; None: nobody looks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.look: Look | None = None
        self._kept: CpuKernels | None = None
        self._built_for: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Give the memory of the kernels back."""
        self._kept, self._built_for = None, ()

    def kernels(
        self,
        image: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        spec: KernelSetSpec,
        *,
        axes: Sequence[int] | None = None,
        origin: FeatureOrigin | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> CpuKernels:
        """Return the kept kernels if they fit, or build them; see `Backend.kernels`. Those of parts of a volume are not kept."""
        if origin is not None:
            return super().kernels(image, mask, spacing, spec, axes=axes, origin=origin, threads=threads, progress=progress)
        wanted = image, mask, tuple(spacing), None if axes is None else tuple(axes), threads
        if self._kept is None or not self._fits(wanted, spec):
            self.forget()  # Two need not fit into memory.
            self._kept = super().kernels(image, mask, spacing, spec, axes=axes, threads=threads, progress=progress)
            self._kept.is_kept = True
            self._built_for = (*wanted, spec)
        return self._kept

    def mean_field(
        self,
        logits: NDArray[np.float32],
        image: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        spec: ModelSpec,
        *,
        box: Box | None = None,
        axes: Sequence[int] | None = None,
        origin: FeatureOrigin | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> MeanFieldResult:
        """Run the mean field on kept kernels; see `Backend.mean_field`. Where they do not fit into memory beside it, none are kept."""
        if box is not None and mask is not None:
            logits, image, mask = crop(logits, image, mask, box)
        shared: dict[str, Any] = {"axes": axes, "origin": origin, "threads": threads, "progress": progress}
        try:
            return self.kernels(image, mask, spacing, spec.kernels, **shared).run(
                logits, spec.mean_field, progress=progress, look=self.look
            )
        except CapacityError:
            self.forget()
        return CpuBackend().mean_field(logits, image, mask, spacing, spec, **shared)

    def _fits(self, wanted: tuple[Any, ...], spec: KernelSetSpec) -> bool:
        *built, built_spec = self._built_for
        if not all(_is_same(one, other) for one, other in zip(wanted, built, strict=True)):
            return False
        if dataclasses.replace(built_spec, num_iterations=spec.num_iterations) != spec:
            return False
        if spec.num_iterations == built_spec.num_iterations or spec.filter != "auto":
            return True
        # For more steps, another filter may be the fastest one.
        image, mask, spacing, _, threads = wanted
        before, after = (self.plan_filters(image, mask, spacing, each, threads=threads) for each in (built_spec, spec))
        return before == after


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two arrays, or other values, are equal."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one is other or (not isinstance(one, np.ndarray) and not isinstance(other, np.ndarray) and one == other)
