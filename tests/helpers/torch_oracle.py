"""The mean field unrolled in plain torch over dense kernel matrices: the tests' reference for the layer's values and gradients.

Everything is differentiable by autograd, normalization, image and bandwidths included. `tests/layer/test_layer.py` checks it against the
`reference` backend, which shares no code with it. O(N^2) memory per kernel: for small grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.specs import MeanFieldSpec

TRUNCATION_RADIUS = 3.0
ENERGY_RISE = 1e-6


@dataclass(frozen=True)
class Terms:
    """What the model has besides logits and image; numbers or tensors that broadcast to labels, axes and modalities."""

    bilateral: Sequence[tuple[Any, Any, Any]]  # weight, theta_alpha, theta_beta
    spatial: tuple[Any, Any] | None = None  # weight, theta_gamma
    compatibility: Tensor | None = None
    temperature: Any = 1.0
    bias: Any = None


def dense_kernel(positions: Tensor, intensities: Tensor | None, theta_alpha: Any, theta_beta: Any, radius: float = math.inf) -> Tensor:
    """K (N, N) of N voxels with positions (N, axes) in mm and intensities (N, M); pairs beyond `radius` theta_alpha are left out."""
    offsets = positions[:, None, :] - positions[None, :, :]
    distance = torch.square(offsets / theta_alpha).sum(-1)
    exponent = distance
    if intensities is not None:
        differences = intensities[:, None, :] - intensities[None, :, :]
        exponent = exponent + torch.square(differences / theta_beta).sum(-1)
    return torch.where(distance <= radius**2 * (1.0 + 1e-6), torch.exp(-0.5 * exponent), torch.zeros_like(exponent))


def normalized(kernel: Tensor, normalization: str) -> Tensor:
    """The kernel with its normalization, which contributes to the gradient."""
    row_sum = kernel.sum(1)
    if normalization == "symmetric":
        return kernel / torch.sqrt(row_sum[:, None] * row_sum[None, :])
    return kernel / row_sum[:, None] if normalization == "after" else kernel


def mean_field(
    logits: Tensor,
    image: Tensor,
    terms: Terms,
    *,
    spacing: Sequence[float],
    mask: Tensor | None = None,
    num_iterations: int = 5,
    damping: float = 0.0,
    normalization: str = "symmetric",
    filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
) -> Tensor:
    """Refined logits (L, *grid) of logits (L, *grid) and a normalized image (M, *grid); always all the steps."""
    num_labels = logits.shape[0]
    inside = torch.ones(logits.shape[1:], dtype=torch.bool) if mask is None else mask
    positions = inside.nonzero().to(logits.dtype) * torch.tensor(spacing, dtype=logits.dtype)
    radius = TRUNCATION_RADIUS if filter == "truncated" else math.inf
    pairs = [
        (weight, normalized(dense_kernel(positions, image[:, inside].T, alpha, beta, radius), normalization))
        for weight, alpha, beta in terms.bilateral
    ]
    if terms.spatial is not None:
        weight, gamma = terms.spatial
        pairs.append((weight, normalized(dense_kernel(positions, None, gamma, None), normalization)))
    penalty = 1.0 - torch.eye(num_labels, dtype=logits.dtype) if terms.compatibility is None else terms.compatibility

    everywhere = logits / terms.temperature
    bias = torch.zeros(num_labels, dtype=logits.dtype) if terms.bias is None else terms.bias
    scores = ((logits + bias.reshape(-1, *(1,) * (logits.ndim - 1))) / terms.temperature)[:, inside].T  # (N, L)
    x = scores
    step = 1.0 - damping
    energy = size = math.nan
    for _ in range(num_iterations):
        log_marginals = torch.log_softmax(x, dim=1)
        marginals = log_marginals.exp()
        pairwise = torch.zeros_like(scores)
        for weight, matrix in pairs:
            pairwise = pairwise + ((matrix @ marginals) * weight) @ penalty
        with torch.no_grad():  # The length of the steps is a choice of the algorithm and has no gradient.
            shifted = scores - scores.amax(1, keepdim=True)
            before, energy = energy, float((marginals * (log_marginals - scores + 0.5 * pairwise)).sum())
            size = sum(abs(float((marginals * part).sum())) for part in (log_marginals, shifted, 0.5 * pairwise))
        x = (1.0 - step) * x + step * (scores - pairwise)
        if normalization != "after" and energy > before + ENERGY_RISE * size:
            step *= 0.5
    result = everywhere.clone()
    result[:, inside] = x.T
    return result


@dataclass(frozen=True)
class OracleTape:
    """What a forward run leaves for the backward run."""

    logits: NDArray[Any]
    record: NDArray[Any]
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class OracleGradients:
    """Gradients as the engine returns them: with respect to values, not their logarithms."""

    logits: NDArray[Any]
    weights: NDArray[Any]
    compatibility: NDArray[Any]
    temperature: float
    bias: NDArray[Any]
    theta_alpha: NDArray[Any]
    theta_beta: NDArray[Any]
    theta_gamma: NDArray[Any] | None
    image: NDArray[Any] | None
    volume_weight: float | None = None  # it has no volume term


class OracleKernels:
    """The engine's `Kernels` computed by autograd over dense matrices: the same calls, the same arrays, in float64."""

    def __init__(
        self,
        image: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        bilateral: Sequence[tuple[Any, Any]],
        theta_gamma: Any,
        *,
        normalization: str = "symmetric",
        filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
    ) -> None:
        self.dtype = image.dtype.name
        self.image_shape = image.shape
        self.image = torch.tensor(image, dtype=torch.float64)
        self.mask = None if mask is None else torch.tensor(mask)
        self.num_bilateral = len(bilateral)
        axes, modalities = image.ndim - 1, image.shape[0]
        self.theta_alpha = torch.tensor(np.array([alpha for alpha, _ in bilateral]).reshape(-1, axes), dtype=torch.float64)
        self.theta_beta = torch.tensor(np.array([beta for _, beta in bilateral]).reshape(-1, modalities), dtype=torch.float64)
        self.theta_gamma = None if theta_gamma is None else torch.tensor(theta_gamma, dtype=torch.float64)
        self.num_kernels = self.num_bilateral + (theta_gamma is not None)
        self.filters = ("oracle",) * self.num_kernels
        self.num_voxels = int(np.prod(image.shape[1:]) if mask is None else mask.sum())
        self._fixed = {"spacing": spacing, "mask": self.mask, "normalization": normalization, "filter": filter}

    def _inputs(self, logits: Any, spec: MeanFieldSpec) -> dict[str, Tensor | None]:
        values = {"logits": logits, **{name: getattr(spec, name) for name in ("weights", "compatibility", "temperature")}}
        values["bias"] = np.zeros(spec.num_labels) if spec.bias is None else spec.bias
        inputs: dict[str, Tensor | None] = {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in values.items()}
        return inputs | {name: getattr(self, name) for name in ("theta_alpha", "theta_beta", "theta_gamma", "image")}

    def _run(self, inputs: dict[str, Any], spec: MeanFieldSpec) -> Tensor:
        bilateral = [(inputs["weights"][m], inputs["theta_alpha"][m], inputs["theta_beta"][m]) for m in range(self.num_bilateral)]
        spatial = None if self.theta_gamma is None else (inputs["weights"][-1], inputs["theta_gamma"])
        terms = Terms(bilateral, spatial, inputs["compatibility"], inputs["temperature"], inputs["bias"])
        steps = {"num_iterations": spec.num_iterations, "damping": spec.damping}
        return mean_field(inputs["logits"], inputs["image"], terms, **steps, **self._fixed)

    def forward(self, logits: Any, spec: MeanFieldSpec) -> OracleTape:
        """See the engine's `Kernels.forward`; the record holds what this class needs, the number of steps."""
        with torch.no_grad():
            x = self._run(self._inputs(logits, spec), spec)
        return OracleTape(x.numpy().astype(self.dtype), np.array([spec.num_iterations]))

    def backward(
        self,
        tape: OracleTape,
        logits: Any,
        gradient: Any,
        spec: MeanFieldSpec,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> OracleGradients:
        """See the engine's `Kernels.backward`."""
        inputs = self._inputs(logits, spec)
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items() if value is not None}
        with torch.enable_grad():
            x = self._run(inputs | leaves, spec)
            found = torch.autograd.grad(x, list(leaves.values()), torch.tensor(gradient, dtype=torch.float64), materialize_grads=True)
        grads = {name: value.numpy() for name, value in zip(leaves, found, strict=True)}
        thetas = {name: grads[name] * wants_theta if name in grads else None for name in ("theta_alpha", "theta_beta", "theta_gamma")}
        return OracleGradients(
            logits=grads["logits"].astype(self.dtype),
            weights=grads["weights"],
            compatibility=grads["compatibility"],
            temperature=float(grads["temperature"]),
            bias=grads["bias"],
            image=grads["image"].astype(self.dtype) if wants_image else None,
            **thetas,
        )
