"""The `torch` backend: the model in plain tensor operations on a device of PyTorch, with gradients by autograd.

It sums over all pairs, or takes the permutohedral lattice; slower than the engines for the CPU and for GPUs, and with more memory.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.intensity import kernel_features
from crfrefine.base.array_types import Array, Float32
from crfrefine.engines import host
from crfrefine.engines.base import NO_CONTEXT, MeanFieldGradients, MeanFieldReport, MeanFieldResult, Progress, RunContext, Tape
from crfrefine.engines.grid_image import checked_origin
from crfrefine.engines.torch.filters import TRUNCATION_RADIUS, Dense, Filter, Lattice, Spatial
from crfrefine.engines.torch.mean_field import Inputs, NormalizedKernel, Trace, mean_field
from crfrefine.engines.volume_part import volume_part
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec

EXACT_BELOW = 8192
"""`auto` sums over all pairs of at most so many voxels, and takes the lattice for more."""


class TorchBackend:
    """Exact and truncated sums over all pairs, the permutohedral lattice, a separable spatial filter."""

    label_map, softmax, channel_ranges = staticmethod(host.label_map), staticmethod(host.softmax), staticmethod(host.channel_ranges)

    def __init__(self, device: str = "cpu", dtype: str | None = None) -> None:
        """Take a device of PyTorch.

        Args:
            device: "cpu", "cuda" or "cuda:N".
            dtype: "float32" or "float64", the precision of the computation; None: that of the image.

        Raises:
            BackendUnavailableError: PyTorch finds no such GPU.
        """
        if device != "cpu" and (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise BackendUnavailableError(f"--device torch:{device}: PyTorch finds no such NVIDIA GPU; use --device torch")
        self.name = "torch" if device == "cpu" else f"torch:{device}"
        self._device, self._dtype = device, dtype

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> TorchKernels:
        """Build the kernels of a model on one image; see `Backend.kernels`.

        Raises:
            ConfigError: the filter is `grid`, which this backend does not have.
            InputError: the mask is empty.
            CapacityError: too many voxels for the exact filter, a lattice with too many cells, or too little memory.
        """
        with _limits(context.threads):
            return TorchKernels(image, spec, self._device, self._dtype or str(np.dtype(image.values.dtype)), context)

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Run the mean field on one case; see `Backend.mean_field` and `kernels`."""
        return self.kernels(image, spec.kernels, context).run(logits, spec.mean_field, progress=context.progress)

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter values once; see `Backend.message`."""
        kernels = self.kernels(image, spec, RunContext(threads))
        return kernels.message(values)


class TorchKernels:
    """The kernels of a model on one image; see `Kernels`. Gradients build them again, to follow bandwidths and image."""

    def __init__(self, image: GridImage, spec: KernelSetSpec, device: str, dtype: str, context: RunContext) -> None:
        started = time.perf_counter()
        self._image, self._spec, self._context = image, spec, context
        shape = image.values.shape[1:]
        self._mask = np.ones(shape, dtype=bool) if image.mask is None else image.mask
        if not self._mask.any():
            raise InputError("the mask is empty")
        self._inside = torch.as_tensor(self._mask, device=device)
        self._like = torch.empty(0, dtype=torch.float64 if dtype == "float64" else torch.float32, device=device)
        self._origin = checked_origin(image)
        self.image_shape: tuple[int, ...] = image.values.shape
        self.dtype = "float64" if image.values.dtype == np.float64 else "float32"
        self.num_kernels, self.num_voxels = len(spec.kernels), int(self._mask.sum())
        self._built, texts = self._build(self._thetas(), self._intensities(), context.progress)
        self.filters = tuple(f"{name}: {text}" for name, text in zip(spec.names, texts, strict=True))
        self._seconds = time.perf_counter() - started

    def run(self, logits: Array, spec: MeanFieldSpec, *, progress: Progress | None = None, is_last: bool = False) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`. The kernels can always be used again."""
        started = time.perf_counter()
        told = None if progress is None else lambda step: progress("mean field", step, spec.num_iterations)
        with _limits(self._context.threads), torch.no_grad():
            trace = mean_field(Inputs.of(self._compact(logits), spec), self._built, spec, self._part(logits, spec), told)
        report = MeanFieldReport(len(trace.energy), trace.converged, trace.energy, self.filters)
        seconds = {"build": self._seconds, "steps": time.perf_counter() - started}
        return MeanFieldResult(self._on_grid(trace, logits, spec), report, seconds)

    def message(self, values: Array) -> Float32:
        """Return (V, *grid) values, filtered with the only kernel; 0 outside the mask."""
        result = np.zeros(values.shape, dtype=np.float32)
        with _limits(self._context.threads), torch.no_grad():
            result[:, self._mask] = self._built[0].message(self._compact(values)).T.cpu().numpy()
        return result

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field for a later `backward`, which takes the same steps again; see `Kernels.forward`."""
        steps, logits = replace(spec, tolerance=0.0), _on_host(logits)
        with _limits(self._context.threads), torch.no_grad():
            trace = mean_field(Inputs.of(self._compact(logits), steps), self._built, steps, self._part(logits, steps))
        biases = np.stack(trace.biases) if trace.biases else None
        record = np.empty((0, spec.num_labels, self.num_voxels))  # `backward` takes the steps again.
        return Tape(self._on_grid(trace, logits, spec), record, steps, volume_biases=biases)

    def backward(
        self, tape: Tape, logits: Array, gradient: Array, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `Kernels.backward`."""
        spec, logits, gradient = tape.spec, _on_host(logits), _on_host(gradient)
        with _limits(self._context.threads), torch.enable_grad():
            inputs = Inputs.of(self._compact(logits), spec)
            thetas, intensities = self._thetas(), self._intensities()
            leaves = [*inputs.leaves, *thetas, intensities]
            for leaf in leaves:
                leaf.requires_grad_()
            kernels, _ = self._build(thetas, intensities)
            trace = mean_field(inputs, kernels, spec, self._part(logits, spec))
            found = torch.autograd.grad(trace.logits, leaves, self._compact(gradient), allow_unused=True)
        values = [np.zeros(leaf.shape) if of is None else of.double().cpu().numpy() for leaf, of in zip(leaves, found, strict=True)]
        by_compact, by_weights, by_compatibility, by_temperature, by_bias, by_slack, *by_thetas, by_intensities = values
        by_logits = np.asarray(gradient, dtype=np.float64) / spec.temperature
        outside = float((by_logits * logits)[:, ~self._mask].sum()) / spec.temperature
        by_logits[:, self._mask] = by_compact.T
        by_image = np.zeros(self.image_shape)
        by_image[:, self._mask] = by_intensities.T
        num_modalities, num_bilateral = self.image_shape[0], len(self._spec.bilateral)
        bilateral = np.array(by_thetas[:num_bilateral]).reshape(num_bilateral, num_modalities + self._mask.ndim) * wants_theta
        return MeanFieldGradients(
            logits=by_logits.astype(self.dtype),
            weights=by_weights,
            compatibility=by_compatibility,
            temperature=float(by_temperature) - outside,
            bias=by_bias,
            theta_position=bilateral[:, num_modalities:],
            theta_intensity=bilateral[:, :num_modalities],
            theta_gamma=by_thetas[-1] * wants_theta if self.num_kernels > num_bilateral else None,
            image=by_image.astype(self.dtype) if wants_image else None,
            volume_weight=spec.volume_weight_gradient(float(by_slack)),
        )

    def _thetas(self) -> list[Tensor]:
        """Return the bandwidths of each kernel, intensities first."""
        return [self._tensor([*(kernel.theta_intensity or ()), *kernel.theta_position]) for kernel in self._spec.kernels]

    def _intensities(self) -> Tensor:
        """Return the intensities of the masked voxels, (N, M)."""
        return self._compact(self._image.values)

    def _build(
        self, thetas: list[Tensor], intensities: Tensor, progress: Progress | None = None
    ) -> tuple[list[NormalizedKernel], list[str]]:
        """Return the normalized kernels, and a line per kernel that says how it is computed."""
        ones = intensities.new_ones((self.num_voxels, 1))
        kernels, texts = [], []
        for number, (kernel, theta) in enumerate(zip(self._spec.kernels, thetas, strict=True)):
            if progress is not None:
                progress("build", number, self.num_kernels)
            plain, text = self._filter(kernel, theta, intensities)
            kernels.append(NormalizedKernel(plain, ones, self._spec.normalization))
            texts.append(text)
        return kernels, texts

    def _filter(self, kernel: KernelSpec, theta: Tensor, intensities: Tensor) -> tuple[Filter, str]:
        steps, num_axes = self._spec.distances(self._image.spacing), self._mask.ndim
        if kernel.is_spatial:
            return Spatial(self._inside, steps, theta), "exact"
        origin = None if self._origin is None else (self._origin.position, self._origin.intensity)
        ones = (1.0,) * num_axes
        positions = self._tensor(kernel_features(None, self._mask, steps, ones, None, self._mask.shape, origin=origin))
        lowest = intensities.detach().amin(0) if origin is None else self._tensor(origin[1])
        features = torch.cat([intensities - lowest, positions], dim=1) / theta
        if self._image.axes is not None:  # Cells of a lattice depend on the order of the features.
            first = features.shape[1] - num_axes
            features = features[:, [*range(first), *(first + np.argsort(self._image.axes)).tolist()]]
        name = self._spec.filter
        if name == "exact" or (name == "auto" and self.num_voxels <= EXACT_BELOW):
            return Dense(features), "exact"
        if name == "truncated":
            return Dense(
                features, num_positions=num_axes, radius=TRUNCATION_RADIUS
            ), f"truncated (radius {TRUNCATION_RADIUS:g} theta_alpha)"
        if name in ("auto", "lattice"):
            lattice = Lattice(features)
            return lattice, f"lattice ({lattice.num_vertices} vertices)"
        raise ConfigError(f"mean_field.filter: --device torch has exact, truncated and lattice, not '{name}'; use --device cpu")

    def _part(self, logits: Array, spec: MeanFieldSpec) -> Tensor | None:
        part = volume_part(logits, self._mask, spec)
        return None if part is None else torch.as_tensor(part, device=self._like.device)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=self._like.dtype, device=self._like.device)

    def _compact(self, channels: Array) -> Tensor:
        """Return the values of the masked voxels, (N, channels)."""
        return self._tensor(np.asarray(channels)[:, self._mask].T)

    def _on_grid(self, trace: Trace, logits: Array, spec: MeanFieldSpec) -> Array:
        """Return (L, *grid) logits of the last step; outside the mask the input divided by the temperature."""
        refined = np.asarray(logits, dtype=np.float64) / spec.temperature
        refined[:, self._mask] = trace.logits.detach().T.double().cpu().numpy()
        return np.ascontiguousarray(refined, dtype=self.dtype)


def _on_host(values: Any) -> Array:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@contextmanager
def _limits(threads: int | None) -> Iterator[None]:
    """Give PyTorch a number of threads, and turn its lack of memory into ours."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"--device torch: not enough memory of the GPU ({str(error).splitlines()[0]}); use --device cpu") from error
    finally:
        torch.set_num_threads(before)
