"""The mean-field iteration, its energy and its stopping rule, over (N, L) values of masked voxels (docs/reference/math.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float64
from crfrefine.engines.base import Progress
from crfrefine.engines.torch.filters import Filter
from crfrefine.engines.volume import PSEUDO_VOXELS, VolumeTerm
from crfrefine.parameters.specs import MeanFieldSpec

FLIPPED_SHARE = 1e-4  # of voxels whose label may still change in a step that counts as converged
_LAST_CHANGE = {torch.float64: 1e-7, torch.float32: 1e-5}  # nats of the last Newton step of the volume term


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
    """Run parallel mean-field updates x = (a + bias) / temperature - pairwise, Q = softmax(x).

    With a volume term, a bias per label is added to each update. The energy is reported and changes nothing. The run has converged when the
    mean KL from the old to the new marginals is below a tolerance and almost no label flips.

    Args:
        inputs: what has a gradient: logits (N, L), higher is better, weights (kernels, L), compatibility (L, L), temperature, bias (L,),
            and the slack, which is the inverse strength of the volume term.
        kernels: of the pairwise terms, normalized.
        spec: number of steps and tolerance.
        part: (N,) bool, where the volume term applies; None: nowhere.
        progress: called after each step.
    """
    logits, weights, compatibility, temperature, bias, slack = inputs
    x = scores = (logits + bias) / temperature
    log_marginals = torch.log_softmax(x, dim=1)
    volume = None if part is None else _Volume(log_marginals.exp(), slack, part)
    trace = Trace(x, converged=False, energy=[], biases=[])
    while len(trace.energy) < spec.num_iterations and not trace.converged:
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
        if progress is not None:
            progress("mean field", len(trace.energy), spec.num_iterations)
    return trace


class _Volume:
    """The volume term of a run: the masses to keep, and the bias per label of the last step, at which the next search starts."""

    def __init__(self, marginals: Tensor, slack: Tensor, part: Tensor) -> None:
        self._part, self._slack = part, slack.double()
        self._target = torch.bincount(marginals[part].argmax(1), minlength=marginals.shape[1]).double()
        self._term = VolumeTerm(self._target.cpu().numpy(), slack.item())
        self.bias: Float64 = np.zeros(marginals.shape[1])

    def energy(self, marginals: Tensor) -> float:
        """Return the term's energy."""
        return self._term.energy(marginals[self._part].detach().double().sum(0).cpu().numpy())

    def balanced(self, x: Tensor) -> Tensor:
        """Return x with the bias that balances the masses, where the term applies.

        The search has no gradient. One more Newton step, with a constant curvature, has the gradient of its solution.
        """
        scores = x[self._part].double()
        self.bias = self._term.search(lambda bias: _sums(scores.detach(), bias), self.bias, _LAST_CHANGE[x.dtype])
        bias = torch.as_tensor(self.bias, device=x.device)
        masses, covariance = _sums(scores.detach(), self.bias)
        curvature = torch.as_tensor(self._term.curvature(covariance, masses + PSEUDO_VOXELS), device=x.device)
        target = self._target + PSEUDO_VOXELS
        scaled = target * torch.exp(-self._slack * bias)
        excess = torch.softmax(scores + bias, 1).sum(0) + PSEUDO_VOXELS - scaled * (target.sum() / scaled.sum())
        change: Tensor = -torch.linalg.solve(curvature, excess)
        return x + ((bias + change - change.mean()) * self._part[:, None]).to(x.dtype)


def _sums(scores: Tensor, bias: Float64) -> tuple[Float64, Float64]:
    marginals = torch.softmax(scores + torch.as_tensor(bias, device=scores.device), 1)
    masses = marginals.sum(0)
    return masses.cpu().numpy(), (torch.diag(masses) - marginals.T @ marginals).cpu().numpy()
