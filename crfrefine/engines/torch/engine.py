"""The `torch` backend: plain tensor operations on a device of PyTorch, with gradients by autograd; slower than the engines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Array, Float32, Float64
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
)
from crfrefine.engines.torch.filters import (
    TRUNCATION_RADIUS,
    Filter,
    Lattice,
    dense_filter,
    normalized,
    spatial_filter,
)
from crfrefine.engines.volume import PSEUDO_VOXELS, VolumeTerm, volume_part
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec

FLIPPED_SHARE = 1e-4  # of voxels whose label may still change in a step that counts as converged
_LAST_CHANGE = {
    torch.float64: 1e-7,
    torch.float32: 1e-5,
}  # nats of the last Newton step of the volume term


class Trace(NamedTuple):
    """Result of a run."""

    logits: Tensor  # x of the last step, (N, L)
    converged: bool
    energy: list[float]  # free energy of the marginals at the start of each step
    biases: list[Float64]  # (L,), bias of the volume term in each step; none without it


def mean_field(
    inputs: Sequence[Tensor],
    kernels: Sequence[Filter],
    spec: MeanFieldSpec,
    part: Tensor | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run parallel mean-field updates x = (a + bias) / temperature - pairwise, Q = softmax(x), until KL and flips are small.

    The inputs have gradients: logits (N, L), weights (kernels, L), compatibility (L, L), temperature, bias (L,), and the slack of the
    volume term, which applies in `part`, (N,) bool; None means nowhere.
    """
    logits, weights, compatibility, temperature, bias, slack = inputs
    x = scores = divided(logits + bias, temperature)
    log_marginals = torch.log_softmax(x, dim=1)
    volume = None if part is None else _Volume(log_marginals.exp(), slack, part)
    trace = Trace(x, converged=False, energy=[], biases=[])
    while len(trace.energy) < spec.num_iterations and not trace.converged:
        if progress is not None:
            progress("mean field", len(trace.energy), spec.num_iterations)
        marginals = log_marginals.exp()
        messages = torch.zeros_like(x)
        for kernel, weight in zip(kernels, weights, strict=True):
            messages = messages + kernel(marginals) * weight
        pairwise = messages @ compatibility
        energy = (marginals * (log_marginals - scores + 0.5 * pairwise)).sum().item()
        x = scores - pairwise
        if volume is not None:
            energy += volume.energy(marginals)
            x = volume.balanced(x)
            trace.biases.append(volume.bias)
        trace.energy.append(energy)
        before, log_marginals = log_marginals, torch.log_softmax(x, dim=1)
        divergence = (log_marginals.exp() * (log_marginals - before)).sum(1).mean().item()
        flipped = (log_marginals.argmax(1) != before.argmax(1)).double().mean().item()
        converged = spec.tolerance > 0.0 and divergence < spec.tolerance and flipped < FLIPPED_SHARE
        trace = trace._replace(logits=x, converged=converged)
    return trace


def divided(scores: Tensor, temperature: Tensor) -> Tensor:
    """Return scores over a temperature, which gets no gradient from -infinity, nor NaN outside the mask: 0 times these is NaN."""
    usable = scores.isfinite()
    return torch.where(usable, scores.masked_fill(~usable, 0.0) / temperature, scores.detach())


class _Volume:
    """The volume term of a run: the masses to keep, and the bias per label of the last step, at which the next search starts."""

    def __init__(self, marginals: Tensor, slack: Tensor, part: Tensor) -> None:
        self._part, self._slack = part, slack.double()
        self._target = torch.bincount(
            marginals[part].argmax(1), minlength=marginals.shape[1]
        ).double()
        self._term = VolumeTerm(self._target.cpu().numpy(), slack.item())
        self.bias: Float64 = np.zeros(marginals.shape[1])

    def energy(self, marginals: Tensor) -> float:
        """Return the term's energy."""
        return self._term.energy(marginals[self._part].detach().double().sum(0).cpu().numpy())

    def balanced(self, x: Tensor) -> Tensor:
        """Return x with the bias that balances the masses, where the term applies."""
        # The search has no gradient. One more Newton step, with a constant curvature, has the
        # gradient of its solution.
        scores = x[self._part].double()
        self.bias = self._term.search(
            lambda bias: _sums(scores.detach(), bias), self.bias, _LAST_CHANGE[x.dtype]
        )
        bias = torch.as_tensor(self.bias, device=x.device)
        masses, covariance = _sums(scores.detach(), self.bias)
        curvature = torch.as_tensor(
            self._term.curvature(covariance, masses + PSEUDO_VOXELS), device=x.device
        )
        target = self._target + PSEUDO_VOXELS
        scaled = target * torch.exp(-self._slack * bias)
        excess = (
            torch.softmax(scores + bias, 1).sum(0)
            + PSEUDO_VOXELS
            - scaled * (target.sum() / scaled.sum())
        )
        change: Tensor = -torch.linalg.solve(curvature, excess)
        return x + ((bias + change - change.mean()) * self._part[:, None]).to(x.dtype)


