"""Kernels built once on the device, to run forth and back: what the trainable layer uses."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.base import MeanFieldGradients, Tape
from crfrefine.engines.cuda.backward import Backward
from crfrefine.engines.cuda.device import Device, active_for, capacity, check_memory
from crfrefine.engines.cuda.kernel_set import build_kernels
from crfrefine.engines.cuda.mean_field import MeanFieldOptions, run_mean_field
from crfrefine.engines.cuda.memory import backward_bytes, build_bytes, run_bytes
from crfrefine.engines.cuda.moments import FeatureColumns
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.errors import InputError


class CudaKernels:
    """Kernels on a device; see `Kernels`.

    Logits and gradients may be on the device already, as anything that shares its memory by DLPack (such as tensors): results stay there
    then.
    """

    def __init__(
        self,
        device: Device,
        image: Any,
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        bilateral: Sequence[tuple[Sequence[float], Sequence[float]]],
        theta_gamma: Sequence[float] | None,
        normalization: str,
        filter_name: str,
        num_labels: int,
        num_iterations: int,
    ) -> None:
        """Build the kernels; see `Backend.kernels`."""
        self._device = device
        inside = math.prod(image.shape[1:]) if mask is None else int(np.count_nonzero(mask))
        needed = build_bytes(image.shape, inside, num_bilateral=len(bilateral), filter_name=filter_name, dtype=image.dtype)
        check_memory(device, needed, f"building the kernels of {inside} voxels")
        given = device.upload(image)
        self._image = given.astype(np.float64 if given.dtype == np.float64 else np.float32, copy=False)
        self.image_shape = tuple(self._image.shape)
        self.dtype = str(self._image.dtype)
        self._grid_shape = self.image_shape[1:]
        self._normalization, self._num_labels, self._num_bilateral = normalization, num_labels, len(bilateral)
        self._voxels = Voxels(device, self._grid_shape, spacing, mask)
        thetas = [(_floats(theta_alpha), _floats(theta_beta)) for theta_alpha, theta_beta in bilateral]
        gamma = None if theta_gamma is None else _floats(theta_gamma)
        self._kernels, filters = build_kernels(
            self._voxels,
            self._image,
            thetas,
            gamma,
            normalization=normalization,
            filter_name=filter_name,
            num_channels=num_labels - 1,
            num_filterings=num_iterations,
        )
        of_axes = self._voxels.of_box_axes
        self._features = [FeatureColumns(self._voxels, of_axes(alpha), beta, self._image) for alpha, beta in thetas]
        if gamma is not None:
            self._features.append(FeatureColumns(self._voxels, of_axes(gamma), [], self._image))
        self.filters = tuple(filters)
        self.num_kernels = len(self._kernels)
        self.num_voxels = self._voxels.num_voxels
        self._lock = threading.Lock()
        # They may be used on another stream than the one they were built on.
        device.synchronize()

    def forward(
        self,
        logits: Any,
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        num_iterations: int,
        damping: float = 0.0,
    ) -> Tape:
        """Run the mean field and keep what the way back needs; see `Kernels.forward`."""
        options = self._options(weights, compatibility, temperature, num_iterations, damping)
        with self._lock, active_for(self._device, logits), capacity(self._shape()):
            self._check(run_bytes(self._shape(), self.num_voxels, options.num_channels, self.dtype, num_recorded=num_iterations), "a run")
            outcome = run_mean_field(self._voxels, self._kernels, options, self._array(logits), records=True)
            return Tape(self._give(outcome.logits, logits), self._give(outcome.record, logits), outcome.steps)

    def backward(
        self,
        tape: Tape,
        logits: Any,
        gradient: Any,
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        damping: float = 0.0,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> MeanFieldGradients:
        """Return the derivatives of a loss; see `Kernels.backward`."""
        options = self._options(weights, compatibility, temperature, len(tape.steps), damping)
        index = self._voxels.grid_index
        with self._lock, active_for(self._device, logits), capacity(self._shape()):
            needed = backward_bytes(self._shape(), self.num_voxels, self.dtype, num_wanted=len(self._image) * wants_image)
            self._check(needed, "the way back")
            given, by_out = self._array(logits), self._array(gradient)
            found = Backward(self._voxels, self._kernels, self._features, options, wants_theta=wants_theta, wants_image=wants_image).run(
                self._device.upload(tape.record), tape.steps, by_out.reshape(self._num_labels, -1)[:, index]
            )
            inverse = float(by_out.dtype.type(1.0) / by_out.dtype.type(temperature))
            by_logits = by_out * inverse
            by_logits.reshape(self._num_labels, -1)[:, index] = found.scores * inverse
            # A logit of minus infinity has no gradient but for rounding, and no part in the sum.
            xp = self._device.xp
            finite = xp.where(xp.isfinite(given), given, xp.zeros_like(given))
            by_temperature = -float((by_logits * finite).sum(dtype=np.float64)) / temperature
            by_image = None
            if wants_image:
                by_image = xp.zeros_like(self._image)
                if found.image is not None and len(found.image) > 0:
                    by_image.reshape(len(by_image), -1)[:, index] = found.image
            num_modalities = len(self._image)
            num_axes = len(self._grid_shape)
            bilateral = np.zeros((self._num_bilateral, num_modalities + num_axes))
            for row, theta in zip(bilateral, found.theta, strict=False):
                row[:num_modalities] = theta[:num_modalities]
                row[num_modalities:] = self._of_grid_axes(theta[num_modalities:])
            spatial = self._of_grid_axes(found.theta[-1]) if self.num_kernels > self._num_bilateral else None
            # All is done when this returns, as it is after `forward`, which has waited for its energies: the next call may be on another
            # stream, and has the same buffers.
            self._device.synchronize()
            return MeanFieldGradients(
                logits=self._give(by_logits, logits),
                weights=found.weights,
                compatibility=found.compatibility,
                temperature=by_temperature,
                theta_alpha=bilateral[:, num_modalities:],
                theta_beta=bilateral[:, :num_modalities],
                theta_gamma=spatial,
                image=None if by_image is None else self._give(by_image, logits),
            )

    def _options(
        self, weights: NDArray[Any], compatibility: NDArray[Any], temperature: float, num_iterations: int, damping: float
    ) -> MeanFieldOptions:
        matrix = np.asarray(compatibility, dtype=np.float64)
        return MeanFieldOptions(
            weights=np.asarray(weights).astype(self._image.dtype).reshape(self.num_kernels, self._num_labels),
            compatibility=matrix,
            is_potts=bool(np.array_equal(matrix, 1.0 - np.eye(len(matrix)))),
            num_iterations=num_iterations,
            tolerance=0.0,
            temperature=temperature,
            damping=damping,
            watches_energy=self._normalization != "after",
        )

    def _shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return (self._num_labels, *self._grid_shape)

    def _check(self, num_bytes: float, what: str) -> None:
        check_memory(self._device, num_bytes, f"{what} of {self.num_voxels} voxels and {self._num_labels} labels")

    def _array(self, channels: Any) -> Any:
        """Labels on the image's grid, on the device, in the image's precision."""
        expected = self._shape()
        if tuple(channels.shape) != expected:
            raise InputError(f"an array has shape {tuple(channels.shape)}; the kernels were built for {expected}")
        return self._device.upload(channels).astype(self._image.dtype, copy=False)

    def _give(self, array: Any, like: Any) -> Any:
        """The array where `like` is: on the host or on the device."""
        return self._device.download(array) if isinstance(like, np.ndarray) else array

    def _of_grid_axes(self, of_box_axes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of all the grid's axes; zero for those that are one voxel long."""
        values = np.zeros(len(self._grid_shape))
        values[self._voxels.source_axis] = of_box_axes
        return values


def _floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values).ravel()]
