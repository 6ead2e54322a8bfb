"""The training of one start: the model, Adam, the history, and the best values so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crfrefine.base.plain import to_plain
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import BANDWIDTHS
from crfrefine.train.device import CPU, TrainingDevice
from crfrefine.train.model import Model
from crfrefine.train.starts import STEP_LENGTHS, Start, rounded

LAST_STEP_LENGTH = 0.05
"""Length of the last optimizer steps, as a share of that of the first ones; between them half a cosine."""

MAX_GRADIENT = 10.0
"""Longer gradients are shortened: near a temperature or bandwidth that makes no sense they can be of any size."""


class Trajectory:
    """A model being trained, its parameters on the CPU; `prior` weighs what pulls it back to its start."""

    def __init__(
        self,
        start: Start,
        learn: Sequence[str],
        sizes: tuple[int, int, int],
        num_optimizer_steps: int,
        *,
        step_length: float = 1.0,
        prior: float = 0.0,
        device: TrainingDevice = CPU,
    ) -> None:
        self.start = start
        self._prior = prior
        self.num_optimizer_steps = num_optimizer_steps
        self.optimizer_step = 0
        self.history: list[dict[str, Any]] = []
        self.best_score = -math.inf
        self.best_optimizer_step = 0
        self.model = Model(start.parameters, learn, sizes, device)
        self._best = self._values()
        self._origin = self.model.positions()
        groups = self.model.groups
        self._step_lengths = [step_length * STEP_LENGTHS[group] for group in groups]
        self._optimizer = torch.optim.Adam([{"params": parameters} for parameters in groups.values()], betas=(0.8, 0.95))

    @property
    def name(self) -> str:
        """Of the start."""
        return self.start.name

    def step(self, gradients: Sequence[Tensor], loss: float) -> None:
        """Move along the gradients, one per learned parameter, and that of the prior."""
        parameters = [parameter for _, parameter in self.model.learned]
        pulls = self.model.pull(self._origin)
        for parameter, gradient, pull in zip(parameters, gradients, pulls, strict=True):
            parameter.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) + self._prior * pull
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        share = min(1.0, self.optimizer_step / self.num_optimizer_steps)
        factor = LAST_STEP_LENGTH + (1.0 - LAST_STEP_LENGTH) * 0.5 * (1.0 + math.cos(math.pi * share))
        for group, step_length in zip(self._optimizer.param_groups, self._step_lengths, strict=True):
            group["lr"] = step_length * factor
        self._optimizer.step()
        self.optimizer_step += 1
        self.history.append({"iteration": self.optimizer_step, "loss": loss, "thetas": self.thetas()})

    def scored(self, score: float, loss: float) -> None:
        """Note how good the present values are on the deciding cases, and keep them if they are the best."""
        if not self.history:
            self.history.append({"iteration": 0, "thetas": self.thetas()})
        self.history[-1].update(score=score, deciding_loss=loss)
        if score > self.best_score:
            self.best_score, self.best_optimizer_step, self._best = score, self.optimizer_step, self._values()

    @property
    def last_score(self) -> float:
        """Of the latest evaluation."""
        return next((float(record["score"]) for record in reversed(self.history) if "score" in record), -math.inf)

    def evaluations_since_best(self) -> int:
        """Return the number of consecutive evaluations without improvement."""
        return sum("score" in record and record["iteration"] > self.best_optimizer_step for record in self.history)

    def thetas(self) -> dict[str, Any]:
        """Return the present bandwidths, as plain numbers."""
        parameters = self.model.to_parameters()
        values: dict[str, Any] = {}
        for number, kernel in enumerate(parameters.bilateral):
            prefix = f"bilateral.{number}." if len(parameters.bilateral) > 1 else "bilateral."
            values |= {prefix + name: to_plain(getattr(kernel, name)) for name in BANDWIDTHS}
        if parameters.spatial.weight:
            values["spatial.theta_gamma"] = to_plain(parameters.spatial.theta_gamma)
        return values

    def best_parameters(self) -> CrfParameters:
        """Return the best parameters so far, as a file holds them."""
        present = self._values()
        self._restore(self._best)
        result = rounded(self.model.to_parameters())
        self._restore(present)
        return result

    def _values(self) -> dict[str, Any]:
        return {name: parameter.detach().tolist() for name, parameter in self.model.learned}

    def _restore(self, values: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.learned:
                parameter.copy_(torch.tensor(values[name], dtype=parameter.dtype))
