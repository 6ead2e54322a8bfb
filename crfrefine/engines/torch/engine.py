"""The `torch` backend: plain tensor operations, whose gradients are those of autograd.

It is slower and simpler than the other engines, which tests compare with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Array, Float64, Shape
from crfrefine.base.numerics import TRUNCATION_RADIUS
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
    box_inside,
)
from crfrefine.engines.choices import exact_or_lattice
from crfrefine.engines.torch.filters import (
    Filter,
    Lattice,
    dense_filter,
    normalized,
    spatial_sum,
)
from crfrefine.engines.torch.mean_field import Inputs, divided, mean_field
from crfrefine.engines.volumes import volume_part
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec


class TorchBackend(Backend):
    """Plain operations on a device of PyTorch.

    Its filters are exact and truncated sums over all pairs, the permutohedral lattice, and a
    separable spatial filter; there is no `grid`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.name = "torch"
        self._device = device
        if device != "cpu":
            self.name = f"torch:{device}"
            number = torch.device(device).index or 0
            if number >= torch.cuda.device_count():
                raise BackendUnavailableError(
                    f"--device {self.name}: PyTorch finds no such NVIDIA GPU; use --device torch"
                )

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> TorchKernels:
        """Build the kernels of a model on one image, in its precision; see `Backend.kernels`."""
        return TorchKernels(image, spec, self._device, context)


