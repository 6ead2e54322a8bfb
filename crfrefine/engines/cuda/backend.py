"""The GPU engine, as a backend."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.base import Backend, MeanFieldResult, Progress, Range
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.callbacks import staged
from crfrefine.engines.cuda.device import Device, active_for, capacity, check_memory, grouped, num_row_groups, row_width
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.kernel_set import bilateral_filter, build_kernels, normalized
from crfrefine.engines.cuda.kernels import CudaKernels
from crfrefine.engines.cuda.mean_field import MeanFieldOptions, run_mean_field
from crfrefine.engines.cuda.memory import case_bytes, message_bytes
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.engines.reference.engine import ReferenceBackend
from crfrefine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from crfrefine.parameters.model import ResolvedParameters


class CudaBackend:
    """Permutohedral lattice, truncated and exact sums, separable spatial filter: float32, the same bits on every run."""

    def __init__(self, device: Device) -> None:
        """Take a device."""
        self.device = device
        self.name = device.name
        self._lock = threading.Lock()  # one case at a time: each may need all the memory

    def mean_field(
        self,
        logits: NDArray[np.float32],
        image: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        parameters: ResolvedParameters,
        *,
        axes: Sequence[int] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`. `threads` means nothing here.

        Raises:
            InputError: the mask is empty, or an intensity is not finite.
            ConfigError: the filter is `grid`, which this engine does not have.
            CapacityError: not enough memory, or bandwidths too small for the lattice.
        """
        spatial, device = parameters.spatial, self.device
        weights = [kernel.weight for kernel in parameters.bilateral] + ([] if spatial is None else [spatial.weight])
        num_labels = len(logits)
        options = MeanFieldOptions(
            weights=np.asarray(weights, dtype=np.float32).reshape(len(weights), num_labels),
            compatibility=np.asarray(parameters.compatibility, dtype=np.float32),
            is_potts=bool(parameters.is_potts),
            num_iterations=int(parameters.num_iterations),
            tolerance=float(parameters.tolerance),
            temperature=float(parameters.temperature),
            damping=float(parameters.damping),
            watches_energy=parameters.normalization != "after",
        )
        inside = math.prod(logits.shape[1:]) if mask is None else int(np.count_nonzero(mask))
        with self._lock, device.active(), capacity(logits.shape):
            needed = case_bytes(
                logits.shape,
                len(image),
                inside,
                options.num_channels,
                num_bilateral=len(parameters.bilateral),
                filter_name=parameters.filter,
            )
            check_memory(device, needed, f"a case of {inside} voxels and {num_labels} labels")
            started = time.perf_counter()
            on_device, guide = (device.upload(np.asarray(channels, dtype=np.float32)) for channels in (logits, image))
            device.synchronize()
            uploaded = time.perf_counter()
            voxels = Voxels(device, logits.shape[1:], parameters.position_spacing(spacing), mask, axes)
            kernels, filters = build_kernels(
                voxels,
                guide,
                [(kernel.theta_alpha.tolist(), kernel.theta_beta.tolist()) for kernel in parameters.bilateral],
                None if spatial is None else spatial.theta_gamma.tolist(),
                normalization=parameters.normalization,
                filter_name=parameters.filter,
                num_channels=options.num_channels,
                num_filterings=options.num_iterations,
                progress=staged(progress, "build"),
            )
            del guide  # the filters have what they need of it
            device.synchronize()
            built = time.perf_counter()
            outcome = run_mean_field(voxels, kernels, options, on_device, staged(progress, "mean field"))
            stepped = time.perf_counter()  # the steps are done: their energies are here
            result = device.download(outcome.logits)
            downloaded = time.perf_counter()
        return MeanFieldResult(
            logits=result,
            num_iterations=outcome.num_iterations,
            converged=outcome.converged,
            energy=outcome.energy,
            filters=tuple(filters),
            timings={
                "upload": uploaded - started,
                "build": built - uploaded,
                "steps": stepped - built,
                "download": downloaded - stepped,
            },
        )

    def message(
        self,
        values: NDArray[np.float32],
        image: NDArray[np.float32] | None,
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        theta_alpha: Sequence[float],
        theta_beta: Sequence[float] | None,
        normalization: str = "none",
        filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
        threads: int | None = None,
    ) -> NDArray[np.float32]:
        """Filter values once; see `Backend.message`."""
        device, num_channels = self.device, len(values)
        inside = math.prod(values.shape[1:]) if mask is None else int(np.count_nonzero(mask))
        with self._lock, self.device.active(), capacity(values.shape):
            num_modalities = 0 if image is None else len(image)
            needed = message_bytes(values.shape, num_modalities, inside, filter_name="" if num_modalities == 0 else filter)
            check_memory(device, needed, f"a message of {inside} voxels and {num_channels} channels")
            voxels = Voxels(device, values.shape[1:], spacing, mask)
            plain: Filter
            if theta_beta is None or image is None:
                plain = SpatialFilter(voxels, voxels.of_box_axes(theta_alpha))
            else:
                guide = device.upload(np.asarray(image, dtype=np.float32))
                bilateral = BilateralInput(voxels, guide, voxels.of_box_axes(theta_alpha), theta_beta)
                plain = bilateral_filter(filter, bilateral, num_channels, 1)
            kernel = normalized(plain, voxels, normalization)
            width = row_width(num_channels)
            channels = device.upload(np.asarray(values, dtype=np.float32))
            rows = device.xp.empty((num_row_groups(num_channels), voxels.num_voxels, width), dtype=np.float32)
            constants = {"CRF_WIDTH": width}
            for g, group in enumerate(rows):
                part = channels[g * width : (g + 1) * width]
                device.launch(
                    "voxels",
                    "gather_rows",
                    constants,
                    voxels.num_voxels,
                    part,
                    voxels.grid_size,
                    len(part),
                    voxels.grid_index,
                    voxels.num_voxels,
                    group,
                )
            total = device.xp.zeros_like(rows)
            kernel.accumulate(rows, device.upload(grouped(np.ones(num_channels, dtype=np.float32), width)), total)
            out = device.xp.zeros_like(channels)
            for g, group in enumerate(total):
                part = out[g * width : (g + 1) * width]
                device.launch(
                    "voxels",
                    "scatter_rows",
                    constants,
                    voxels.num_voxels,
                    group,
                    voxels.num_voxels,
                    voxels.grid_index,
                    len(part),
                    voxels.grid_size,
                    part,
                )
            return device.download(out)

    def kernels(
        self,
        image: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        bilateral: Sequence[tuple[Sequence[float], Sequence[float]]],
        theta_gamma: Sequence[float] | None,
        normalization: str,
        filter: str,  # noqa: A002 - the parameter's name in the configuration
        num_labels: int,
        num_iterations: int,
        threads: int | None = None,
    ) -> CudaKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`.

        The image may be on the device already, as anything that shares its memory by DLPack: nothing is copied then.
        """
        with self._lock, active_for(self.device, image), capacity(image.shape):
            return CudaKernels(
                self.device,
                image,
                mask,
                spacing,
                bilateral=bilateral,
                theta_gamma=theta_gamma,
                normalization=normalization,
                filter_name=filter,
                num_labels=num_labels,
                num_iterations=num_iterations,
            )

    def label_map(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`. The logits are the host's, and so is the work."""
        return self._host.label_map(logits, threads=threads)

    def softmax(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
        """Return the softmax over labels; see `Backend.softmax`. Done on the host."""
        return self._host.softmax(logits, threads=threads)

    def channel_ranges(self, channels: NDArray[np.float32], *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`. Done on the host."""
        return self._host.channel_ranges(channels, threads=threads)

    @cached_property
    def _host(self) -> Backend:
        try:
            return CpuBackend()
        except BackendUnavailableError:  # a checkout without the compiled engine: the same answers from numpy, in more time
            return ReferenceBackend()
