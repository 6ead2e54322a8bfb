"""The mean field in plain tensor operations, whose gradients are those of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float64
from crfrefine.base.numerics import FLIPPED_SHARE, LEAST_DOUBT, PSEUDO_VOXELS
from crfrefine.engines.base import MeanFieldReport, Progress
from crfrefine.engines.torch.filters import Filter
from crfrefine.engines.volumes import VolumeTerm
from crfrefine.parameters.specs import MeanFieldSpec

# Nats; a Newton step of the volume term below this size is the last one.
_LAST_CHANGE = {torch.float64: 1e-7, torch.float32: 1e-5}


class Inputs(NamedTuple):
    """The inputs of a run as tensors, perhaps with gradients."""

    logits: Tensor  # (N, L), or (L, *grid) before the mask is applied
    weights: Tensor  # (kernels, L)
    compatibility: Tensor  # (L, L)
    temperature: Tensor
    bias: Tensor  # (L,)
    slack: Tensor  # of the volume term


def mean_field(
    inputs: Inputs,
    kernels: Sequence[Filter],
    spec: MeanFieldSpec,
    part: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, MeanFieldReport]:
    """Run parallel mean-field updates until divergence and share of flipped labels are small.

    Return x of the last step, (N, L), and the report.

    An update is x = (logits + bias) / temperature - pairwise, Q = softmax(x). The volume term
    applies in `part`, (N,) bool; None means nowhere.
    """
    x = scores = divided(inputs.logits + inputs.bias, inputs.temperature)
    volume = None
    if part is not None:
        volume = _Volume(x, inputs.slack, part)
    energies: list[float] = []
    previous = None
    while True:
        log_marginals = torch.log_softmax(x, dim=1)
        converged = False
        if previous is not None and spec.tolerance > 0.0:
            divergence = (log_marginals.exp() * (log_marginals - previous)).sum(1)
            is_flipped = log_marginals.argmax(1) != previous.argmax(1)
            has_few_flips = is_flipped.double().mean().item() < FLIPPED_SHARE
            converged = divergence.mean().item() < spec.tolerance and has_few_flips
        if converged or len(energies) == spec.num_iterations:
            report = MeanFieldReport(len(energies), converged, tuple(energies))
            return x, report
        if progress is not None:
            progress("mean field", len(energies), spec.num_iterations)

        marginals = log_marginals.exp()
        messages = torch.zeros_like(x)
        for kernel, weight in zip(kernels, inputs.weights, strict=True):
            messages = messages + kernel(marginals) * weight
        pairwise = messages @ inputs.compatibility
        potential = log_marginals - scores + 0.5 * pairwise
        energy = (marginals * potential).sum().item()
        x = scores - pairwise
        if volume is not None:
            energy += volume.energy(marginals)
            x = volume.balanced(x)
        energies.append(energy)
        previous = log_marginals


def divided(scores: Tensor, temperature: Tensor) -> Tensor:
    """Return scores over a temperature; only finite scores have a part in the gradient.

    A gradient of 0 times a score of -infinity, or of NaN outside the mask, would be NaN.
    """
    usable = scores.isfinite()
    quotient = scores.masked_fill(~usable, 0.0) / temperature
    return torch.where(usable, quotient, scores.detach())


class _Volume:
    """The volume term of a run: the masses to keep, and the newest bias, where searches start."""

    def __init__(self, x: Tensor, slack: Tensor, part: Tensor) -> None:
        """Keep the masses of the likeliest labels of x before the first step, (N, L)."""
        num_labels = x.shape[1]
        labels = x[part].argmax(1)
        self._part = part
        self._slack = slack.double()
        self._target = torch.bincount(labels, minlength=num_labels).double()
        self._term = VolumeTerm(self._target.cpu().numpy(), slack.item())
        self.bias: Float64 = np.zeros(num_labels)

    def energy(self, marginals: Tensor) -> float:
        """Return the term's energy."""
        masses = marginals[self._part].detach().double().sum(0)
        return self._term.energy(masses.cpu().numpy())

    def balanced(self, x: Tensor) -> Tensor:
        """Return x with the bias that balances the masses, where the term applies."""
        scores = x[self._part].double()

        def masses_of(bias: Float64) -> tuple[Float64, Float64]:
            """Return masses (L,) and their covariance (L, L) for a bias."""
            biases = torch.as_tensor(bias, device=x.device)
            marginals = torch.softmax(scores.detach() + biases, 1)
            masses = marginals.sum(0)
            covariance = torch.diag(masses) - marginals.T @ marginals
            return masses.cpu().numpy(), covariance.cpu().numpy()

        self.bias = self._term.search(masses_of, self.bias, _LAST_CHANGE[x.dtype])
        # Autograd does not see the search. One more Newton step, with a constant curvature, has
        # the gradient of its solution.
        bias = torch.as_tensor(self.bias, device=x.device)
        masses, covariance = masses_of(self.bias)
        curvature = self._term.curvature(covariance, masses + PSEUDO_VOXELS, LEAST_DOUBT)
        matrix = torch.as_tensor(curvature, device=x.device)
        target = self._target + PSEUDO_VOXELS
        scaled = target * torch.exp(-self._slack * bias)
        balanced = scaled * (target.sum() / scaled.sum())
        biased_masses = torch.softmax(scores + bias, 1).sum(0)
        excess = biased_masses + PSEUDO_VOXELS - balanced
        change = -torch.linalg.solve(matrix, excess)
        stays = torch.as_tensor(self._term.stays(masses), device=x.device)
        change = torch.where(stays, change - change[stays].mean(), change.detach())
        biases = bias + change
        shift = biases * self._part[:, None]
        return x + shift.to(x.dtype)