class TorchKernels:
    """The kernels of a model on one image; see `Kernels`.

    `backward` builds them anew, so that gradients reach bandwidths and image.
    """

    def __init__(
        self, image: GridImage, spec: KernelSetSpec, device: str, context: RunContext
    ) -> None:
        started = time.perf_counter()
        assert image.origin is None, "parts of a volume run on the CPU"
        self.spec = spec
        self._grid = image
        self._threads = context.threads
        self._device = device
        self.image_shape: Shape = image.values.shape
        grid_shape = self.image_shape[1:]
        box = box_inside(image.mask, grid_shape)
        if spec.filter == "grid" and spec.bilateral:
            raise ConfigError(
                "mean_field.filter: plain tensor operations (--device torch, float64 logits of the "
                "layer) have exact, truncated and lattice, not 'grid'; use --device cpu, or float32"
            )
        self.dtype = "float64" if image.values.dtype == np.float64 else "float32"
        self._like = torch.empty(0, dtype=getattr(torch, self.dtype), device=device)
        mask = np.ones(grid_shape, np.bool_) if image.mask is None else image.mask
        self.inside = torch.as_tensor(mask, device=device)
        # Positions count from the mask's first voxel: a wider grid then moves no cell of a lattice.
        steps = np.argwhere(mask) - [side.start for side in box]
        self.num_voxels = len(steps)
        self._distances = spec.distances(image.spacing)
        self._positions = self.tensor(steps * np.asarray(self._distances))
        # Cells depend on the features and their order, which is that of the user's axes. An axis
        # along which the mask has one voxel has no feature, unless it is the last one.
        users_axes = range(len(box)) if image.axes is None else image.axes
        self._axes = []
        for axis in np.argsort(users_axes).tolist():
            if box[axis].stop - box[axis].start > 1 or axis == len(box) - 1:
                self._axes.append(axis)
        with _limits(context.threads, device), torch.no_grad():
            self.built, filters = self._build(*self._features(), context.progress)
        self.filters = tuple(filters)
        self._seconds = time.perf_counter() - started

    def run(
        self,
        logits: Array,
        spec: MeanFieldSpec,
        *,
        progress: Progress | None = None,
        is_last: bool = False,
    ) -> MeanFieldResult:
        """Run the mean field until its stopping rule is met; see `Kernels.run`."""
        started = time.perf_counter()
        with _limits(self._threads, self._device), torch.no_grad():
            inputs = self._inputs(logits, spec)
            refined, report = self._refine(inputs, self.built, spec, progress)
        report = report._replace(filters=self.filters)
        timings = {"build": self._seconds, "steps": time.perf_counter() - started}
        return MeanFieldResult(refined.cpu().numpy(), report, timings)

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field for a later `backward`; see `Kernels.forward`."""
        spec = replace(spec, tolerance=0.0)
        # The record is empty, since `backward` takes the steps again.
        record = np.empty((0, spec.num_labels, self.num_voxels))
        return Tape(self.run(logits, spec).logits, record, spec)

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
        inputs = self._inputs(logits, tape.spec)
        for leaf in inputs:
            leaf.requires_grad_()
        thetas, image = self._features()
        image.requires_grad_(wants_image)
        for theta in thetas:
            theta.requires_grad_(wants_theta)
        with _limits(self._threads, self._device), torch.enable_grad():
            kernels, _ = self._build(thetas, image)
            refined, _ = self._refine(inputs, kernels, tape.spec)
            refined.backward(self.tensor(gradient))

        by_theta = [np.zeros(0), *[_slope(theta) for theta in thetas]]
        by_slack = float(_slope(inputs.slack))
        by_image = None
        if wants_image:
            by_image = _slope(image).astype(self.dtype)
        return MeanFieldGradients(
            logits=_slope(inputs.logits).astype(self.dtype),
            weights=_slope(inputs.weights),
            compatibility=_slope(inputs.compatibility),
            temperature=float(_slope(inputs.temperature)),
            bias=_slope(inputs.bias),
            theta=np.concatenate(by_theta),
            image=by_image,
            volume_weight=tape.spec.volume_weight_gradient(by_slack),
        )

    def _refine(
        self,
        inputs: Inputs,
        kernels: list[Filter],
        spec: MeanFieldSpec,
        progress: Progress | None = None,
    ) -> tuple[Tensor, MeanFieldReport]:
        """Run `mean_field` inside the mask; outside it logits are divided by the temperature."""
        logits = inputs.logits
        inside = self.inside
        part = None
        if spec.volume_weight > 0.0:
            on_host = logits.detach().cpu().numpy()
            voxels = volume_part(on_host, self._grid.mask, spec, self._grid.axes)
            part = torch.as_tensor(voxels, device=inside.device)
        inputs_inside = inputs._replace(logits=logits[:, inside].T)
        x, report = mean_field(inputs_inside, kernels, spec, part, progress)

        refined = torch.empty_like(logits)
        refined[:, inside] = x.T
        refined[:, ~inside] = divided(logits[:, ~inside], inputs.temperature)
        return refined, report

    def _build(
        self, thetas: list[Tensor], image: Tensor, progress: Progress | None = None
    ) -> tuple[list[Filter], list[str]]:
        """Return the normalized kernels, and a line per kernel that says how it is computed."""
        intensities = image[:, self.inside].T
        num_modalities = intensities.shape[1]
        columns = [*range(num_modalities), *(num_modalities + axis for axis in self._axes)]
        name = self.spec.filter
        if name == "auto":
            name = exact_or_lattice(self.num_voxels)
        kernels = []
        filters = []
        named = zip(self.spec.names, self.spec.kernels, thetas, strict=True)
        for number, (kernel_name, kernel, theta) in enumerate(named):
            if progress is not None:
                progress("build", number, len(thetas))
            text = "exact"
            if kernel.kind == "spatial":
                plain = spatial_sum(self.inside, self._distances, theta)
            else:
                above_lowest = intensities - intensities.detach().amin(0)
                features = torch.cat([above_lowest, self._positions], dim=1) / theta
                features = features[:, columns]
                if name == "truncated":
                    plain = dense_filter(features, features[:, num_modalities:])
                    text = f"truncated (radius {TRUNCATION_RADIUS:g} theta_alpha)"
                elif name == "lattice":
                    plain = lattice = Lattice(features)
                    text = f"lattice ({lattice.num_vertices} vertices)"
                else:
                    plain = dense_filter(features)
            kernels.append(normalized(plain, intensities, self.spec.normalization))
            filters.append(f"{kernel_name}: {text}")
        return kernels, filters

    def _features(self) -> tuple[list[Tensor], Tensor]:
        """Return the bandwidths of each kernel, and the image."""
        thetas = [self.tensor(kernel.theta) for kernel in self.spec.kernels]
        return thetas, self.tensor(self._grid.values)

    def _inputs(self, logits: Array, spec: MeanFieldSpec) -> Inputs:
        """Return the inputs of `mean_field`, with logits (L, *grid)."""
        bias = np.zeros(spec.num_labels) if spec.bias is None else spec.bias
        model = (spec.weights, spec.compatibility, spec.temperature, bias, spec.volume_slack)
        return Inputs(self.tensor(logits), *[self.tensor(values) for values in model])

    def tensor(self, values: Any) -> Tensor:
        """Return a copy in the type and on the device of the computation."""
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.array(values, order="C"))
        return values.detach().to(self._like, copy=True)


def _slope(tensor: Tensor) -> Float64:
    """Return the gradient with respect to a leaf; zeros if nothing depends on it."""
    if tensor.grad is None:
        return np.zeros(tensor.shape)
    return tensor.grad.double().cpu().numpy()


# PyTorch has one number of threads for the process, which new threads begin with. Calls that run
# side by side would restore each other's, so they take turns.
_RUNNING = threading.RLock()


@contextmanager
def _limits(threads: int | None, device: str) -> Iterator[None]:
    """Give PyTorch a number of threads; raise CapacityError if its GPU has too little memory.

    None means the number that PyTorch has. On a GPU it does not matter.
    """
    if device != "cpu":
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise CapacityError(
                f"--device torch: not enough memory of the GPU ({reason}); use --device cpu"
            ) from error
        return
    with _RUNNING:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
