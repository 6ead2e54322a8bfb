"""The GPU engine, as a backend."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.array_types import Float32
from crfrefine.engines import host
from crfrefine.engines.base import NO_CONTEXT, MeanFieldResult, RunContext
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.device import Device, active_for, capacity, check_memory, grouped, num_row_groups, padded_channels, row_width
from crfrefine.engines.cuda.kernel_set import build_filter, normalized
from crfrefine.engines.cuda.kernels import CudaKernels
from crfrefine.engines.cuda.memory import build_bytes, run_bytes
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, ModelSpec


class CudaBackend:
    """Permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter: float32, the same bits on every run."""

    def __init__(self, device: Device) -> None:
        """Take a device."""
        self.device = device
        self.name = device.name
        self._lock = threading.Lock()  # one case at a time: each may need all of the memory
        # Computed on the host.
        self.label_map, self.softmax, self.channel_ranges = host.label_map, host.softmax, host.channel_ranges
        with suppress(BackendUnavailableError):  # without the compiled engine numpy gives the same answers, more slowly
            cpu = CpuBackend()
            self.label_map, self.softmax, self.channel_ranges = cpu.label_map, cpu.softmax, cpu.channel_ranges

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> CudaKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`. The number of threads has no effect here.

        The image may be on the device already, as any object that shares its memory by DLPack: it is then not copied.

        Raises:
            InputError: the mask is empty, an intensity is not finite, or the filter is `grid` and the modalities are not one or two.
            ConfigError: the filter does not exist.
            CapacityError: not enough memory, or bandwidths too small for the lattice or the grid.
        """
        with self._lock, active_for(self.device, image.values), capacity(image.values.shape):
            return CudaKernels(self.device, image, spec, context.progress)

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`.

        Raises:
            InputError, ConfigError, CapacityError: as `kernels`; the memory for the whole case is estimated before anything is allocated.
        """
        num_labels, inside = len(logits), image.num_voxels
        with self._lock, self.device.active(), capacity(logits.shape):
            needed = build_bytes(image.values.shape, inside, spec.kernels) + 4.0 * math.prod(logits.shape)
            needed += run_bytes(logits.shape, inside, spec.mean_field)
            check_memory(self.device, needed, f"a case of {inside} voxels and {num_labels} labels")
            guide = replace(image, values=np.asarray(image.values, dtype=np.float32))
            kernels = CudaKernels(self.device, guide, spec.kernels, context.progress)
            return kernels.run(np.asarray(logits, dtype=np.float32), spec.mean_field, progress=context.progress)

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter values once; see `Backend.message`."""
        device, num_channels, wanted = self.device, len(values), spec.kernels[0]
        inside = image.num_voxels
        with self._lock, self.device.active(), capacity(values.shape):
            image_shape = (0 if wanted.is_spatial else len(image.values), *values.shape[1:])
            needed = build_bytes(image_shape, inside, spec)
            needed += 8.0 * (math.prod(values.shape) + padded_channels(num_channels) * inside)
            check_memory(device, needed, f"a message of {inside} voxels and {num_channels} channels")
            voxels = Voxels(device, values.shape[1:], spec.distances(image.spacing), image.mask)
            guide = device.upload(np.asarray(image.values, dtype=np.float32))
            plain = build_filter(voxels, guide, wanted, spec.filter, num_channels, 1)
            kernel = normalized(plain, voxels, spec.normalization)
            width, xp = row_width(num_channels), device.xp
            channels = device.upload(np.asarray(values, dtype=np.float32)).reshape(num_channels, -1)
            rows = xp.zeros((num_row_groups(num_channels), voxels.num_voxels, width), dtype=np.float32)
            total, out = xp.zeros_like(rows), xp.zeros_like(channels)
            for c, channel in enumerate(channels):
                rows[c // width, :, c % width] = channel[voxels.grid_index]
            kernel.accumulate(rows, device.upload(grouped(np.ones(num_channels, dtype=np.float32), width)), total)
            for c, channel in enumerate(out):
                channel[voxels.grid_index] = total[c // width, :, c % width]
            return device.download(out.reshape(values.shape))
