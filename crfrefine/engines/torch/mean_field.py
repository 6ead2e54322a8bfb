"""The mean-field iteration, its energy and its stopping rule, over (N, L) values of masked voxels (docs/reference/math.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float64
from crfrefine.engines.torch.filters import Filter
from crfrefine.engines.volume_term import PSEUDO_VOXELS, VolumeTerm

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec

FLIPPED_SHARE = 1e-4
"""Share of voxels whose label may still change in a step that counts as converged."""

_LAST_CHANGE = {torch.float64: 1e-7, torch.float32: 1e-5}
"""Size in nats of the last Newton step of the volume term, by the precision of the marginals."""


class NormalizedKernel:
    """A kernel with its normalization: D^-1/2 K D^-1/2 (symmetric), D^-1 K (after) or K (none), with D = diag(K 1)."""

    def __init__(self, kernel: Filter, ones: Tensor, normalization: str) -> None:
        """Compute the normalizer; `ones` is (N, 1)."""
        self._kernel = kernel
        row_sum = ones if normalization == "none" else kernel.filter(ones)
        self._before = row_sum.rsqrt() if normalization == "symmetric" else ones
        self._after = self._before if normalization == "symmetric" else 1.0 / row_sum

    def message(self, values: Tensor) -> Tensor:
        """Filter (N, V) values."""
        return self._after * self._kernel.filter(self._before * values)


@dataclass(frozen=True)
class Inputs:
    """What the logits of a run depend on, besides the kernels: the leaves of gradients."""

    logits: Tensor  # (N, L), higher is better
    weights: Tensor  # (kernels, L)
    compatibility: Tensor  # (L, L)
    temperature: Tensor  # number
    bias: Tensor  # (L,)
    slack: Tensor  # number, inverse strength of the volume term

    @classmethod
    def of(cls, logits: Tensor, spec: MeanFieldSpec) -> Inputs:
        """Return the inputs of a run in the type and on the device of the logits."""
        bias = np.zeros(spec.num_labels) if spec.bias is None else spec.bias
        numbers = (spec.weights, spec.compatibility, spec.temperature, bias, spec.volume_slack)
        return cls(logits, *(torch.as_tensor(np.asarray(value, np.float64), dtype=logits.dtype, device=logits.device) for value in numbers))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All of them, in their order."""
        return self.logits, self.weights, self.compatibility, self.temperature, self.bias, self.slack


@dataclass(frozen=True)
class Trace:
    """Result of a run."""

    logits: Tensor  # x of the last step, (N, L)
    converged: bool
    energy: tuple[float, ...]  # free energy of the marginals at the start of each step
    biases: tuple[Float64, ...]  # (L,), bias of the volume term in each step; none without it


def mean_field(
    inputs: Inputs,
    kernels: Sequence[NormalizedKernel],
    spec: MeanFieldSpec,
    part: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run parallel mean-field updates x = (a + bias) / temperature - pairwise, Q = softmax(x).

    With a volume term, a bias per label is added to each update. The energy is reported and changes nothing. The run has converged when the
    mean KL from the old to the new marginals is below a tolerance and almost no label flips.

    Args:
        inputs: logits, weights and all that has a gradient.
        kernels: of the pairwise terms.
        spec: number of steps, tolerance and the kind of the volume term.
        part: (N,) bool, where the volume term applies; None: everywhere.
        progress: called with the number of steps done.
    """
    x = scores = (inputs.logits + inputs.bias) / inputs.temperature
    log_marginals = torch.log_softmax(x, dim=1)
    volume = None if spec.volume_weight == 0.0 else _Volume(log_marginals.exp(), inputs.slack, part)
    energies: list[float] = []
    biases: list[Float64] = []
    converged = False
    while len(energies) < spec.num_iterations and not converged:
        marginals = log_marginals.exp()
        messages = torch.zeros_like(x)
        for kernel, weight in zip(kernels, inputs.weights, strict=True):
            messages = messages + kernel.message(marginals) * weight
        pairwise = messages @ inputs.compatibility
        energy = (marginals * (log_marginals - scores + 0.5 * pairwise)).sum().item()
        x = scores - pairwise
        if volume is not None:
            energy += volume.energy(marginals)
            x = volume.balanced(x)
            biases.append(volume.bias)
        energies.append(energy)
        before, log_marginals = log_marginals, torch.log_softmax(x, dim=1)
        if spec.tolerance > 0.0:
            divergence = (log_marginals.exp() * (log_marginals - before)).sum(1).mean().item()
            flipped = (log_marginals.argmax(1) != before.argmax(1)).double().mean().item()
            converged = divergence < spec.tolerance and flipped < FLIPPED_SHARE
        if progress is not None:
            progress(len(energies))
    return Trace(x, converged, tuple(energies), tuple(biases))


class _Volume:
    """The volume term of a run: the masses to keep, and the bias per label of the last step."""

    def __init__(self, marginals: Tensor, slack: Tensor, part: Tensor | None) -> None:
        self._part, self._slack = part, slack.double()
        marginals = self._inside(marginals)
        num_labels = marginals.shape[1]
        self._target = torch.bincount(marginals.argmax(1), minlength=num_labels).double()
        self._term = VolumeTerm(self._target.detach().cpu().numpy(), slack.item())
        self.bias: Float64 = np.zeros(num_labels)

    def _inside(self, values: Tensor) -> Tensor:
        return values if self._part is None else values[self._part]

    def energy(self, marginals: Tensor) -> float:
        """Return the term's energy."""
        return self._term.energy(self._inside(marginals).detach().double().sum(0).cpu().numpy())

    def balanced(self, x: Tensor) -> Tensor:
        """Return x with the bias that balances the masses, where the term applies.

        The search has no gradient. One more Newton step, with a constant curvature, has the gradient of its solution.
        """
        scores = self._inside(x).double()
        with torch.no_grad():
            self.bias = self._term.search(lambda bias: _sums(scores, bias), self.bias, _LAST_CHANGE[x.dtype])
        bias = torch.as_tensor(self.bias, device=x.device)
        if torch.is_grad_enabled():
            masses, covariance = _sums(scores.detach(), self.bias)
            curvature = torch.as_tensor(self._term.curvature(covariance, masses + PSEUDO_VOXELS), device=x.device)
            target = self._target + PSEUDO_VOXELS
            scaled = target * torch.exp(-self._slack * bias)
            excess = torch.softmax(scores + bias, 1).sum(0) + PSEUDO_VOXELS - scaled * (target.sum() / scaled.sum())
            change = -torch.linalg.solve(curvature, excess)
            bias = bias + change - change.mean()
        return x + (bias if self._part is None else bias * self._part[:, None]).to(x.dtype)


def _sums(scores: Tensor, bias: Float64) -> tuple[Float64, Float64]:
    marginals = torch.softmax(scores + torch.as_tensor(bias, device=scores.device), 1)
    masses = marginals.sum(0)
    return masses.cpu().numpy(), (torch.diag(masses) - marginals.T @ marginals).cpu().numpy()