def _sums(scores: Tensor, bias: Float64) -> tuple[Float64, Float64]:
    marginals = torch.softmax(scores + torch.as_tensor(bias, device=scores.device), 1)
    masses = marginals.sum(0)
    return masses.cpu().numpy(), (torch.diag(masses) - marginals.T @ marginals).cpu().numpy()


EXACT_BELOW = 8192  # voxels, up to which `auto` sums over all pairs; it takes the lattice for more


class TorchBackend(Backend):
    """Exact and truncated sums over all pairs, the permutohedral lattice, a separable spatial filter; on a device of PyTorch."""

    def __init__(self, device: str = "cpu") -> None:
        if device != "cpu" and (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"--device torch:{device}: PyTorch finds no such NVIDIA GPU; use --device torch"
            )
        self.name = "torch" if device == "cpu" else f"torch:{device}"
        self._device = device

    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> TorchKernels:
        """Build the kernels of a model on one image, in its precision; see `Backend.kernels`. It has no filter `grid`."""
        return TorchKernels(image, spec, self._device, context)

    def message(
        self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None
    ) -> Float32:
        """Filter values once; see `Backend.message`."""
        kernels, result = (
            self.kernels(image, spec, RunContext(threads)),
            np.zeros(values.shape, dtype=np.float32),
        )
        with _limits(threads), torch.no_grad():
            result[:, kernels.mask] = (
                kernels.built[0](kernels.tensor(values)[:, kernels.inside].T).T.cpu().numpy()
            )
        return result


