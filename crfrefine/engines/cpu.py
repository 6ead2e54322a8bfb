"""The C++ engine: as a backend, and how its compiled module is found.

It is compiled for several instruction sets, its levels, and the best one for this processor is
imported; `CRFREFINE_CPU_LEVEL` selects a lower one. A build from source has the baseline and the
level of the machine; wheels have all (`CRFREFINE_LEVELS` of CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array, Float32, Shape
from crfrefine.base.limits import available_threads
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
from crfrefine.engines.volumes import volume_part
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec


class CpuBackend(Backend):
    """The C++ engine.

    Its filters are the permutohedral lattice, the bilateral grid, truncated and exact sums, and
    the separable spatial filter.
    """

    name = "cpu"

    def __init__(self, keeps_kernels: bool = False) -> None:
        """Load the engine.

        With `keeps_kernels` those of the newest whole volume stay in memory. The next `mean_field`
        uses them if image, mask, spacing and bandwidths are equal; results have the same bits. A
        second run at a time raises InputError, and callers must never change an image or a mask
        that they gave.
        """
        self._engine = load_engine()
        self._keeps_kernels = keeps_kernels
        self._one_run = OneCall(
            "this engine keeps its kernels, and is at work on another run; make an engine per "
            "thread, and start no run from the progress callback of another one",
            waits=False,
        )
        # Kernels that stay in memory, and the image and the threads that they were built for.
        self._kept: tuple[CpuKernels, GridImage, int | None] | None = None

    @property
    def level(self) -> str:
        """The instruction set of the loaded engine."""
        return str(self._engine.__name__).rpartition("_")[2]

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> CpuKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`."""
        return CpuKernels(image, spec, context)

    def plan_filters(
        self, image: GridImage, spec: KernelSetSpec, threads: int | None = None
    ) -> tuple[str, ...]:
        """Return the filter of each appearance kernel on an image, without building it.

        A filter is "exact", "truncated", "grid" or "lattice".
        """
        given = _image_and_model(image, spec)
        with engine_errors(image.values.shape):
            return tuple(self._engine.plan_filters(*given, threads or available_threads()))

    def mean_field(
        self, logits: Float32, image: GridImage, model: ModelSpec, context: RunContext = NO_CONTEXT
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`."""
        if self._keeps_kernels and image.origin is None:  # never those of a part of a volume
            with self._one_run:
                if not self._keeps(image, model.kernels, context.threads):
                    self._kept = None  # The old kernels are freed before new ones are built.
                    self._kept = (CpuKernels(image, model.kernels, context), image, context.threads)
                assert self._kept is not None
                try:
                    return run_model(self._kept[0], logits, model, context)
                except CapacityError:  # Kept kernels and a run may not fit into memory together.
                    self._kept = None

        kernels = CpuKernels(image, model.kernels, context)
        del image
        return run_model(kernels, logits, model, context, frees_kernels=True)

    def _keeps(self, image: GridImage, spec: KernelSetSpec, threads: int | None) -> bool:
        """Return whether kernels of an image and a model are kept, for as many threads."""
        if self._kept is None:
            return False
        kernels, built, built_threads = self._kept
        built_spec = kernels.spec
        is_same = (
            replace(spec, num_iterations=built_spec.num_iterations) == built_spec
            and (threads, image.axes) == (built_threads, built.axes)
            and tuple(image.spacing) == tuple(built.spacing)
            and _are_equal(image.values, built.values)
            and _are_equal(image.mask, built.mask)
        )
        if not is_same or spec == built_spec:
            return is_same
        # Only the numbers of steps differ: for more steps, another filter may be the fastest one.
        filters = self.plan_filters(image, built_spec, threads)
        return self.plan_filters(image, spec, threads) == filters

    def message(
        self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None
    ) -> Float32:
        """Filter (V, *grid) values once with the only kernel of a set; results outside are 0."""
        values = np.ascontiguousarray(values, np.float32)
        given = _image_and_model(image, spec)
        out = np.zeros_like(values)
        with engine_errors(values.shape):
            self._engine.message(values, *given, threads or available_threads(), out)
        return out


def _image_and_model(image: GridImage, spec: KernelSetSpec) -> tuple[Any, ...]:
    """Return the arguments of the engine's functions that stand for an image and its kernels."""
    values = np.ascontiguousarray(image.values, np.float32)
    return values, image.mask, spec.distances(image.spacing), spec


class CpuKernels:
    """Kernels built by the C++ engine; see `Kernels`.

    `built` is the C++ object that holds them, which runs on tiles also use.
    """

    dtype = "float32"

    def __init__(self, image: GridImage, spec: KernelSetSpec, context: RunContext) -> None:
        """Build the kernels; see `Backend.kernels`."""
        started = time.perf_counter()
        self.spec = spec
        self.image_shape: Shape = image.values.shape
        self._mask = image.mask
        self._axes = image.axes

        with engine_errors(self.image_shape):
            self.built = load_engine().Kernels(
                *_image_and_model(image, spec),
                list(image.axes or ()),
                image.origin,
                context.threads or available_threads(),
                context.progress,
            )
        self.num_voxels: int = self.built.num_voxels()
        self.filters: tuple[str, ...] = tuple(self.built.descriptions())
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
            logits = np.ascontiguousarray(logits, np.float32)
        started = time.perf_counter()
        out = np.empty(logits.shape, np.float32)
        with engine_errors(logits.shape):
            part = volume_part(logits, self._mask, spec, self._axes)
            outcome = self.built.run(logits, spec, part, is_last, progress, out)

        report = MeanFieldReport(
            outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), self.filters
        )
        timings = {"build": self._build_seconds, "steps": time.perf_counter() - started}
        return MeanFieldResult(out, report, timings, outcome["marginals"])

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field and save the data of the backward pass; see `Kernels.forward`."""
        logits = np.ascontiguousarray(logits, np.float32)
        spec = spec.rounded(np.float32)
        part = volume_part(logits, self._mask, spec, self._axes)
        with engine_errors(logits.shape):
            out = np.empty_like(logits)
            shape = (spec.num_recorded, spec.num_channels, self.num_voxels)
            record = np.empty(shape, np.float32)
            biases = self.built.forward(logits, spec, part, out, record)
        return Tape(out, record, spec, biases, part)

    def backward(
        self,
        tape: Tape,
        logits: Array,
        gradient: Array,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
        stays: bool = False,
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        logits = np.ascontiguousarray(logits, np.float32)
        by_logits = np.empty_like(logits)
        by_image = np.zeros(self.image_shape, np.float32) if wants_image else None
        with engine_errors(logits.shape):
            sums = self.built.backward(
                logits,
                tape.record,
                tape.volume_biases,
                np.ascontiguousarray(gradient, np.float32),
                tape.spec,
                tape.volume_part,
                wants_theta,
                by_logits,
                by_image,
            )

        num_labels = tape.spec.num_labels
        by_theta = np.array(sums["theta"])
        if not wants_theta:
            by_theta[...] = 0.0
        return MeanFieldGradients(
            logits=by_logits,
            weights=np.reshape(sums["weights"], (-1, num_labels)),
            compatibility=np.reshape(sums["compatibility"], (num_labels, num_labels)),
            temperature=sums["temperature"],
            bias=np.array(sums["bias"]),
            theta=by_theta,
            image=by_image,
            volume_weight=tape.spec.volume_weight_gradient(sums["volume_slack"]),
        )


def _are_equal(new: Array | None, old: Array | None) -> bool:
    return new is old or np.array_equal(np.asarray(new), np.asarray(old))


@contextmanager
def engine_errors(shape: Shape) -> Iterator[None]:
    """Turn the engine's errors for (channels, *grid) values into errors a user can act on.

    Other errors, such as those of a progress callback, pass unchanged.
    """
    engine = load_engine()
    try:
        yield
    except engine.EngineCapacityError as error:
        raise CapacityError(str(error)) from error
    except engine.EngineInputError as error:
        raise InputError(str(error)) from error
    except (engine.EngineMemoryError, MemoryError) as error:
        # A plain MemoryError is a progress callback's: numpy and the engine raise other types.
        if type(error) is MemoryError:
            raise
        grid = "x".join(str(extent) for extent in shape[1:])
        raise CapacityError(
            f"not enough memory to filter {shape[0]} channels on a grid of {grid} voxels; use a "
            "mask or a smaller region"
        ) from error


# ---- The compiled engine

# The instruction sets that the engine can be compiled for, lowest first; every build has the first.
LEVELS = ("baseline", "avx2", "avx512")
ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"  # environment variable that names the level to import


# Every layer asks for the engine several times, and listing the folder takes as long as the
# arithmetic of a small case.
@cache
def load_engine() -> Any:
    """Import the compiled engine: at the level that the environment names, else at the best one.

    Raises BackendUnavailableError without an engine at that level.
    """
    baseline = _import_level(LEVELS[0])
    built = built_levels(baseline)
    processor = baseline.cpu_level()
    supported = LEVELS[: LEVELS.index(processor) + 1]
    usable = [level for level in built if level in supported]
    level = os.environ.get(ASKED_LEVEL, usable[-1])
    if level not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {level!r}; expected one of {', '.join(LEVELS)}")
    if level not in usable:
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {level}; this processor runs {processor}, and the "
            f"engine was compiled for {' and '.join(built)}; unset it, or "
            "pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all . in a clone"
        )
    return _import_level(level)


def built_levels(engine: Any) -> tuple[str, ...]:
    """Return the levels that were compiled beside an engine, lowest first."""
    files = Path(str(engine.__file__)).parent.iterdir()
    modules = {file.name.partition(".")[0] for file in files}
    return tuple(level for level in LEVELS if f"_engine_{level}" in modules)


def _import_level(level: str) -> Any:
    """Import the engine of a level, in a source tree without engines that of an installed package.

    Python finds the source tree first when it is started in a clone. An installed engine fits if
    this module has the same text here and there.
    """
    name = f"crfrefine._engine_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        missing = error
    except ImportError as error:
        raise BackendUnavailableError(
            f"the compiled CPU engine cannot be loaded ({error}); reinstall crfrefine"
        ) from error

    this_module = Path(__file__).read_bytes()
    for entry in sys.path:
        package = Path(entry, "crfrefine")
        spec = PathFinder.find_spec(name, [str(package)])
        if spec is None or spec.loader is None:
            continue
        if (package / "engines" / "cpu.py").read_bytes() == this_module:
            engine = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(engine)
            sys.modules[name] = engine
            return engine
    raise BackendUnavailableError(
        f"the compiled CPU engine is missing from {Path(__file__).parents[1]}, and no "
        "installed package of this version has it; install crfrefine (building it needs a "
        "C++20 compiler), or run Python outside of a source tree"
    ) from missing
