"""The GPU engine, as a backend."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crfrefine.base.array_types import Float32
from crfrefine.engines.base import NO_CONTEXT, Backend, MeanFieldResult, RunContext
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.kernels import CudaKernels
from crfrefine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from crfrefine.engines.cuda.cupy_device import CupyDevice
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, ModelSpec


class CudaBackend(Backend):
    """Permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter: float32, the same bits on every run."""

    def __init__(self, device: CupyDevice) -> None:
        """Take a device."""
        self.device = device
        self.name = device.name
        self._lock = threading.Lock()  # one case at a time: each may need all of the memory
        with suppress(BackendUnavailableError):  # Without the compiled engine numpy gives the same answers, more slowly.
            cpu: Any = CpuBackend()
            for name in ("label_map", "softmax", "channel_ranges"):
                setattr(self, name, getattr(cpu, name))

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> CudaKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`. The number of threads has no effect here.

        The image may be on the device already, as any object that shares its memory by DLPack: it is then not copied.

        Raises:
            InputError: the mask is empty, or the filter is `grid` and the modalities are not one or two.
            CapacityError: not enough memory, or bandwidths too small for the lattice or the grid.
        """
        with self._lock:
            return CudaKernels(self.device, image, spec, context.progress)

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`."""
        with self._lock:
            kernels = CudaKernels(self.device, image, spec.kernels, context.progress)
            return kernels.run(logits, spec.mean_field, progress=context.progress)

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter values once; see `Backend.message`."""
        wanted = replace(spec, num_labels=len(values) + 1, num_iterations=1)  # for the choice of `auto`
        return self.kernels(image, wanted).message(values)
