"""The C++ engine, as a backend.

The engine comes compiled for several instruction sets; the best one that this processor runs is imported. The environment variable
`CRFREFINE_CPU_LEVEL` (baseline, avx2, avx512) asks for a lower one, for tests and comparisons.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.backends.base import MeanFieldResult, Progress, Range
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError
from crfrefine.threads import available_threads

if TYPE_CHECKING:
    from crfrefine.config import ResolvedParameters

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
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`."""
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        image = np.ascontiguousarray(image, dtype=np.float32)
        step = _floats(parameters.position_spacing(spacing))
        spatial = parameters.spatial
        out = np.empty_like(logits)
        try:
            outcome = self._engine.mean_field(
                logits,
                image,
                _mask(mask),
                step,
                [(_floats(kernel.weight), _floats(kernel.theta_alpha), _floats(kernel.theta_beta)) for kernel in parameters.bilateral],
                None if spatial is None else (_floats(spatial.weight), _floats(spatial.theta_gamma)),
                _floats(parameters.compatibility),
                bool(parameters.is_potts),
                int(parameters.num_iterations),
                float(parameters.tolerance),
                float(parameters.temperature),
                str(parameters.normalization),
                float(parameters.damping),
                str(parameters.filter),
                threads or available_threads(),
                progress,
                out,
            )
        except (ValueError, MemoryError) as error:
            raise _translate(error, logits.shape) from error
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
        try:
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
        except (ValueError, MemoryError) as error:
            raise _translate(error, values.shape) from error
        return out

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


def _floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values).ravel()]


def _mask(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return None if mask is None else np.ascontiguousarray(mask, dtype=np.bool_)


def _translate(error: Exception, shape: tuple[int, ...]) -> Exception:
    """Return the error that a user can act on."""
    if isinstance(error, MemoryError):
        grid = "x".join(str(extent) for extent in shape[1:])
        return CapacityError(f"not enough memory to filter {shape[0]} channels on a grid of {grid} voxels; use a mask or a smaller region")
    if str(error).startswith("capacity: "):
        return CapacityError(str(error).removeprefix("capacity: "))
    return InputError(str(error))
