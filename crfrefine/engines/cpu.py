"""The C++ engine, as a backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array, Float32, Labels
from crfrefine.base.limits import available_threads
from crfrefine.engines.base import (
    NO_CONTEXT,
    Backend,
    GridImage,
    MeanFieldGradients,
    MeanFieldReport,
    MeanFieldResult,
    Progress,
    Range,
    RunContext,
    Tape,
)
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.volume import volume_part
from crfrefine.errors import CapacityError, InputError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec


@dataclass(eq=False)
class CpuBackend(Backend):
    """The C++ engine: permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter."""

    name = "cpu"
    # Whether the kernels of the newest whole volume stay in memory for the next `mean_field`, if image, mask, spacing and bandwidths are
    # equal. Runs then come one at a time; results have the same bits.
    keeps_kernels: bool = False
    _engine: Any = field(default_factory=load_engine, init=False)
    _kept: tuple[CpuKernels, GridImage, int | None] | None = field(
        default=None, init=False
    )  # with their image and threads

    @property
    def level(self) -> str:
        """The instruction set of the loaded engine."""
        return str(self._engine.__name__).rpartition("_")[2]

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> CpuKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`."""
        return CpuKernels(self._engine, image, spec, context)

    def _fits(self, image: GridImage, spec: KernelSetSpec, threads: int | None) -> bool:
        """Whether the kept kernels are those of an image and a model."""
        if self._kept is None:
            return False
        kernels, built, built_threads = self._kept
        settings = (
            tuple(image.spacing),
            image.axes,
            threads,
            replace(spec, num_iterations=kernels.spec.num_iterations),
        )
        if settings != (tuple(built.spacing), built.axes, built_threads, kernels.spec):
            return False
        pairs: Any = (image.values, built.values), (image.mask, built.mask)
        if not all(new is old or np.array_equal(new, old) for new, old in pairs):
            return False
        # For more steps, another filter may be the fastest one.
        return spec == kernels.spec or self.plan_filters(image, spec, threads) == self.plan_filters(
            image, kernels.spec, threads
        )

    def plan_filters(
        self, image: GridImage, spec: KernelSetSpec, threads: int | None = None
    ) -> tuple[str, ...]:
        """Return the filter of each appearance kernel on an image, without building it: "exact", "truncated", "grid" or "lattice"."""
        values = np.ascontiguousarray(image.values, dtype=np.float32)
        distances, bilateral, _, _, name = _kernel_arguments(spec, image.spacing)
        settings = (
            distances,
            bilateral,
            name,
            spec.num_labels,
            spec.num_iterations,
            threads or available_threads(),
        )
        with engine_errors(self._engine, values.shape):
            return tuple(self._engine.plan_filters(values, image.mask, *settings))

    def mean_field(
        self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`."""
        if (
            self.keeps_kernels and image.origin is None
        ):  # Kernels of parts of a volume are never kept.
            if not self._fits(image, spec.kernels, context.threads) or self._kept is None:
                self._kept = None  # Memory need not hold two of them.
                self._kept = self.kernels(image, spec.kernels, context), image, context.threads
            try:
                return self._kept[0].run(logits, spec.mean_field, progress=context.progress)
            except CapacityError:  # Kept kernels and a run may not fit into memory together.
                self._kept = None
        kernels = self.kernels(image, spec.kernels, context)
        del image
        return kernels.run(logits, spec.mean_field, progress=context.progress, is_last=True)

    def message(
        self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None
    ) -> Float32:
        """Filter values once; see `Backend.message`."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        guide, settings = (
            np.ascontiguousarray(image.values, dtype=np.float32),
            _kernel_arguments(spec, image.spacing),
        )
        out = np.zeros_like(values)
        with engine_errors(self._engine, values.shape):
            self._engine.message(
                values, guide, image.mask, *settings, threads or available_threads(), out
            )
        return out

    def label_map(self, logits: Float32, *, threads: int | None = None) -> Labels:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
        out: Labels = np.empty(logits.shape[1:], dtype=np.min_scalar_type(len(logits) - 1))
        self._engine.label_map(
            np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out
        )
        return out

    def softmax(
        self, logits: Float32, *, threads: int | None = None, out: Float32 | None = None
    ) -> Float32:
        """Return the softmax over labels; see `Backend.softmax`."""
        out = np.empty(logits.shape, np.float32) if out is None else out
        self._engine.softmax(
            np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out
        )
        return out

    def channel_ranges(self, channels: Float32, *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        ends = self._engine.channel_ranges(
            np.ascontiguousarray(channels, dtype=np.float32), threads or available_threads()
        )
        return list(zip(ends[::2], ends[1::2], strict=True))


class CpuKernels:
    """Kernels built by the C++ engine; see `Kernels`. `built` is the engine's own object, for runs on tiles."""

    dtype = "float32"

    def __init__(
        self, engine: Any, image: GridImage, spec: KernelSetSpec, context: RunContext
    ) -> None:
        """Build the kernels; see `Backend.kernels`."""
        values, started, origin = (
            np.ascontiguousarray(image.values, dtype=np.float32),
            time.perf_counter(),
            image.origin,
        )
        self._engine, self._mask, self.spec, self.image_shape = (
            engine,
            image.mask,
            spec,
            values.shape,
        )
        with engine_errors(engine, values.shape):
            self.built = engine.Kernels(
                values,
                image.mask,
                *_kernel_arguments(spec, image.spacing),
                spec.num_labels,
                spec.num_iterations,
                list(image.axes or ()),
                None if origin is None else (list(origin.position), list(origin.intensity)),
                context.threads or available_threads(),
                context.progress,
            )
        self.num_voxels, self.filters = (
            int(self.built.num_voxels()),
            tuple(map(str, self.built.descriptions())),
        )
        self._build_seconds = time.perf_counter() - started

    def run(
        self,
        logits: Array,
        spec: MeanFieldSpec,
        *,
        progress: Progress | None = None,
        is_last: bool = False,
    ) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`."""
        if logits.dtype != np.float32 or logits.strides[-1] != logits.itemsize:
            logits = np.ascontiguousarray(logits, dtype=np.float32)
        started, out = time.perf_counter(), np.empty(logits.shape, np.float32)
        with engine_errors(self._engine, logits.shape):
            part = volume_part(logits, self._mask, spec) if spec.volume_weight else None
            outcome = self.built.run(logits, spec, part, is_last, progress, out)
        report = MeanFieldReport(
            outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), self.filters
        )
        timings = {"build": self._build_seconds, "steps": time.perf_counter() - started}
        return MeanFieldResult(out, report, timings, outcome["marginals"])

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        logits, spec = np.ascontiguousarray(logits, np.float32), spec.rounded(np.float32)
        part, num_recorded = (
            volume_part(logits, self._mask, spec),
            spec.num_iterations + (spec.volume_weight > 0.0),
        )
        with engine_errors(self._engine, logits.shape):
            out, record = (
                np.empty_like(logits),
                np.empty((num_recorded, spec.num_channels, self.num_voxels), np.float32),
            )
            biases = self.built.forward(logits, spec, part, out, record)
        return Tape(
            out, record, spec, volume_biases=np.array(biases) if biases else None, volume_part=part
        )

    def backward(
        self,
        tape: Tape,
        logits: Array,
        gradient: Array,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        logits, gradient = (
            np.ascontiguousarray(logits, np.float32),
            np.ascontiguousarray(gradient, np.float32),
        )
        by_logits, by_image = (
            np.empty_like(logits),
            np.zeros(self.image_shape, np.float32) if wants_image else None,
        )
        biases = [] if tape.volume_biases is None else tape.volume_biases.tolist()
        with engine_errors(self._engine, logits.shape):
            sums = self.built.backward(
                logits,
                tape.record,
                biases,
                gradient,
                tape.spec,
                tape.volume_part,
                wants_theta,
                by_logits,
                by_image,
            )
        num_modalities, num_axes = self.image_shape[0], len(self.image_shape) - 1
        num_bilateral, num_labels = len(self.spec.bilateral), tape.spec.num_labels
        bilateral = np.zeros((num_bilateral, num_modalities + num_axes))
        if wants_theta and num_bilateral:
            bilateral[...] = sums["theta"][:num_bilateral]
        return MeanFieldGradients(
            logits=by_logits,
            weights=np.array(sums["weights"]).reshape(-1, num_labels),
            compatibility=np.array(sums["compatibility"]).reshape(num_labels, num_labels),
            temperature=float(sums["temperature"]),
            bias=np.array(sums["bias"]),
            theta_position=bilateral[:, num_modalities:],
            theta_intensity=bilateral[:, :num_modalities],
            theta_gamma=None if self.spec.spatial is None else np.array(sums["theta"][-1]),
            image=by_image,
            volume_weight=tape.spec.volume_weight_gradient(float(sums["volume_slack"])),
        )


def _kernel_arguments(spec: KernelSetSpec, spacing: Sequence[float]) -> tuple[Any, ...]:
    """Return the settings of the kernels that the C++ engine takes: spacing, bandwidths, normalization, filter."""
    kernels = [(list(kernel.theta_position), kernel.theta_intensity) for kernel in spec.kernels]
    bilateral = [
        (position, list(intensity)) for position, intensity in kernels if intensity is not None
    ]
    gamma = next((position for position, intensity in kernels if intensity is None), [])
    return list(spec.distances(spacing)), bilateral, gamma, spec.normalization, spec.filter


@contextmanager
def engine_errors(engine: Any, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn the engine's own errors into errors that a user can act on; others, such as those of a progress callback, pass unchanged."""
    try:
        yield
    except engine.EngineCapacityError as error:
        raise CapacityError(str(error)) from error
    except engine.EngineInputError as error:
        raise InputError(str(error)) from error
    except (engine.EngineMemoryError, MemoryError) as error:
        if (
            type(error) is MemoryError
        ):  # of a progress callback: numpy and the engine have kinds of their own
            raise
        grid = "x".join(str(extent) for extent in shape[1:])
        raise CapacityError(
            f"not enough memory to filter {shape[0]} channels on a grid of {grid} voxels; use a mask or a smaller region"
        ) from error
