"""The C++ engine, as a backend."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.threads import available_threads
from crfrefine.engines.base import NO_CONTEXT, MeanFieldGradients, MeanFieldReport, MeanFieldResult, Progress, Range, RunContext, Tape
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.grid_image import checked_origin
from crfrefine.engines.volume_part import volume_part
from crfrefine.errors import CapacityError, InputError

if TYPE_CHECKING:
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec


class CpuBackend:
    """The C++ engine: permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter."""

    name = "cpu"

    def __init__(self, *, keeps_kernels: bool = False) -> None:
        """Load the engine.

        Args:
            keeps_kernels: whether the kernels of the newest whole volume stay in memory for the next run, which takes them if image,
                mask, spacing and bandwidths are equal. Runs then come one at a time; results have the same bits.
        """
        self._engine = load_engine()
        self._keeps_kernels = keeps_kernels
        self._kept: CpuKernels | None = None
        self._built_for: tuple[GridImage, KernelSetSpec, int | None] | None = None

    @property
    def level(self) -> str:
        """The instruction set of the loaded engine."""
        return str(self._engine.__name__).rpartition("_")[2]

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> CpuKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`. Kernels of parts of a volume are never kept."""
        if self._keeps_kernels and image.origin is None:
            return self._kept_kernels(image, spec, context)
        return self._build(image, spec, context)

    def _build(self, image: GridImage, spec: KernelSetSpec, context: RunContext) -> CpuKernels:
        if spec.num_labels < 2:
            raise InputError(f"the model needs two labels or more, background among them; got {spec.num_labels}")
        values = np.ascontiguousarray(image.values, dtype=np.float32)
        started = time.perf_counter()
        origin = checked_origin(image)
        with _engine_errors(self._engine, values.shape):
            built = self._engine.Kernels(
                values,
                _mask(image.mask),
                *_kernel_arguments(spec, image.spacing),
                spec.num_labels,
                spec.num_iterations,
                list(image.axes or ()),
                None if origin is None else (list(origin.position), list(origin.intensity)),
                context.threads or available_threads(),
                context.progress,
            )
        return CpuKernels(self._engine, built, values, image.mask, spec, time.perf_counter() - started)

    def plan_filters(self, image: GridImage, spec: KernelSetSpec, threads: int | None = None) -> tuple[str, ...]:
        """Return the filter of each appearance kernel on an image, without building it: "exact", "truncated", "grid" or "lattice"."""
        values = np.ascontiguousarray(image.values, dtype=np.float32)
        distances, bilateral, _, _, name = _kernel_arguments(spec, image.spacing)
        with _engine_errors(self._engine, values.shape):
            planned = self._engine.plan_filters(
                values, _mask(image.mask), distances, bilateral, name, spec.num_labels, spec.num_iterations, threads or available_threads()
            )
        return tuple(planned)

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`."""
        kernels = self.kernels(image, spec.kernels, context)
        if kernels.is_kept:
            try:
                return kernels.run(logits, spec.mean_field, progress=context.progress)
            except CapacityError:  # Kept kernels and a run may not fit into memory together.
                del kernels
                self._kept = self._built_for = None
            kernels = self._build(image, spec.kernels, context)
        del image
        return kernels.run(logits, spec.mean_field, progress=context.progress, is_last=True)

    def _kept_kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext) -> CpuKernels:
        """Return the kept kernels if they fit, or build them and keep them."""
        if self._kept is None or not self._fits(image, spec, context.threads):
            self._kept = self._built_for = None  # Memory need not hold two of them.
            self._kept = self._build(image, spec, context)
            self._kept.is_kept = True
            self._built_for = image, spec, context.threads
        return self._kept

    def _fits(self, image: GridImage, spec: KernelSetSpec, threads: int | None) -> bool:
        assert self._built_for is not None
        built, built_spec, built_threads = self._built_for
        if not equal_or_none(image.values, built.values) or not equal_or_none(image.mask, built.mask) or threads != built_threads:
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

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter values once; see `Backend.message`."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        guide, settings = np.ascontiguousarray(image.values, dtype=np.float32), _kernel_arguments(spec, image.spacing)
        out = np.zeros_like(values)
        with _engine_errors(self._engine, values.shape):
            self._engine.message(values, guide, _mask(image.mask), *settings, threads or available_threads(), out)
        return out

    def label_map(self, logits: Float32, *, threads: int | None = None) -> Labels:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
        out: Labels = np.empty(logits.shape[1:], dtype=np.uint8 if len(logits) <= 256 else np.uint16)
        self._engine.label_map(np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out)
        return out

    def softmax(self, logits: Float32, *, threads: int | None = None, out: Float32 | None = None) -> Float32:
        """Return the softmax over labels; see `Backend.softmax`."""
        if out is None:
            out = np.empty(logits.shape, dtype=np.float32)
        self._engine.softmax(np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out)
        return out

    def channel_ranges(self, channels: Float32, *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        ends = self._engine.channel_ranges(np.ascontiguousarray(channels, dtype=np.float32), threads or available_threads())
        return list(zip(ends[::2], ends[1::2], strict=True))


class CpuKernels:
    """Kernels built by the C++ engine; see `Kernels`."""

    def __init__(self, engine: Any, built: Any, image: Array, mask: Bool | None, spec: KernelSetSpec, build_seconds: float) -> None:
        self._engine = engine
        self._built = built
        self._num_labels = spec.num_labels
        self._num_bilateral = len(spec.bilateral)
        self._build_seconds = build_seconds
        self.num_kernels = len(spec.kernels)
        self.num_voxels = int(built.num_voxels())
        self._mask = mask
        self.image_shape = image.shape
        self.dtype = str(image.dtype)
        self.filters = tuple(built.descriptions())
        self.is_kept = False
        """Whether the last run, too, leaves the kernels for further runs."""

    @property
    def built(self) -> Any:
        """The engine's own object, for runs on tiles."""
        return self._built

    def run(self, logits: Array, spec: MeanFieldSpec, *, progress: Progress | None = None, is_last: bool = False) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`."""
        self._check_shape(logits)
        if logits.dtype != self.dtype or logits.strides[-1] != logits.itemsize:
            logits = np.ascontiguousarray(logits, dtype=self.dtype)
        started = time.perf_counter()
        out = np.empty(logits.shape, self.dtype)
        with _engine_errors(self._engine, logits.shape):
            model = model_argument(self._checked(spec), self._volume_part(logits, spec))
            outcome = self._built.run(logits, model, spec.num_iterations, spec.tolerance, is_last and not self.is_kept, progress, out)
        report = MeanFieldReport(outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), self.filters)
        timings = {"build": self._build_seconds, "steps": time.perf_counter() - started}
        return MeanFieldResult(out, report, timings, outcome["marginals"])

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        logits = self._array(logits)
        plain = self._checked(spec)
        part = self._volume_part(logits, plain)
        out = np.empty_like(logits)
        try:
            num_recorded = plain.num_iterations + (plain.volume_weight > 0.0)
            record = np.empty((num_recorded, plain.num_channels, self.num_voxels), logits.dtype)
        except MemoryError as error:
            raise _out_of_memory(logits.shape) from error
        with _engine_errors(self._engine, logits.shape):
            biases = self._built.forward(logits, model_argument(plain, part), out, record)
        return Tape(out, record, spec, volume_biases=np.array(biases) if biases else None, volume_part=part)

    def backward(
        self, tape: Tape, logits: Array, gradient: Array, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        logits, gradient = self._array(logits), self._array(gradient)
        by_logits = np.empty_like(logits)
        by_image = np.zeros(self.image_shape, self.dtype) if wants_image else None
        spec = self._checked(tape.spec)
        model = model_argument(spec, tape.volume_part)
        biases = [] if tape.volume_biases is None else tape.volume_biases.tolist()
        with _engine_errors(self._engine, logits.shape):
            sums = self._built.backward(logits, tape.record, biases, gradient, model, wants_theta, by_logits, by_image)
        num_modalities, num_axes = self.image_shape[0], len(self.image_shape) - 1
        bilateral = np.array(sums["theta"][: self._num_bilateral]).reshape(self._num_bilateral, num_modalities + num_axes)
        if not wants_theta:
            bilateral = np.zeros_like(bilateral)
        spatial = np.array(sums["theta"][-1]) if self.num_kernels > self._num_bilateral else None
        return MeanFieldGradients(
            logits=by_logits,
            weights=np.array(sums["weights"]).reshape(self.num_kernels, spec.num_labels),
            compatibility=np.array(sums["compatibility"]).reshape(spec.num_labels, spec.num_labels),
            temperature=float(sums["temperature"]),
            bias=np.array(sums["bias"]),
            theta_position=bilateral[:, num_modalities:],
            theta_intensity=bilateral[:, :num_modalities],
            theta_gamma=spatial,
            image=by_image,
            volume_weight=spec.volume_weight_gradient(float(sums["volume_slack"])),
        )

    def _checked(self, spec: MeanFieldSpec) -> MeanFieldSpec:
        """Return the run with weights in the image's precision; raise InputError if its labels do not fit the channels."""
        return spec.rounded(np.dtype(self.dtype))

    def _volume_part(self, logits: Array, spec: MeanFieldSpec) -> Bool | None:
        """Return the masked voxels on which the volume term acts; None without the term."""
        inside = np.ones(self.image_shape[1:], dtype=np.bool_) if self._mask is None else self._mask
        return volume_part(logits, inside, spec)

    def _array(self, channels: Array) -> Array:
        """Return the array in the image's precision; raise InputError unless its channels are labels on the image's grid."""
        self._check_shape(channels)
        return np.ascontiguousarray(channels, dtype=self.dtype)

    def _check_shape(self, channels: Array) -> None:
        if channels.shape != (self._num_labels, *self.image_shape[1:]):
            raise InputError(f"an array has shape {channels.shape}; the kernels were built for {(self._num_labels, *self.image_shape[1:])}")


