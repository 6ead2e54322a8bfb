"""Adam for the few numbers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-8  # keeps the divisor of a step above zero


class Adam:
    """Moves parameters along their gradients; each group has a step length of its own.

    The steps are those of `torch.optim.Adam`, bit for bit. That class is not used because PyTorch
    imports its compiler for it, which takes more than a second of each training.
    Source: Kingma & Ba 2015, algorithm 1.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self._groups = groups
        self._betas = betas
        self._num_steps = 0
        # The running means of each parameter's gradient and of its square.
        self._moments: list[list[tuple[Tensor, Tensor]]] = []
        for group in groups:
            of_group = []
            for value in group:
                of_group.append((torch.zeros_like(value), torch.zeros_like(value)))
            self._moments.append(of_group)

    @torch.no_grad()
    def step(self, step_lengths: Sequence[float]) -> None:
        """Make one step along the `grad` of each parameter, with one length for each group."""
        self._num_steps += 1
        first, second = self._betas
        first_correction = 1.0 - first**self._num_steps
        root_correction = (1.0 - second**self._num_steps) ** 0.5
        for group, moments, step_length in zip(
            self._groups, self._moments, step_lengths, strict=True
        ):
            for value, (mean, mean_square) in zip(group, moments, strict=True):
                gradient = value.grad
                if gradient is None:
                    continue
                mean.lerp_(gradient, 1.0 - first)
                mean_square.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
                divisor = (mean_square.sqrt() / root_correction).add_(_EPSILON)
                value.addcdiv_(mean, divisor, value=-step_length / first_correction)
