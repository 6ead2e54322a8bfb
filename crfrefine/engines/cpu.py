"""The C++ engine, as a backend.

The engine comes compiled for several instruction sets; the best one that this processor runs is imported. The environment variable
`CRFREFINE_CPU_LEVEL` (baseline, avx2, avx512) asks for a lower one, for tests and comparisons.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.base import MeanFieldGradients, MeanFieldResult, Progress, Range, Tape
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError
from crfrefine.threads import available_threads

if TYPE_CHECKING:
    from crfrefine.parameters.model import ResolvedParameters

LEVELS = ("baseline", "avx2", "avx512")
"""The instruction sets that the engine is compiled for, lowest first."""


def _load_engine() -> Any:
    asked = os.environ.get("CRFREFINE_CPU_LEVEL")
    if asked is not None and asked not in LEVELS:
        raise ConfigError(f"CRFREFINE_CPU_LEVEL is {asked!r}; expected one of {', '.join(LEVELS)}")
    try:
        baseline = importlib.import_module("crfrefine._engine_baseline")
    except ImportError as error:
        raise BackendUnavailableError(
            "the compiled CPU engine is missing from this installation; reinstall crfrefine (building it needs a C++20 compiler)"
        ) from error
    best = LEVELS.index(baseline.cpu_level())
    wanted = best if asked is None else LEVELS.index(asked)
    if wanted > best:
        raise BackendUnavailableError(f"CRFREFINE_CPU_LEVEL asks for {asked}, but this processor runs only {LEVELS[best]}")
    return baseline if wanted == 0 else importlib.import_module(f"crfrefine._engine_{LEVELS[wanted]}")


class CpuBackend:
    """The C++ engine: permutohedral lattice, bilateral grid, truncated and exact sums, separable spatial filter."""

    name = "cpu"

    def __init__(self) -> None:
        self._engine = _load_engine()

    @property
    def level(self) -> str:
        """The instruction set of the loaded engine."""
        return str(self._engine.__name__).rpartition("_")[2]

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
        """Run the mean field on one case; see `Backend.mean_field`."""
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        image = np.ascontiguousarray(image, dtype=np.float32)
        step = _floats(parameters.position_spacing(spacing))
        spatial = parameters.spatial
        weights = [_floats(kernel.weight) for kernel in parameters.bilateral]
        if spatial is not None:
            weights.append(_floats(spatial.weight))
        out = np.empty_like(logits)
        with _engine_errors(self._engine, logits.shape):
            outcome = self._engine.mean_field(
                logits,
                image,
                _mask(mask),
                step,
                [(_floats(kernel.theta_alpha), _floats(kernel.theta_beta)) for kernel in parameters.bilateral],
                [] if spatial is None else _floats(spatial.theta_gamma),
                weights,
                _floats(parameters.compatibility),
                bool(parameters.is_potts),
                int(parameters.num_iterations),
                float(parameters.tolerance),
                float(parameters.temperature),
                str(parameters.normalization),
                float(parameters.damping),
                str(parameters.filter),
                [] if axes is None else list(axes),
                threads or available_threads(),
                progress,
                out,
            )
        return MeanFieldResult(
            logits=out,
            num_iterations=outcome["num_iterations"],
            converged=outcome["converged"],
            energy=tuple(outcome["energy"]),
            filters=tuple(outcome["filters"]),
            timings={"build": outcome["build_seconds"], "steps": outcome["steps_seconds"]},
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
        values = np.ascontiguousarray(values, dtype=np.float32)
        guide = np.ascontiguousarray(values[:0] if image is None else image, dtype=np.float32)
        step = _floats(spacing)
        out = np.zeros_like(values)
        with _engine_errors(self._engine, values.shape):
            self._engine.message(
                values,
                guide,
                _mask(mask),
                step,
                _floats(theta_alpha),
                [] if theta_beta is None else _floats(theta_beta),
                normalization,
                filter,
                threads or available_threads(),
                out,
            )
        return out

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
    ) -> CpuKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`."""
        if num_labels < 2:
            raise InputError(f"the model needs two labels or more, background among them; got {num_labels}")
        image = np.ascontiguousarray(image, dtype=np.float64 if image.dtype == np.float64 else np.float32)
        build = self._engine.Kernels64 if image.dtype == np.float64 else self._engine.Kernels32
        with _engine_errors(self._engine, image.shape):
            built = build(
                image,
                _mask(mask),
                _floats(spacing),
                [(_floats(theta_alpha), _floats(theta_beta)) for theta_alpha, theta_beta in bilateral],
                [] if theta_gamma is None else _floats(theta_gamma),
                normalization,
                filter,
                num_labels,
                num_iterations,
                threads or available_threads(),
            )
        return CpuKernels(self._engine, built, image, num_labels, len(bilateral), theta_gamma is not None)

    def label_map(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
        out: NDArray[np.unsignedinteger[Any]] = np.empty(logits.shape[1:], dtype=np.uint8 if len(logits) <= 256 else np.uint16)
        self._engine.label_map(np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out)
        return out

    def softmax(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
        """Return the softmax over labels; see `Backend.softmax`."""
        out = np.empty(logits.shape, dtype=np.float32)
        self._engine.softmax(np.ascontiguousarray(logits, dtype=np.float32), threads or available_threads(), out)
        return out

    def channel_ranges(self, channels: NDArray[np.float32], *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        ends = self._engine.channel_ranges(np.ascontiguousarray(channels, dtype=np.float32), threads or available_threads())
        return list(zip(ends[::2], ends[1::2], strict=True))


class CpuKernels:
    """Kernels built by the C++ engine; see `Kernels`."""

    def __init__(self, engine: Any, built: Any, image: NDArray[Any], num_labels: int, num_bilateral: int, has_spatial: bool) -> None:
        self._engine = engine
        self._built = built
        self._image = image
        self._num_labels = num_labels
        self._num_bilateral = num_bilateral
        self.num_kernels = num_bilateral + has_spatial
        self.num_voxels = int(built.num_voxels())
        self.image_shape = image.shape
        self.dtype = str(image.dtype)
        self.filters = tuple(built.descriptions())

    def forward(
        self,
        logits: NDArray[Any],
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        num_iterations: int,
        damping: float = 0.0,
    ) -> Tape:
        """Run the mean field and keep what the way back needs; see `Kernels.forward`."""
        logits = self._array(logits)
        weights = np.asarray(weights, dtype=logits.dtype)
        # With one weight for all labels in each kernel the last label's marginal need not be kept: they sum to 1.
        num_channels = self._num_labels - 1 if (weights == weights[:, :1]).all() else self._num_labels
        out = np.empty_like(logits)
        try:
            record = np.empty((num_iterations, num_channels, self.num_voxels), logits.dtype)
        except MemoryError as error:
            raise _out_of_memory(logits.shape) from error
        with _engine_errors(self._engine, logits.shape):
            steps = self._built.forward(
                logits, weights.tolist(), _floats(compatibility), _is_potts(compatibility), temperature, damping, out, record
            )
        return Tape(out, record, tuple(steps))

    def backward(
        self,
        tape: Tape,
        logits: NDArray[Any],
        gradient: NDArray[Any],
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        damping: float = 0.0,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> MeanFieldGradients:
        """Return the derivatives of a loss; see `Kernels.backward`."""
        logits, gradient = self._array(logits), self._array(gradient)
        by_logits = np.empty_like(logits)
        by_image = np.zeros_like(self._image) if wants_image else None
        with _engine_errors(self._engine, logits.shape):
            sums = self._built.backward(
                logits,
                tape.record,
                list(tape.steps),
                gradient,
                np.asarray(weights, dtype=logits.dtype).tolist(),
                _floats(compatibility),
                _is_potts(compatibility),
                temperature,
                damping,
                wants_theta,
                by_logits,
                by_image,
            )
        num_modalities, num_axes = len(self._image), self._image.ndim - 1
        bilateral = np.array(sums["theta"][: self._num_bilateral]).reshape(self._num_bilateral, num_modalities + num_axes)
        if not wants_theta:
            bilateral = np.zeros_like(bilateral)
        spatial = np.array(sums["theta"][-1]) if self.num_kernels > self._num_bilateral else None
        return MeanFieldGradients(
            logits=by_logits,
            weights=np.array(sums["weights"]).reshape(self.num_kernels, self._num_labels),
            compatibility=np.array(sums["compatibility"]).reshape(self._num_labels, self._num_labels),
            temperature=float(sums["temperature"]),
            theta_alpha=bilateral[:, num_modalities:],
            theta_beta=bilateral[:, :num_modalities],
            theta_gamma=spatial,
            image=by_image,
        )

    def _array(self, channels: NDArray[Any]) -> NDArray[Any]:
        """Labels on the image's grid, in its precision."""
        if channels.shape != (self._num_labels, *self._image.shape[1:]):
            raise InputError(
                f"an array has shape {channels.shape}; the kernels were built for {(self._num_labels, *self._image.shape[1:])}"
            )
        return np.ascontiguousarray(channels, dtype=self._image.dtype)


def _is_potts(compatibility: NDArray[Any]) -> bool:
    return bool(np.array_equal(compatibility, 1.0 - np.eye(len(compatibility))))


def _floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values).ravel()]


def _mask(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return None if mask is None else np.ascontiguousarray(mask, dtype=np.bool_)


@contextmanager
def _engine_errors(engine: Any, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn the engine's own errors into those that a user can act on; all others, as of a progress callback, pass unchanged."""
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