class TorchKernels:
    """The kernels of a model on one image; see `Kernels`. Gradients build them again, to follow bandwidths and image."""

    def __init__(
        self, image: GridImage, spec: KernelSetSpec, device: str, context: RunContext
    ) -> None:
        started = time.perf_counter()
        assert image.origin is None, "parts of a volume run on the CPU"
        self._grid, self.spec, self._threads = image, spec, context.threads
        self.mask = (
            np.ones(image.values.shape[1:], dtype=bool) if image.mask is None else image.mask
        )
        if not self.mask.any():
            raise InputError("the mask is empty")
        self.dtype = "float64" if image.values.dtype == np.float64 else "float32"
        self.num_voxels = int(self.mask.sum())
        self.image_shape: tuple[int, ...] = image.values.shape
        self._like = torch.empty(0, dtype=getattr(torch, self.dtype), device=device)
        self.inside = torch.as_tensor(self.mask, device=device)
        self._image = self.tensor(image.values)
        # Bandwidths of each kernel, those of intensities first.
        self._thetas = [
            self.tensor([*(kernel.theta_intensity or ()), *kernel.theta_position])
            for kernel in spec.kernels
        ]
        with _limits(context.threads), torch.no_grad():
            self.built, texts = self._build(self._thetas, self._image, context.progress)
        self.filters = tuple(
            f"{name}: {text}" for name, text in zip(spec.names, texts, strict=True)
        )
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
        with _limits(self._threads), torch.no_grad():
            refined, trace = self._refine(self._inputs(logits, spec), self.built, spec, progress)
        report = MeanFieldReport(
            len(trace.energy), trace.converged, tuple(trace.energy), self.filters
        )
        return MeanFieldResult(
            refined.cpu().numpy(),
            report,
            {"build": self._seconds, "steps": time.perf_counter() - started},
        )

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field for a later `backward`, which takes the same steps again; see `Kernels.forward`."""
        spec = replace(spec, tolerance=0.0)
        with _limits(self._threads), torch.no_grad():
            refined, trace = self._refine(self._inputs(logits, spec), self.built, spec)
        record = np.empty(
            (0, spec.num_labels, self.num_voxels)
        )  # `backward` takes the steps again.
        return Tape(
            refined.cpu().numpy(),
            record,
            spec,
            volume_biases=np.stack(trace.biases) if trace.biases else None,
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
        inputs = [leaf.requires_grad_() for leaf in self._inputs(logits, tape.spec)]
        image = self.tensor(self._image).requires_grad_(wants_image)
        thetas = [self.tensor(theta).requires_grad_(wants_theta) for theta in self._thetas]
        with _limits(self._threads), torch.enable_grad():
            refined, _ = self._refine(inputs, self._build(thetas, image)[0], tape.spec)
            refined.backward(self.tensor(gradient))
        slopes = [
            np.zeros(x.shape) if x.grad is None else x.grad.double().cpu().numpy()
            for x in (*inputs, image, *thetas)
        ]
        (
            by_logits,
            by_weights,
            by_compatibility,
            by_temperature,
            by_bias,
            by_slack,
            by_image,
            *by_thetas,
        ) = slopes
        num_modalities, num_bilateral = self.image_shape[0], len(self.spec.bilateral)
        bilateral = np.array(by_thetas[:num_bilateral]).reshape(
            num_bilateral, num_modalities + self.mask.ndim
        )
        return MeanFieldGradients(
            logits=by_logits.astype(self.dtype),
            weights=by_weights,
            compatibility=by_compatibility,
            temperature=float(by_temperature),
            bias=by_bias,
            theta_position=bilateral[:, num_modalities:],
            theta_intensity=bilateral[:, :num_modalities],
            theta_gamma=None if self.spec.spatial is None else by_thetas[-1],
            image=by_image.astype(self.dtype) if wants_image else None,
            volume_weight=tape.spec.volume_weight_gradient(float(by_slack)),
        )

    def _refine(
        self,
        inputs: list[Tensor],
        kernels: list[Filter],
        spec: MeanFieldSpec,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Trace]:
        """Return (L, *grid) logits of the last step, outside the mask the input divided by the temperature; and the steps."""
        logits, inside = inputs[0], self.inside
        part = volume_part(logits.detach().cpu().numpy(), self.mask, spec)
        compact = [logits[:, inside].T, *inputs[1:]]
        trace = mean_field(
            compact,
            kernels,
            spec,
            None if part is None else torch.as_tensor(part, device=inside.device),
            progress,
        )
        refined = torch.empty_like(logits)
        refined[:, inside] = trace.logits.T
        refined[:, ~inside] = divided(logits[:, ~inside], inputs[3])
        return refined, trace

    def _build(
        self, thetas: list[Tensor], image: Tensor, progress: Progress | None = None
    ) -> tuple[list[Filter], list[str]]:
        """Return the normalized kernels, and a line per kernel that says how it is computed."""
        intensities = image[:, self.inside].T
        kernels, texts = [], []
        for number, (kernel, theta) in enumerate(zip(self.spec.kernels, thetas, strict=True)):
            if progress is not None:
                progress("build", number, len(thetas))
            if kernel.theta_intensity is None:
                plain, text = (
                    spatial_filter(self.inside, self.spec.distances(self._grid.spacing), theta),
                    "exact",
                )
            else:
                plain, text = self._appearance_filter(theta, intensities)
            kernels.append(
                normalized(
                    plain, intensities.new_ones((self.num_voxels, 1)), self.spec.normalization
                )
            )
            texts.append(text)
        return kernels, texts

    def _appearance_filter(self, theta: Tensor, intensities: Tensor) -> tuple[Filter, str]:
        num_axes, places = self.mask.ndim, np.argwhere(self.mask)
        # From the mask's first voxel, a wider grid around it does not move the lattice's cells.
        positions = self.tensor(
            (places - places.min(axis=0)) * np.asarray(self.spec.distances(self._grid.spacing))
        )
        features = torch.cat([intensities - intensities.detach().amin(0), positions], dim=1) / theta
        # Cells of a lattice depend on the order of the features, and on their number: an axis of one voxel is none, but for the last.
        first, order = (
            features.shape[1] - num_axes,
            range(num_axes) if self._grid.axes is None else np.argsort(self._grid.axes).tolist(),
        )
        features = features[
            :,
            [
                *range(first),
                *(
                    first + axis
                    for axis in order
                    if axis == num_axes - 1 or np.ptp(places[:, axis])
                ),
            ],
        ]
        name = self.spec.filter
        if name == "exact" or (name == "auto" and self.num_voxels <= EXACT_BELOW):
            return dense_filter(features), "exact"
        if name == "truncated":
            return dense_filter(
                features, features[:, first:]
            ), f"truncated (radius {TRUNCATION_RADIUS:g} theta_alpha)"
        if name == "grid":
            raise ConfigError(
                "mean_field.filter: plain tensor operations (--device torch, float64 logits of the layer) have exact, truncated and "
                "lattice, not 'grid'; use --device cpu, or float32"
            )
        lattice = Lattice(features)
        return lattice, f"lattice ({lattice.num_vertices} vertices)"

    def _inputs(self, logits: Array, spec: MeanFieldSpec) -> list[Tensor]:
        """Return the inputs of `mean_field`, the logits on the grid."""
        bias = np.zeros(spec.num_labels) if spec.bias is None else spec.bias
        return [
            *map(
                self.tensor,
                (
                    logits,
                    spec.weights,
                    spec.compatibility,
                    spec.temperature,
                    bias,
                    spec.volume_slack,
                ),
            )
        ]

    def tensor(self, values: Any) -> Tensor:
        """Return a copy in the type and on the device of the computation."""
        return (
            (
                values
                if isinstance(values, Tensor)
                else torch.from_numpy(np.array(values, order="C"))
            )
            .detach()
            .to(self._like, copy=True)
        )


@contextmanager
def _limits(threads: int | None) -> Iterator[None]:
    """Give PyTorch a number of threads, and turn its lack of memory into ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"--device torch: not enough memory of the GPU ({str(error).splitlines()[0]}); use --device cpu"
        ) from error
    finally:
        torch.set_num_threads(before)
