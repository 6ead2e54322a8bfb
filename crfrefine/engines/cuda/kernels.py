"""Kernels built on the device, to run forward and backward."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.base import MeanFieldGradients, MeanFieldReport, MeanFieldResult, Progress, Tape
from crfrefine.engines.cuda.backward import Backward
from crfrefine.engines.cuda.device import Device, active_for, capacity, check_memory, staged
from crfrefine.engines.cuda.kernel_set import build_kernels
from crfrefine.engines.cuda.mean_field import MeanFieldRun
from crfrefine.engines.cuda.memory import backward_bytes, build_bytes, run_bytes, volume_bytes
from crfrefine.engines.cuda.moments import FeatureColumns
from crfrefine.engines.cuda.volume import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.grid_image import checked_origin
from crfrefine.engines.volume_part import volume_part
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec


class CudaKernels:
    """Kernels on a device; see `Kernels`.

    Logits and gradients may be on the device already, as any object that shares its memory by DLPack (such as a tensor): results then stay
    there.
    """

    def __init__(self, device: Device, given: GridImage, spec: KernelSetSpec, progress: Progress | None = None) -> None:
        """Build the kernels; see `Backend.kernels`."""
        started = time.perf_counter()
        image, mask = given.values, given.mask
        self._device, self._num_labels, self._num_bilateral = device, spec.num_labels, len(spec.bilateral)
        self._mask = mask
        origin = checked_origin(given)
        inside = given.num_voxels
        needed = build_bytes(image.shape, inside, spec)
        check_memory(device, needed, f"building the kernels of {inside} voxels")
        uploaded = device.upload(image)
        device.synchronize()
        self._upload_seconds = time.perf_counter() - started
        self._image = uploaded.astype(np.float32, copy=False)
        self.image_shape = tuple(self._image.shape)
        self.dtype = str(self._image.dtype)
        self._grid_shape = self.image_shape[1:]
        self._voxels = Voxels(device, self._grid_shape, spec.distances(given.spacing), mask, given.axes)
        self._kernels = build_kernels(self._voxels, self._image, spec, staged(progress, "build"), origin)
        of_axes = self._voxels.of_box_axes
        self._features = [
            FeatureColumns(self._voxels, of_axes(kernel.theta_position), list(kernel.theta_intensity or ()), self._image)
            for kernel in spec.kernels
        ]
        self.filters = tuple(f"{name}: {kernel.filter.description}" for name, kernel in zip(spec.names, self._kernels, strict=True))
        self.num_kernels = len(self._kernels)
        self.num_voxels = self._voxels.num_voxels
        self._lock = threading.Lock()
        # They may be used on a different stream from the one they were built on.
        device.synchronize()
        self._build_seconds = time.perf_counter() - started - self._upload_seconds

    def run(self, logits: Any, spec: MeanFieldSpec, *, progress: Progress | None = None, is_last: bool = False) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`. The kernels can always be used again."""
        spec = spec.rounded(self._image.dtype)
        with self._lock, active_for(self._device, logits), capacity(self._shape()):
            started = time.perf_counter()
            needed = run_bytes(self._shape(), self.num_voxels, spec)
            self._check(needed + self._copied_bytes(logits), "a run")
            given = self._array(logits)
            self._device.synchronize()
            uploaded = time.perf_counter()
            part = self._volume_part(given, logits, spec)
            steps = MeanFieldRun(self._voxels, self._kernels, spec, given, volume_part=part)
            outcome = steps.take_steps(staged(progress, "mean field"))
            del steps
            stepped = time.perf_counter()  # the steps are done, since their energies are on the host
            report = MeanFieldReport(outcome.num_iterations, outcome.converged, outcome.energy, self.filters)
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
        plain = replace(spec, tolerance=0.0).rounded(self._image.dtype)
        with self._lock, active_for(self._device, logits), capacity(self._shape()):
            needed = run_bytes(self._shape(), self.num_voxels, plain, records=True)
            self._check(needed + self._copied_bytes(logits), "a run")
            given = self._array(logits)
            part = self._volume_part(given, logits, plain)
            outcome = MeanFieldRun(self._voxels, self._kernels, plain, given, volume_part=part, records=True).take_steps()
            refined, record = self._give(outcome.logits, logits), self._give(outcome.record, logits)
            return Tape(refined, record, spec, volume_biases=outcome.volume_biases, volume_part=part)

    def backward(
        self, tape: Tape, logits: Any, gradient: Any, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        spec = tape.spec.rounded(self._image.dtype)
        wants_moments = wants_theta or wants_image
        with self._lock, active_for(self._device, logits), capacity(self._shape()):
            needed = backward_bytes(
                self._shape(),
                self.num_voxels,
                [len(features) for features in self._features],
                num_theta=self.num_kernels * wants_moments,
                num_image=len(self._image) * wants_image,
                num_given=sum(self._copied_bytes(array) for array in (logits, gradient, tape.record)),
            )
            self._check(needed + volume_bytes(self.num_voxels, spec), "the backward pass")
            by_image = self._device.xp.zeros_like(self._image) if wants_image else None
            model = (self._voxels, self._kernels, self._features, spec, self._image.dtype)
            backward = Backward(*model, wants_theta=wants_theta, by_image=by_image)
            # All work is done when this returns, as after `forward`, which waits for its energies: the next call uses the same buffers,
            # perhaps on another stream.
            record, volume = self._device.upload(tape.record), None
            if tape.volume_biases is not None:
                volume = VolumeBackward(self._voxels, spec, record, tape.volume_biases, tape.volume_part)
            found = backward.run(record, self._array(gradient), self._array(logits), volume)
            num_modalities = len(self._image)
            num_axes = len(self._grid_shape)
            bilateral = np.zeros((self._num_bilateral, num_modalities + num_axes))
            for row, theta in zip(bilateral, found.theta, strict=False):
                row[:num_modalities] = theta[:num_modalities]
                row[num_modalities:] = self._of_grid_axes(theta[num_modalities:])
            spatial = self._of_grid_axes(found.theta[-1]) if self.num_kernels > self._num_bilateral else None
            return MeanFieldGradients(
                logits=self._give(found.logits, logits),
                weights=found.weights,
                compatibility=found.compatibility,
                temperature=found.temperature,
                bias=found.bias,
                theta_position=bilateral[:, num_modalities:],
                theta_intensity=bilateral[:, :num_modalities],
                theta_gamma=spatial,
                image=None if by_image is None else self._give(by_image, logits),
                volume_weight=None if volume is None else spec.volume_weight_gradient(volume.by_slack),
            )

    def _volume_part(self, given: Any, logits: Any, spec: MeanFieldSpec) -> Bool | None:
        """Return the masked voxels on which the volume term of a run acts; None means all of them, or no term.

        `given` are the logits on the device, which are downloaded only where components have to be found, `logits` as they were passed.
        """
        if spec.volume_weight == 0.0:
            return None
        on_host = logits.astype(given.dtype, copy=False) if isinstance(logits, np.ndarray) else self._device.download(given)
        inside = np.ones(self._grid_shape, dtype=np.bool_) if self._mask is None else np.asarray(self._mask, dtype=np.bool_)
        return volume_part(on_host, inside, spec)

    def _shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return (self._num_labels, *self._grid_shape)

    def _check(self, num_bytes: float, what: str) -> None:
        check_memory(self._device, num_bytes, f"{what} of {self.num_voxels} voxels and {self._num_labels} labels")

    def _array(self, channels: Any) -> Any:
        """Return the array on the device in the image's precision; raise InputError unless its channels are labels on the image's grid."""
        expected = self._shape()
        if tuple(channels.shape) != expected:
            raise InputError(f"an array has shape {tuple(channels.shape)}; the kernels were built for {expected}")
        return self._device.upload(channels).astype(self._image.dtype, copy=False)

    def _copied_bytes(self, array: Any) -> int:
        """Return the bytes that `_array` allocates for an array: one of the host is copied, and one of another type converted."""
        own = self._image.dtype.itemsize * math.prod(array.shape)
        converted = 0 if str(array.dtype).endswith(self.dtype) else own
        return converted + (array.nbytes if isinstance(array, np.ndarray) else 0)

    def _give(self, array: Any, like: Any) -> Any:
        """Return the array on the host or on the device, wherever `like` is."""
        return self._device.download(array) if isinstance(like, np.ndarray) else array

    def _of_grid_axes(self, of_box_axes: Float64) -> Float64:
        """Return values for all axes of the grid; zero for axes that are one voxel long."""
        values = np.zeros(len(self._grid_shape))
        values[self._voxels.source_axis] = of_box_axes
        return values
