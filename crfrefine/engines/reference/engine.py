"""The `reference` backend: the model in float64 Python, for checks and small grids.

Slow on purpose; see crfrefine/engines/reference for the parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines.base import MeanFieldGradients, MeanFieldResult, Progress, Range, Tape
from crfrefine.engines.reference.backward import mean_field_backward
from crfrefine.engines.reference.dense import TRUNCATION_RADIUS, DenseKernel
from crfrefine.engines.reference.lattice import Lattice
from crfrefine.engines.reference.mean_field import Filter, MeanFieldTrace, NormalizedKernel, Term, mean_field
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.parameters.model import ResolvedParameters

Float32 = NDArray[np.float32]


class ReferenceBackend:
    """Exact sums over all pairs, or the plain lattice; `auto` takes the exact sums."""

    name = "reference"

    def mean_field(
        self,
        logits: Float32,
        image: Float32,
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        parameters: ResolvedParameters,
        *,
        axes: Sequence[int] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field`. One thread, whatever `threads` says.

        Raises:
            ConfigError: the filter is `grid`, which this backend does not have.
            InputError: the mask is empty.
            CapacityError: too many voxels in the mask.
        """
        grid_shape = logits.shape[1:]
        inside = _inside(mask, grid_shape)
        start = time.perf_counter()
        if progress is not None:
            progress("build", 0, 1)
        steps = parameters.position_spacing(spacing)
        num_points = int(inside.sum())
        terms: list[Term] = []
        filters: list[str] = []
        for index, kernel in enumerate(parameters.bilateral):
            features = kernel_features(image, inside, steps, kernel.theta_alpha.tolist(), kernel.theta_beta.tolist(), grid_shape)
            if axes is not None:
                features[:, len(image) :] = features[:, len(image) + np.argsort(axes)]
            filtering, text = _filter(features, len(grid_shape), parameters.filter)
            terms.append(Term(NormalizedKernel(filtering, num_points, parameters.normalization), kernel.weight))
            filters.append(f"bilateral.{index}: {text}")
        if parameters.spatial is not None:
            features = kernel_features(None, inside, steps, parameters.spatial.theta_gamma.tolist(), None, grid_shape)
            terms.append(Term(NormalizedKernel(DenseKernel(features), num_points, parameters.normalization), parameters.spatial.weight))
            filters.append("spatial: exact")
        built = time.perf_counter()
        result = np.ascontiguousarray(logits, dtype=np.float64) / parameters.temperature
        trace = mean_field(
            logits[:, inside].T.astype(np.float64),
            terms,
            parameters.compatibility,
            num_iterations=parameters.num_iterations,
            tolerance=parameters.tolerance,
            temperature=parameters.temperature,
            damping=parameters.damping,
            watch_energy=parameters.normalization != "after",
            progress=None if progress is None else lambda step: progress("mean field", step, parameters.num_iterations),
        )
        result[:, inside] = trace.logits.T
        return MeanFieldResult(
            logits=result.astype(np.float32),
            num_iterations=trace.num_iterations,
            converged=trace.converged,
            energy=trace.energy,
            filters=tuple(filters),
            timings={"build": built - start, "steps": time.perf_counter() - built},
        )

    def message(
        self,
        values: Float32,
        image: Float32 | None,
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        theta_alpha: Sequence[float],
        theta_beta: Sequence[float] | None,
        normalization: str = "none",
        filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
        threads: int | None = None,
    ) -> Float32:
        """Filter values once; see `Backend.message`. A spatial kernel is always summed exactly.

        Raises:
            ConfigError: the filter is `grid`, which this backend does not have.
            InputError: the mask is empty.
            CapacityError: too many voxels in the mask.
        """
        grid_shape = values.shape[1:]
        inside = _inside(mask, grid_shape)
        features = kernel_features(image, inside, spacing, theta_alpha, theta_beta, grid_shape)
        filtering, _ = _filter(features, len(grid_shape), "exact" if theta_beta is None else filter)
        kernel = NormalizedKernel(filtering, features.shape[0], normalization)
        result = np.zeros(values.shape, dtype=np.float32)
        result[:, inside] = kernel.message(values[:, inside].T.astype(np.float64)).T
        return result

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
    ) -> ReferenceKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`. All work is done in float64."""
        inside = _inside(mask, image.shape[1:])
        thetas = [(list(theta_alpha), list(theta_beta)) for theta_alpha, theta_beta in bilateral]
        return ReferenceKernels(
            image, inside, list(spacing), thetas, None if theta_gamma is None else list(theta_gamma), normalization, filter
        )

    def label_map(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest logit at each voxel; see `Backend.label_map`."""
        labels: NDArray[np.unsignedinteger[Any]] = np.argmax(logits, axis=0).astype(np.min_scalar_type(len(logits) - 1))
        return labels

    def softmax(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
        """Return the softmax over labels; see `Backend.softmax`."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=0))
        marginals: NDArray[np.float32] = (exponentials / exponentials.sum(axis=0)).astype(np.float32)
        return marginals

    def channel_ranges(self, channels: NDArray[np.float32], *, threads: int | None = None) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        finite = [bool(np.isfinite(channel).all()) for channel in channels]
        return [
            (float(channel.min()), float(channel.max())) if usable else (math.nan, math.nan)
            for channel, usable in zip(channels, finite, strict=True)
        ]


class ReferenceKernels:
    """Kernels as dense matrices; see `Kernels`."""

    def __init__(
        self,
        image: NDArray[Any],
        inside: NDArray[np.bool_],
        spacing: list[float],
        bilateral: list[tuple[list[float], list[float]]],
        theta_gamma: list[float] | None,
        normalization: str,
        filter_name: str,
    ) -> None:
        self._inside = inside
        self._dtype = np.float64 if image.dtype == np.float64 else np.float32
        self.image_shape = image.shape
        self.dtype = np.dtype(self._dtype).name
        self._normalization = normalization
        # Intensities first, positions last, as in kernel_features.
        self._thetas = [np.array([*theta_beta, *theta_alpha], dtype=np.float64) for theta_alpha, theta_beta in bilateral]
        self._num_bilateral = len(bilateral)
        self._features: list[NDArray[np.float64]] = []
        self._kernels: list[Filter] = []
        filters: list[str] = []
        for index, (theta_alpha, theta_beta) in enumerate(bilateral):
            self._features.append(kernel_features(image, inside, spacing, theta_alpha, theta_beta, inside.shape))
            filtering, text = _filter(self._features[-1], inside.ndim, filter_name)
            self._kernels.append(filtering)
            filters.append(f"bilateral.{index}: {text}")
        if theta_gamma is not None:
            self._thetas.append(np.array(theta_gamma, dtype=np.float64))
            self._features.append(kernel_features(None, inside, spacing, theta_gamma, None, inside.shape))
            self._kernels.append(DenseKernel(self._features[-1]))
            filters.append("spatial: exact")
        self.filters = tuple(filters)
        self.num_kernels = len(self._kernels)
        self.num_voxels = int(inside.sum())

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
        terms = [
            Term(NormalizedKernel(kernel, self.num_voxels, self._normalization), np.asarray(weight, dtype=np.float64))
            for kernel, weight in zip(self._kernels, weights, strict=True)
        ]
        trace = mean_field(
            self._compact(logits),
            terms,
            np.asarray(compatibility, dtype=np.float64),
            num_iterations=num_iterations,
            temperature=temperature,
            damping=damping,
            watch_energy=self._normalization != "after",
        )
        refined = np.asarray(logits, dtype=np.float64) / temperature
        refined[:, self._inside] = trace.logits.T
        record = np.stack([marginals.T for marginals in trace.marginals])
        return Tape(refined.astype(self._dtype), record, trace.steps)

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
        trace = MeanFieldTrace(
            self._compact(tape.logits), len(tape.steps), False, (), tuple(marginals.T for marginals in tape.record), tape.steps
        )
        found = mean_field_backward(
            trace,
            self._compact(gradient),
            self._compact(logits),
            self._kernels,
            self._features,
            np.asarray(weights, dtype=np.float64),
            np.asarray(compatibility, dtype=np.float64),
            temperature=temperature,
            normalization=self._normalization,
        )
        by_logits = np.asarray(gradient, dtype=np.float64) / temperature
        outside = ~self._inside
        by_temperature = found.temperature - float((by_logits * logits)[:, outside].sum()) / temperature
        by_logits[:, self._inside] = found.logits.T
        num_modalities = self.image_shape[0]
        by_image = np.zeros(self.image_shape)
        for columns, theta in zip(found.features[: self._num_bilateral], self._thetas, strict=False):
            by_image[:, self._inside] += (columns / theta)[:, :num_modalities].T
        # A feature is a coordinate over its bandwidth.
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
            theta_alpha=bilateral[:, num_modalities:],
            theta_beta=bilateral[:, :num_modalities],
            theta_gamma=by_theta[-1] if self.num_kernels > self._num_bilateral else None,
            image=by_image.astype(self._dtype) if wants_image else None,
        )

    def _compact(self, channels: NDArray[Any]) -> NDArray[np.float64]:
        """(N, channels) of the voxels inside the mask."""
        return np.asarray(channels, dtype=np.float64)[:, self._inside].T


def _inside(mask: NDArray[np.bool_] | None, grid_shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask, or all voxels; never empty."""
    inside = np.ones(grid_shape, dtype=bool) if mask is None else mask
    if not inside.any():
        raise InputError("the mask is empty")
    return inside


def _filter(features: NDArray[np.float64], num_positions: int, name: str) -> tuple[Filter, str]:
    """The filter of that name for these features, and a line that says what it is."""
    if name in ("exact", "auto"):
        return DenseKernel(features), "exact"
    if name == "truncated":
        text = f"truncated (radius {TRUNCATION_RADIUS:g} theta_alpha)"
        return DenseKernel(features, num_positions=num_positions, radius=TRUNCATION_RADIUS), text
    if name == "lattice":
        lattice = Lattice(features)
        return lattice, f"lattice ({lattice.num_vertices} vertices)"
    raise ConfigError(f"mean_field.filter: the reference backend has exact, truncated and lattice, not '{name}'; use --device cpu")