def _kernel_arguments(spec: KernelSetSpec, spacing: Sequence[float]) -> tuple[Any, ...]:
    """Return the settings of the kernels that the C++ engine takes: spacing, bandwidths, normalization, filter."""
    bilateral = [(list(kernel.theta_position), list(kernel.theta_intensity or ())) for kernel in spec.bilateral]
    gamma = [] if spec.spatial is None else list(spec.spatial.theta_position)
    return list(spec.distances(spacing)), bilateral, gamma, spec.normalization, spec.filter


def model_argument(spec: MeanFieldSpec, part: Bool | None = None) -> tuple[Any, ...]:
    """Return the settings of a run that the C++ engine takes, forward and backward."""
    model = (spec.weights.tolist(), [] if spec.is_potts else _floats(spec.compatibility), spec.is_potts, spec.temperature)
    return *model, [] if spec.bias is None else _floats(spec.bias), (spec.volume_slack, part)


def equal_or_none(first: Array | None, second: Array | None) -> bool:
    """Return whether two arrays are equal in type and values, or both are None."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and np.array_equal(first, second)


def _floats(values: Any) -> list[float]:
    return np.asarray(values, dtype=np.float64).ravel().tolist()


def _mask(mask: Bool | None) -> Bool | None:
    return None if mask is None else np.ascontiguousarray(mask, dtype=np.bool_)


@contextmanager
def _engine_errors(engine: Any, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn the engine's own errors into errors that a user can act on; others, such as those of a progress callback, pass unchanged."""
    try:
        yield
    except engine.EngineCapacityError as error:
        raise CapacityError(str(error)) from error
    except engine.EngineInputError as error:
        raise InputError(str(error)) from error
    except engine.EngineMemoryError as error:
        raise _out_of_memory(shape) from error


def _out_of_memory(shape: tuple[int, ...]) -> CapacityError:
    grid = "x".join(str(extent) for extent in shape[1:])
    return CapacityError(f"not enough memory to filter {shape[0]} channels on a grid of {grid} voxels; use a mask or a smaller region")
