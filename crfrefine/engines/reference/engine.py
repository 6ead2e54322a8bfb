"""The `reference` backend: the model in float64 Python, for checks and small grids.

Slow on purpose; its parts are the other modules of this folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.intensity import kernel_features
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
from crfrefine.engines.base import NO_CONTEXT, MeanFieldGradients, MeanFieldReport, MeanFieldResult, Progress, Range, RunContext, Tape
from crfrefine.engines.grid_image import checked_origin
from crfrefine.engines.reference.backward import mean_field_backward
from crfrefine.engines.reference.dense import TRUNCATION_RADIUS, DenseKernel
from crfrefine.engines.reference.lattice import Lattice
from crfrefine.engines.reference.mean_field import Filter, MeanFieldTrace, NormalizedKernel, mean_field
from crfrefine.engines.volume_part import volume_part
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.engines.grid_image import FeatureOrigin, GridImage
    from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec


class ReferenceBackend:
    """Exact sums over all pairs, or the plain lattice; `auto` takes the exact sums."""

    name = "reference"

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> ReferenceKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`. All work is done in float64, by one thread.

        Raises:
            ConfigError: the filter is `grid`, which this backend does not have.
            InputError: the mask is empty.
            CapacityError: too many voxels in the mask.
        """
        return ReferenceKernels(image, spec, context.progress)

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`."""
        return self.kernels(image, spec.kernels, context).run(logits, spec.mean_field, progress=context.progress)

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter values once; see `Backend.message`. A spatial kernel is always summed exactly.

        Raises:
            ConfigError, InputError, CapacityError: as `kernels`.
        """
        inside = _inside(image.mask, values.shape[1:])
        plain, _, _ = _built(spec.kernels[0], spec, image.values, inside, image.spacing, None, None)
        kernel = NormalizedKernel(plain, int(inside.sum()), spec.normalization)
        result = np.zeros(values.shape, dtype=np.float32)
        result[:, inside] = kernel.message(values[:, inside].T.astype(np.float64)).T
        return result

    def label_map(self, logits: Float32, *, threads: int | None = None) -> Labels:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
        labels: Labels = np.argmax(logits, axis=0).astype(np.min_scalar_type(len(logits) - 1))
        return labels

    def softmax(self, logits: Float32, *, threads: int | None = None, out: Float32 | None = None) -> Float32:
        """Return the softmax over labels; see `Backend.softmax`."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=0))
        marginals = np.empty_like(logits) if out is None else out
        np.divide(exponentials, exponentials.sum(axis=0), out=marginals, casting="same_kind")
        return marginals

    def channel_ranges(self, channels: Float32, *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        finite = [bool(np.isfinite(channel).all()) for channel in channels]
        return [
            (float(channel.min()), float(channel.max())) if usable else (math.nan, math.nan)
            for channel, usable in zip(channels, finite, strict=True)
        ]


class ReferenceKernels:
    """Kernels as dense matrices; see `Kernels`."""

    def __init__(self, given: GridImage, spec: KernelSetSpec, progress: Progress | None) -> None:
        started = time.perf_counter()
        image, origin = given.values, checked_origin(given)
        self._inside = inside = _inside(given.mask, image.shape[1:])
        self._spec = spec
        self._dtype = np.float64 if image.dtype == np.float64 else np.float32
        self.image_shape = image.shape
        self.dtype = np.dtype(self._dtype).name
        # Intensities first, positions last, as in kernel_features.
        self._thetas = [np.array([*(kernel.theta_intensity or ()), *kernel.theta_position]) for kernel in spec.kernels]
        self._num_bilateral = len(spec.bilateral)
        self._features: list[Float64] = []
        self._kernels: list[Filter] = []
        texts: list[str] = []
        for index, kernel in enumerate(spec.kernels):
            if progress is not None:
                progress("build", index, len(spec.kernels))
            plain, text, features = _built(kernel, spec, image, inside, given.spacing, given.axes, origin)
            self._kernels.append(plain)
            self._features.append(features)
            texts.append(text)
        self.filters = tuple(f"{name}: {text}" for name, text in zip(spec.names, texts, strict=True))
        self.num_kernels = len(self._kernels)
        self.num_voxels = int(inside.sum())
        self._normalized = [NormalizedKernel(kernel, self.num_voxels, spec.normalization) for kernel in self._kernels]
        self._build_seconds = time.perf_counter() - started

    def run(self, logits: Array, spec: MeanFieldSpec, *, progress: Progress | None = None, is_last: bool = False) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`. The kernels can always be used again."""
        started = time.perf_counter()
        told = None if progress is None else lambda step: progress("mean field", step, spec.num_iterations)
        trace = self._run(logits, spec, told)
        report = MeanFieldReport(trace.num_iterations, trace.converged, trace.energy, self.filters)
        return MeanFieldResult(
            self._on_grid(trace, logits, spec), report, {"build": self._build_seconds, "steps": time.perf_counter() - started}
        )

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        trace = self._run(logits, replace(spec, tolerance=0.0))
        record = np.stack([marginals.T for marginals in trace.marginals])
        biases = np.stack(trace.volume_biases) if trace.volume_biases else None
        return Tape(self._on_grid(trace, logits, spec), record, spec, volume_biases=biases, volume_part=trace.volume_part)

    def backward(
        self, tape: Tape, logits: Array, gradient: Array, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        spec, temperature = tape.spec, tape.spec.temperature
        marginals = tuple(of_step.T for of_step in tape.record)
        biases = () if tape.volume_biases is None else tuple(tape.volume_biases)
        trace = MeanFieldTrace(self._compact(tape.logits), spec.num_iterations, False, (), marginals, biases, tape.volume_part)
        found = mean_field_backward(
            trace,
            self._compact(gradient),
            self._compact(logits),
            self._kernels,
            self._features,
            replace(spec.rounded(np.float64), compatibility=np.asarray(spec.compatibility, dtype=np.float64)),
            normalization=self._spec.normalization,
        )
        by_logits = np.asarray(gradient, dtype=np.float64) / temperature
        outside = ~self._inside
        by_temperature = found.temperature - float((by_logits * logits)[:, outside].sum()) / temperature
        by_logits[:, self._inside] = found.logits.T
        num_modalities = self.image_shape[0]
        by_image = np.zeros(self.image_shape)
        for columns, theta in zip(found.features[: self._num_bilateral], self._thetas, strict=False):
            by_image[:, self._inside] += (columns / theta)[:, :num_modalities].T
        # A feature is a coordinate divided by its bandwidth.
        by_theta = [
            -(columns * own).sum(axis=0) / theta * wants_theta
            for columns, own, theta in zip(found.features, self._features, self._thetas, strict=True)
        ]
        bilateral = np.array(by_theta[: self._num_bilateral]).reshape(self._num_bilateral, num_modalities + self._inside.ndim)
        return MeanFieldGradients(
            logits=by_logits.astype(self._dtype),
            weights=found.weights,
            compatibility=found.compatibility,
            temperature=by_temperature,
            bias=found.bias,
            theta_position=bilateral[:, num_modalities:],
            theta_intensity=bilateral[:, :num_modalities],
            theta_gamma=by_theta[-1] if self.num_kernels > self._num_bilateral else None,
            image=by_image.astype(self._dtype) if wants_image else None,
            volume_weight=spec.volume_weight_gradient(found.volume_slack),
        )

    def _run(self, logits: Array, spec: MeanFieldSpec, progress: Callable[[int], None] | None = None) -> MeanFieldTrace:
        return mean_field(
            self._compact(logits),
            self._normalized,
            spec,
            volume_part=volume_part(logits, self._inside, spec),
            progress=progress,
        )

    def _on_grid(self, trace: MeanFieldTrace, logits: Array, spec: MeanFieldSpec) -> Array:
        """(L, *grid) logits of the last step; outside the mask the input divided by the temperature."""
        refined = np.ascontiguousarray(logits, dtype=np.float64) / spec.temperature
        refined[:, self._inside] = trace.logits.T
        return refined.astype(self._dtype)

    def _compact(self, channels: Array) -> Float64:
        """(N, channels), values of the voxels inside the mask."""
        return np.asarray(channels, dtype=np.float64)[:, self._inside].T


def _inside(mask: Bool | None, grid_shape: tuple[int, ...]) -> Bool:
    """The mask, or all voxels; never empty."""
    inside = np.ones(grid_shape, dtype=bool) if mask is None else mask
    if not inside.any():
        raise InputError("the mask is empty")
    return inside


def _built(
    kernel: KernelSpec,
    spec: KernelSetSpec,
    image: Array | None,
    inside: Bool,
    spacing: Sequence[float],
    axes: Sequence[int] | None,
    origin: FeatureOrigin | None,
) -> tuple[Filter, str, Float64]:
    """The plain kernel, a line that says how it is computed, and its features."""
    steps = spec.distances(spacing)
    counted_from = None if origin is None else (origin.position, origin.intensity)
    features = kernel_features(image, inside, steps, kernel.theta_position, kernel.theta_intensity, inside.shape, origin=counted_from)
    if kernel.is_spatial:
        return DenseKernel(features), "exact", features
    counted = features
    if axes is not None:
        first = features.shape[1] - inside.ndim
        counted = features.copy()
        counted[:, first:] = features[:, first + np.argsort(axes)]
    return *_filter(counted, inside.ndim, spec.filter), features


def _filter(features: Float64, num_positions: int, name: str) -> tuple[Filter, str]:
    """The filter of that name for these features, and a line that describes it."""
    if name in ("exact", "auto"):
        return DenseKernel(features), "exact"
    if name == "truncated":
        text = f"truncated (radius {TRUNCATION_RADIUS:g} theta_alpha)"
        return DenseKernel(features, num_positions=num_positions, radius=TRUNCATION_RADIUS), text
    if name == "lattice":
        lattice = Lattice(features)
        return lattice, f"lattice ({lattice.num_vertices} vertices)"
    raise ConfigError(f"mean_field.filter: the reference backend has exact, truncated and lattice, not '{name}'; use --device cpu")
