"""The GPU engine as a backend, and kernels built on the device, to run forward and backward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from crfrefine.base.array_types import Bool, Float32
from crfrefine.engines.base import (
    NO_CONTEXT,
    Backend,
    GridImage,
    MeanFieldGradients,
    MeanFieldReport,
    MeanFieldResult,
    Progress,
    RunContext,
    Tape,
)
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.backward import Backward
from crfrefine.engines.cuda.cupy_device import CupyDevice, following
from crfrefine.engines.cuda.kernel_set import build_kernel
from crfrefine.engines.cuda.mean_field import MeanFieldRun, VolumeBackward
from crfrefine.engines.cuda.rows import grouped, num_row_groups, row_width
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volume import volume_part
from crfrefine.errors import BackendUnavailableError, DeviceMemoryError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec

# Attribute of errors of a caller's progress function: its lack of memory means nothing about the GPU's.
_MARK = "_is_a_callers"


class CudaKernels:
    """Kernels on a device; see `Kernels`.

    Logits and gradients may be on the device already, as any object that shares its memory by DLPack (such as a tensor): results then
    stay there. All work is done when a call returns: the next one may be on another stream.
    """

    dtype = "float32"

    def __init__(
        self,
        device: CupyDevice,
        given: GridImage,
        spec: KernelSetSpec,
        progress: Progress | None = None,
    ) -> None:
        """Build the kernels; see `Backend.kernels`."""
        started = time.perf_counter()
        assert given.origin is None, "parts of a volume run on the CPU"
        self._device, self.spec, self.image_shape, self._mask = (
            device,
            spec,
            tuple(given.values.shape),
            given.mask,
        )
        self._lock = threading.Lock()
        tell = _staged(progress, "build")
        with self._working(given.values):
            self._image = device.upload(given.values).astype(np.float32, copy=False)
            device.synchronize()
            self._upload_seconds = time.perf_counter() - started
            self._voxels = Voxels(
                device, self.image_shape[1:], spec.distances(given.spacing), given.mask, given.axes
            )
            self._kernels = []
            for number, kernel in enumerate(spec.kernels):
                if tell is not None:
                    tell(number, len(spec.kernels))
                self._kernels.append(build_kernel(self._voxels, self._image, kernel, spec))
            device.synchronize()
        self.filters = tuple(
            f"{name}: {kernel.filter.description}"
            for name, kernel in zip(spec.names, self._kernels, strict=True)
        )
        self.num_voxels = self._voxels.num_voxels
        self._build_seconds = time.perf_counter() - started - self._upload_seconds

    def run(
        self,
        logits: Any,
        spec: MeanFieldSpec,
        *,
        progress: Progress | None = None,
        is_last: bool = False,
    ) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`."""
        started, spec = time.perf_counter(), spec.rounded(np.float32)
        with self._working(logits):
            given = self._array(logits)
            self._device.synchronize()
            uploaded = time.perf_counter()
            steps = MeanFieldRun(
                self._voxels, self._kernels, spec, given, self._volume_part(given, logits, spec)
            )
            outcome = steps.take_steps(_staged(progress, "mean field"))
            del steps
            stepped = (
                time.perf_counter()
            )  # the steps are done, since their energies are on the host
            report = MeanFieldReport(
                len(outcome.energy), outcome.converged, outcome.energy, self.filters
            )
            refined = self._give(outcome.logits, logits)
        timings = {
            "upload": self._upload_seconds + uploaded - started,
            "build": self._build_seconds,
            "steps": stepped - uploaded,
            "download": time.perf_counter() - stepped,
        }
        return MeanFieldResult(refined, report, timings)

    def forward(self, logits: Any, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        spec = replace(spec, tolerance=0.0).rounded(np.float32)
        with self._working(logits):
            given = self._array(logits)
            part = self._volume_part(given, logits, spec)
            outcome = MeanFieldRun(
                self._voxels, self._kernels, spec, given, part, records=True
            ).take_steps()
            refined, record = self._give(outcome.logits, logits), self._give(outcome.record, logits)
            return Tape(
                refined, record, spec, volume_biases=outcome.volume_biases, volume_part=part
            )

    def backward(
        self,
        tape: Tape,
        logits: Any,
        gradient: Any,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        with self._working(logits):
            wanted = {"wants_theta": wants_theta, "wants_image": wants_image}
            backward = Backward(
                self._voxels, self._kernels, self._image, (self.spec, tape.spec), **wanted
            )
            record, volume = self._device.upload(tape.record), None
            if tape.volume_biases is not None:
                volume = VolumeBackward(
                    self._voxels, tape.spec, record, tape.volume_biases, tape.volume_part
                )
            gradients = backward.run(record, self._array(gradient), self._array(logits), volume)
            by_image = None if gradients.image is None else self._give(gradients.image, logits)
            return replace(gradients, logits=self._give(gradients.logits, logits), image=by_image)

    def message(self, values: Float32) -> Float32:
        """Filter (V, *grid) values of the host once with the first kernel; see `Backend.message`."""
        num_channels = len(values)
        width, xp = row_width(num_channels), self._device.xp
        with self._working(values):
            channels = self._array(values).reshape(num_channels, -1)
            rows = xp.zeros(
                (num_row_groups(num_channels), self.num_voxels, width), dtype=np.float32
            )
            total, out = xp.zeros_like(rows), xp.zeros_like(channels)
            for c, channel in enumerate(channels):
                rows[c // width, :, c % width] = channel[self._voxels.grid_index]
            self._kernels[0].accumulate(
                rows, self._device.upload(grouped(np.ones(num_channels), width)), total
            )
            for c, channel in enumerate(out):
                channel[self._voxels.grid_index] = total[c // width, :, c % width]
            return self._device.download(out.reshape(values.shape))

    @contextmanager
    def _working(self, array: Any) -> Iterator[None]:
        """Work on the device, for a tensor on PyTorch's stream and in its memory; a failed allocation is a case that does not fit."""
        try:
            with self._lock, self._device.active(), following(self._device.xp, array):
                yield
        except MemoryError as error:  # CuPy's error is a MemoryError too.
            if hasattr(error, _MARK):
                raise
            grid = "x".join(str(extent) for extent in self.image_shape[1:])
            raise DeviceMemoryError(
                f"not enough memory on {self._device.name} for {self.spec.num_labels} labels on a grid of {grid} voxels ({error}); "
                "use a mask or a smaller region, fewer labels at a time, or --device cpu"
            ) from error

    def _volume_part(self, given: Any, logits: Any, spec: MeanFieldSpec) -> Bool | None:
        """Return the masked voxels on which the volume term acts, from the logits as passed, or downloaded; None means all, or no term."""
        if spec.volume_weight == 0.0:
            return None
        on_host = (
            logits.astype(np.float32, copy=False)
            if isinstance(logits, np.ndarray)
            else self._device.download(given)
        )
        return volume_part(on_host, self._mask, spec)

    def _array(self, channels: Any) -> Any:
        """Return the array on the device in float32."""
        return self._device.upload(channels).astype(np.float32, copy=False)

    def _give(self, array: Any, like: Any) -> Any:
        """Return the array on the host or on the device, wherever `like` is."""
        return self._device.download(array) if isinstance(like, np.ndarray) else array


def _staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return a caller's progress function for one stage, to be called with a step and the number of steps."""
    if progress is None:
        return None

    def call(step: int, num_steps: int) -> None:
        try:
            progress(stage, step, num_steps)
        except MemoryError as error:
            setattr(error, _MARK, True)
            raise

    return call


class CudaBackend(Backend):
    """Permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter: float32, the same bits on every run."""

    def __init__(self, device: CupyDevice) -> None:
        self.device = device
        self.name = device.name
        self._lock = threading.Lock()  # one case at a time: each may need all of the memory
        with suppress(
            BackendUnavailableError
        ):  # Without the compiled engine numpy gives the same answers, more slowly.
            cpu: Any = CpuBackend()
            for name in ("label_map", "softmax", "channel_ranges"):
                setattr(self, name, getattr(cpu, name))

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> CudaKernels:
        """Build the kernels of a model on one image, which is not copied if it is on the device already; see `Backend.kernels`."""
        with self._lock:
            return CudaKernels(self.device, image, spec, context.progress)

    def mean_field(
        self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`."""
        with self._lock:
            kernels = CudaKernels(self.device, image, spec.kernels, context.progress)
            return kernels.run(logits, spec.mean_field, progress=context.progress)

    def message(
        self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None
    ) -> Float32:
        """Filter values once; see `Backend.message`."""
        wanted = replace(
            spec, num_labels=len(values) + 1, num_iterations=1
        )  # for the choice of `auto`
        return self.kernels(image, wanted).message(values)
