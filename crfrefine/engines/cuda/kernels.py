"""The GPU engine as a backend, and kernels built on the device, to run forward and backward."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float32
from crfrefine.base.one_call import OneCall
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
    run_model,
)
from crfrefine.engines.cuda.backward import Backward
from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.kernel_set import build_kernel
from crfrefine.engines.cuda.mean_field import MeanFieldRun
from crfrefine.engines.cuda.one_stream import OneStream
from crfrefine.engines.cuda.points import CudaPoints
from crfrefine.engines.cuda.volume import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec


class CudaKernels:
    """Kernels on a device; see `Kernels`.

    Logits and gradients may be on the device already, as any object that shares its memory by
    DLPack (such as a tensor): results then stay there, and the work is on PyTorch's current stream;
    see `OneStream`.
    """

    dtype = "float32"

    def __init__(
        self,
        device: CupyDevice,
        image: GridImage,
        spec: KernelSetSpec,
        progress: Progress | None = None,
    ) -> None:
        """Build the kernels; see `Backend.kernels`."""
        started = time.perf_counter()
        assert image.origin is None, "parts of a volume run on the CPU"
        self.spec = spec
        self.image_shape = tuple(image.values.shape)
        self._device = device
        grid = "x".join(str(extent) for extent in self.image_shape[1:])
        self._stream = OneStream(
            device,
            f"for {spec.num_labels} labels on a grid of {grid} voxels",
            "use a mask or a smaller region, fewer labels at a time, or --device cpu",
        )
        self._upload_seconds = 0.0
        # The times of the stages are for the record of a case.
        on_host = isinstance(image.values, np.ndarray)
        distances = spec.distances(image.spacing)
        with self._stream.working(image.values):
            # The image and its voxels may be on the device already; memory belongs to a stream.
            case = (device, device.stream(), distances)
            kept = {} if image.kept is None else image.kept
            if case not in kept:
                began = time.perf_counter()
                values = self._array(image.values)
                if on_host:
                    device.synchronize()
                self._upload_seconds = time.perf_counter() - began
                kept[case] = Voxels(device, values, distances, image.mask, image.axes)
            self._voxels = kept[case]
            self._kernels = []
            for number, kernel in enumerate(spec.kernels):
                if progress is not None:
                    progress("build", number, len(spec.kernels))
                built = build_kernel(self._voxels, kernel, spec)
                built.normalize(self._voxels, spec.normalization)
                self._kernels.append(built)
            if on_host:
                device.synchronize()
        named = zip(spec.names, self._kernels, strict=True)
        self.filters = tuple(f"{name}: {kernel.description}" for name, kernel in named)
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
        started = time.perf_counter()
        spec = spec.rounded(np.float32)
        with self._stream.working(logits):
            uploaded = self._array(logits)
            self._device.synchronize()
            uploaded_at = time.perf_counter()
            run = MeanFieldRun(self._voxels, self._kernels, spec, uploaded)
            run.take_steps(progress)
            energy = run.energy()
            stepped_at = time.perf_counter()
            refined = self._stream.like(run.out, logits)
        report = MeanFieldReport(run.num_steps, run.converged, energy, self.filters)
        timings = {
            "upload": self._upload_seconds + uploaded_at - started,
            "build": self._build_seconds,
            "steps": stepped_at - uploaded_at,
            "download": time.perf_counter() - stepped_at,
        }
        return MeanFieldResult(refined, report, timings)

    def forward(self, logits: Any, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        spec = replace(spec, tolerance=0.0).rounded(np.float32)
        with self._stream.working(logits):
            uploaded = self._array(logits)
            run = MeanFieldRun(self._voxels, self._kernels, spec, uploaded, records=True)
            run.take_steps()
            refined = self._stream.like(run.out, logits)
            record = self._stream.like(run.record, logits)
        biases = [] if run.volume is None else run.volume.biases
        return Tape(refined, record, spec, biases, run.volume_part)

    def backward(
        self,
        tape: Tape,
        logits: Any,
        gradient: Any,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
        stays: bool = False,
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        with self._stream.working(logits):
            backward = Backward(
                self._voxels,
                self._kernels,
                (self.spec, tape.spec),
                wants_theta=wants_theta,
                wants_image=wants_image,
                stays=stays,
            )
            record = self._device.upload(tape.record)
            volume = None
            if tape.volume_biases:
                volume = VolumeBackward(self._voxels, tape, record)
            by_out = self._array(gradient)
            gradients = backward.run(record, by_out, self._array(logits), volume)
            by_logits = self._stream.like(gradients.logits, logits)
            by_image = self._stream.like(gradients.image, logits)
            return gradients._replace(logits=by_logits, image=by_image)

    def _array(self, channels: Any) -> Any:
        """Return channels on the device, in float32."""
        return self._device.upload(channels).astype(np.float32, copy=False)


class CudaBackend(Backend):
    """The GPU engine: float32, with the same bits on every run.

    Its filters are the permutohedral lattice, truncated and exact sums, and the separable spatial
    filter; there is no `grid`.
    """

    def __init__(self, device: CupyDevice) -> None:
        self.device = device
        self.name = device.name
        # One case at a time: each may need all of the memory.
        self._one_case = OneCall(
            f"{self.name} is at work on a case that waits for its progress callback, which must "
            "not start another one there; start it after the first, or with device='cpu'",
            waits=True,
        )

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> CudaKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`.

        An image that is on the device already is not copied.
        """
        with self._one_case:
            return CudaKernels(self.device, image, spec, context.progress)

    def mean_field(
        self, logits: Float32, image: GridImage, model: ModelSpec, context: RunContext = NO_CONTEXT
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`."""
        with self._one_case:
            kernels = CudaKernels(self.device, image, model.kernels, context.progress)
            return run_model(kernels, logits, model, context)

    def points(self, features: Any, method: str) -> CudaPoints:
        """Build the kernel of points with features (D, *grid); see `CudaPoints`."""
        with self._one_case:
            return CudaPoints(self.device, features, method)
